"""Verification of audit cards: compares all hashes, and computes everything that a card says again from its scores. No Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raysweep.auditing.card import (
    JUDGE,
    PAGE,
    Card,
    ModelFolder,
    anchor_table,
    content_digest,
    page,
    read,
    read_json,
    sha256,
)
from raysweep.config.schema import Tier
from raysweep.models.stored import Missing
from raysweep.registry import RegistryError
from raysweep.storage.files import StoreError, digest_state

TOLERANCE = 1e-6
SHOWN = 3  # differences in a line
STATED = ("created_at", "versions", "code.version", "code.commit")  # of which nothing in the folder is evidence
# compared in lines of their own, or paths of the machine that wrote the card
ELSEWHERE = (*STATED, "digest", "files", "code.audit", "task.folder")
NOTE = "memory ran out: batches of "  # begins what a reason may add about the machine that measured


@dataclass(frozen=True)
class Comparison:
    """One line of a verification; `holds` is None if it could not be checked."""

    what: str
    holds: bool | None
    detail: str


def verify(path: Path, task: Path | None = None) -> list[Comparison]:
    """Checks a card against its files, and everything that it says against what follows from its scores.

    task: the folder of the task's data, if it is no longer where the card says. Raises ConfigError for a path that is no card.
    """
    card, folder = read(path), path if path.is_dir() else path.parent
    lines = [*_compare_files(card, path, folder), *_compare_models(card)]
    if card.judge_digest:
        lines.append(_compare_digest("judge", card.judge_digest, folder / JUDGE, _judge_digest))
    lines.append(compare_code((f.check for f in card.findings), card.code.audit))
    data = task or Path(card.task.folder)
    if not (data / "task.json").is_file():
        lines.append(Comparison("task", None, f"{data}: not here, so no number was recomputed"))
        return [*lines, _stated()]
    from raysweep.tasks.task import Task

    loaded = Task.load(data)
    lines.append(_compare("task", card.task.digest, loaded.digest))
    if not all(name in card.files for name in expected_files(card)) or _broken(lines, card):
        lines.append(
            Comparison(
                "numbers", None, "not recomputed: files of the card, the judge or the task are not those that it names"
            )
        )
        return [*lines, _stated()]
    with TemporaryDirectory() as run:
        return [*lines, *_recompute(card, folder, loaded, Path(run)), _stated()]


def signature(path: Path, key: Path) -> Comparison:
    """Whether the owner of the public key `key` signed the files in a card's folder; raises ConfigError as `signing.sign` does."""
    from raysweep.results.signing import fault

    reason = fault(path, key)
    return Comparison("signature", not reason, reason or "the owner of this key signed these files")


def expected_files(card: Card) -> list[str]:
    """The names of the files beside a card."""
    anchors = ["base", "destroyed", *(name for name in card.models if name.startswith("oracle-"))]
    tables = [f"{tier}-{kind}.parquet" for tier in card.tiers for kind in ("rows", "scores")]
    tables += [anchor_table(name, "rows") for name in anchors] + [anchor_table(name, "scores") for name in anchors]
    return sorted([*tables, *([JUDGE] if card.judge_digest else [])])


def compare_code(checks: Iterable[str], stated: str) -> Comparison:
    """Whether the installed code of `checks` has the hash that a card states."""
    from raysweep.plugins import audit_code

    try:
        same = audit_code(checks) == stated
    except RegistryError as error:
        return Comparison("code of the checks", None, f"not all of it is here: {error}")
    if same:
        return Comparison("code of the checks", True, "the code that measured it")
    detail = "other code than measured it: differences below may come from that"
    return Comparison("code of the checks", None, detail)


