"""Verification of audit cards: compares all hashes and recomputes every number from the scores per sample. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.auditing.card import JUDGE, Finding, content_digest, read, read_json, sha256
from raysweep.config.schema import Tier
from raysweep.registry import RegistryError
from raysweep.storage.files import StoreError, digest_state
from raysweep.storage.schemas import SCORES, read_table

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Comparison:
    """One line of a verification; `holds` is None if it could not be checked."""

    what: str
    holds: bool | None
    detail: str


def verify(path: Path, task: Path | None = None) -> list[Comparison]:
    """Checks a card against its files and recomputes its numbers.

    task: the folder of the task's data, if it is no longer where the card says. Raises ConfigError for a path that is no card.
    """
    card, folder = read(path), path if path.is_dir() else path.parent
    lines = [_compare("the card's own digest", card.digest, content_digest(read_json(path)))]
    for name, sha in card.files.items():
        file = folder / name
        lines.append(_compare(name, sha, sha256(file) if file.is_file() else "missing"))
    for name, model in card.models.items():
        lines.append(_compare_digest(f"model {name}", model.digest, Path(model.folder), _model_digest))
    if card.judge_digest:
        lines.append(_compare_digest("judge", card.judge_digest, folder / JUDGE, _judge_digest))
    lines.append(compare_code((f.check for f in card.findings), card.code.audit))
    data = task or Path(card.task.folder)
    if not (data / "task.json").is_file():
        lines.append(Comparison("task", None, f"{data}: not here, so no number was recomputed"))
        return lines
    from raysweep.tasks.task import Task

    loaded = Task.load(data)
    lines.append(_compare("task", card.task.digest, loaded.digest))
    if all(line.holds is not False for line in lines):
        judge = folder / JUDGE if card.judge_digest else None
        for tier, settings in card.tiers.items():
            findings = [f for f in card.findings if f.tier == tier and f.status == "ok"]
            lines += recompute(tier, settings, findings, folder / f"{tier}-scores.parquet", loaded, judge)
    return lines


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


def recompute(
    tier_name: str, settings: dict[str, Any], findings: Sequence[Finding], scores: Path, task: Any, judge: Path | None
) -> list[Comparison]:
    """Compares the findings of one tier with the numbers that its scores give, one line per check.

    settings: of the tier. judge: file of its weights, None for a model that is its own judge.
    """
    from raysweep.auditing.judges import load_judge
    from raysweep.auditing.measure import reduce, subject_of
    from raysweep.registry import resolve

    # the packages of its checks may not be installed here
    tier = Tier.model_validate(settings, context={"stored": True})
    absent = [f"{key}: {path}" for key, path in tier.weights.items() if not path.exists()]
    if absent:
        return [Comparison(f"{tier_name} tier", None, f"weights that are not here: {', '.join(absent)}")]
    subject = subject_of(None, task, None if judge is None else load_judge(judge), tier)
    arrays, lines = load_scores(scores), []
    for check in dict.fromkeys(f.check for f in findings):
        line = f"{tier_name}: {check}"
        try:
            evaluator = resolve("evaluator", check)()
        except RegistryError as error:
            lines.append(Comparison(line, None, str(error)))
            continue
        units = {name.split(".", 1)[1]: a for name, a in arrays.items() if name.split(".", 1)[0] == check}
        metrics = {m.name: m for m in reduce(evaluator, units, subject, tier.groups).metrics}
        stated = [f for f in findings if f.check == check]
        wrong = [
            f"{f.metric} {getattr(f, key)!r} is {getattr(metrics.get(f.metric), key, None)!r}"
            for f in stated
            for key in ("value", "lo", "hi")
            if not _close(getattr(f, key), getattr(metrics.get(f.metric), key, None))
        ]
        detail = "; ".join(wrong[:3]) if wrong else f"{len(stated)} numbers and their intervals, from the scores"
        lines.append(Comparison(line, not wrong, detail))
    return lines


def load_scores(path: Path) -> dict[str, np.ndarray]:
    """Reads an audit's scores: "check.score" -> array, units along the first axis."""
    units: dict[str, list[tuple[int, list[float], list[int]]]] = {}
    for row in read_table(path, SCORES).to_pylist():
        units.setdefault(row["score"], []).append((row["unit"], row["values"], row["shape"]))
    return {
        name: np.array([values for _, values, _ in sorted(rows)]).reshape(len(rows), *rows[0][2])
        for name, rows in units.items()
    }


def _close(stated: float | None, computed: float | None) -> bool:
    if stated is None or computed is None:
        return stated is None and computed is None
    return abs(stated - computed) <= TOLERANCE * max(1.0, abs(stated))


def _compare(what: str, stated: str, actual: str) -> Comparison:
    same = stated == actual
    return Comparison(what, same, stated if same else f"the card says {stated}, here it is {actual}")


def _compare_digest(what: str, stated: str, path: Path, digest: Callable[[Path], str]) -> Comparison:
    if not path.exists():
        return Comparison(what, None, f"{path}: not here")
    try:
        return _compare(what, stated, digest(path))
    except (ValueError, StoreError) as error:
        return Comparison(what, False, str(error))


def _model_digest(folder: Path) -> str:
    from raysweep.models.families import load

    digest: str = load(folder).digest
    return digest


def _judge_digest(path: Path) -> str:
    from raysweep.storage.cache import load_tensors

    return digest_state(load_tensors(path))