def differences(stated: Any, computed: Any, key: str = "") -> Iterator[str]:
    """Where two values of plain data differ, as "key: STATED, computed COMPUTED"; numbers up to `TOLERANCE`."""
    if isinstance(stated, dict) and isinstance(computed, dict):
        for name in sorted({*stated, *computed}):
            yield from differences(
                stated.get(name, "missing"), computed.get(name, "missing"), f"{key}.{name}".lstrip(".")
            )
    elif isinstance(stated, list) and isinstance(computed, list) and len(stated) == len(computed):
        for i, (one, other) in enumerate(zip(stated, computed, strict=True)):
            yield from differences(one, other, f"{key}.{i}".lstrip("."))
    elif not _equal(stated, computed):
        yield f"{key}: {_short(stated)}, computed {_short(computed)}"


def _equal(stated: Any, computed: Any) -> bool:
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (stated, computed)]
    if all(numbers):
        return stated == computed or math.isclose(stated, computed, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(stated == computed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _compare_files(card: Card, path: Path, folder: Path) -> list[Comparison]:
    """The card's own hash, its page, and its files."""
    content = read_json(path)
    lines = [_compare("the card's own digest", card.digest, content_digest(content))]
    foreign = sorted(differences(content, _plain(card)))
    if foreign:
        lines.append(Comparison("fields of the card", False, "; ".join(foreign[:SHOWN])))
    stated, expected = set(card.files), set(expected_files(card))
    if stated != expected:
        parts = [f"{name} is missing" for name in sorted(expected - stated)]
        parts += [f"{name} does not belong to it" for name in sorted(stated - expected)]
        lines.append(Comparison("files of the card", False, "; ".join(parts)))
    for name, sha in card.files.items():
        file = folder / name
        lines.append(_compare(name, sha, sha256(file) if file.is_file() else "missing"))
    file = folder / PAGE
    if not file.is_file():
        lines.append(Comparison(PAGE, False, "missing"))
    else:
        same = file.read_bytes() == page(card).encode()
        lines.append(
            Comparison(PAGE, same, "the page of this card" if same else f"is not the page that {path.name} gives")
        )
    return lines


def _compare_models(card: Card) -> list[Comparison]:
    """The models in their folders."""
    return [
        _compare_digest(f"model {name}", _identity(model), Path(model.folder), _identity_of)
        for name, model in card.models.items()
    ]


def _identity(model: ModelFolder) -> str:
    return f"{model.digest} ({', '.join(model.networks)}; not read: {'; '.join(model.not_read) or 'nothing'})"


def _identity_of(folder: Path) -> str:
    from raysweep.models.contents import not_read
    from raysweep.models.identity import Identity

    model = Identity.read(str(folder))
    return _identity(ModelFolder(model.folder, model.digest, model.networks, not_read(folder)))


def _broken(lines: list[Comparison], card: Card) -> bool:
    """Whether a file is missing or changed that numbers are computed from."""
    needed = {*card.files, "judge", "task"}
    return any(line.holds is not True and line.what in needed for line in lines)


def _recompute(card: Card, folder: Path, task: Any, run: Path) -> Iterator[Comparison]:
    """Compares rows with scores, and the card with the rows."""
    from raysweep.results.recompute import Evidence, Recomputer

    absent = [
        f"{key}: {path}"
        for settings in card.tiers.values()
        for key, path in Tier.model_validate(settings, context={"stored": True}).weights.items()
        if not path.exists()
    ]
    if absent:
        yield Comparison("numbers", None, f"not recomputed: weights that are not here: {', '.join(absent)}")
        return
    try:
        evidence = Evidence.of(card, folder, task, run)
    except (KeyError, ValueError) as error:
        yield Comparison("card", False, f"names no audit that can be computed again: {error}")
        return
    recomputer = Recomputer(task, folder / JUDGE if card.judge_digest else None)
    for name, audit in evidence.audits.items():
        yield from _compare_rows(name, audit, recomputer)
    for name, audit in evidence.anchors.items():
        yield from _summary(f"anchor {name}", list(_compare_rows(f"anchor {name}", audit, recomputer)))
    try:
        again = read_json(evidence.card_again())
        failed = evidence.failed()
    except (ValueError, KeyError, OSError, StoreError) as error:
        yield Comparison("card", False, f"its rows give no card: {error}")
        return
    stated = _plain(card)
    yield from _compare_fields(stated, again)
    wrong = list(differences(sorted(stated["incomplete"]), failed, "incomplete"))
    yield Comparison("card: incomplete", not wrong, "; ".join(wrong) or "the checks that failed by the rows")


def _compare_rows(name: str, audit: Any, recomputer: Any) -> Iterator[Comparison]:
    """The rows of one audit and those that its scores give, a line per check."""
    try:
        again, stated = recomputer.rows(audit), audit.stated
    except Exception as error:  # changed scores may fail in any way
        yield Comparison(f"{name}: scores", False, f"cannot be reduced to metrics: {error}")
        return
    foreign = sorted({r["check"] for r in stated} - set(again.rows))
    if foreign:
        yield Comparison(f"{name}: rows", False, f"of checks that the tier does not ask for: {', '.join(foreign)}")
    for check, rows in again.rows.items():
        if check in again.unknown and not rows:
            yield Comparison(f"{name}: {check}", None, again.unknown[check])
            continue
        kept = {r["metric"]: _without_note(r) for r in stated if r["check"] == check}
        wrong = list(differences(kept, {r["metric"]: r for r in rows}))
        detail = "; ".join(wrong[:SHOWN]) or f"{len(rows)} numbers and their intervals, from the scores"
        if not wrong and check in again.unknown:
            yield Comparison(f"{name}: {check}", None, again.unknown[check])
        else:
            yield Comparison(f"{name}: {check}", not wrong, detail)


def _without_note(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the note of how much memory the machine had."""
    parts = [part for part in row["reason"].split("; ") if not part.startswith(NOTE)]
    return row | {"reason": "; ".join(parts)}


def _summary(what: str, lines: list[Comparison]) -> Iterator[Comparison]:
    """One line for many that hold; otherwise those that do not."""
    wrong = [line for line in lines if line.holds is False]
    if wrong:
        yield from wrong
        return
    unknown = [line.what.split(": ")[-1] for line in lines if line.holds is None]
    text = f", not of {', '.join(unknown)}" if unknown else ""
    yield Comparison(what, True, f"the numbers of {len(lines) - len(unknown)} checks from the scores{text}")


def _compare_fields(stated: dict[str, Any], again: dict[str, Any]) -> Iterator[Comparison]:
    """A line per field of a card and of the card that its rows give."""
    for name in stated:
        if name in ELSEWHERE or name == "incomplete":
            continue
        wrong = [text for text in differences(stated[name], again[name], name) if not text.startswith(ELSEWHERE)]
        yield Comparison(f"card: {name}", not wrong, "; ".join(wrong[:SHOWN]) or "follows from the rows")


def _stated() -> Comparison:
    return Comparison(
        "stated alone", True, f"{', '.join(STATED)}: nothing here can show them; a signature shows who states them"
    )


def _plain(card: Card) -> dict[str, Any]:
    """A card as read from JSON."""
    import json

    content: dict[str, Any] = json.loads(json.dumps(card.plain()))
    return content


def _compare(what: str, stated: str, actual: str) -> Comparison:
    same = stated == actual
    return Comparison(what, same, stated if same else f"the card says {stated}, here it is {actual}")


def _compare_digest(what: str, stated: str, path: Path, digest: Callable[[Path], str]) -> Comparison:
    if not path.exists():
        return Comparison(what, None, f"{path}: not here")
    try:
        return _compare(what, stated, digest(path))
    except Missing as error:
        return Comparison(what, None, str(error))
    except (ValueError, StoreError) as error:
        return Comparison(what, False, str(error))


def _judge_digest(file: Path) -> str:
    from raysweep.storage.cache import load_tensors

    return digest_state(load_tensors(file))
