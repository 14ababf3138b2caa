"""The audit card: one page about one model, with everything that is needed to check it again. No Ray.

A card is a folder: `card.json` and `card.html` say what was asked, tested, found and not tested; the tables beside them hold
every score per sample, and `judge.safetensors` the judge. `verify` recomputes each number from the scores and compares all
hashes, so that neither a changed number nor a changed file goes unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.config.schema import ConfigError, Tier
from raysweep.registry import RegistryError
from raysweep.storage.files import StoreError, digest_of, digest_state, write_bytes, write_json
from raysweep.storage.schemas import ROWS, SCORES, read_table

CARD = "card.json"
PAGE = "card.html"
JUDGE = "judge.safetensors"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Finding:
    """One line of a verification. `holds` is None where it could not be checked."""

    what: str
    holds: bool | None
    detail: str


def thresholds() -> dict[str, str]:
    """What was fixed before any model was looked at, in words."""
    from evaluators import classifier, membership, memorisation, reconstruction
    from raysweep.audit import objectives, verdict

    return {
        "membership": f"equivalent to the oracles within {membership.MARGIN} of the AUC; step and sign by half of the base's "
        "retained images against half of their holdout",
        "memorisation": f"a correlation above {reconstruction.HIT} counts as the forgotten image",
        "copies": f"a sample extracts an image below {memorisation.ALPHA} of its mean distance to its {memorisation.NEIGHBOURS} "
        f"nearest training images; by SSCD above the {memorisation.QUANTILE:.1%} quantile of held-out images",
        "validity": f"a sample is valid above the {classifier.REAL_QUANTILE:.0%} quantile of real images' energy",
        "views": f"a view counts if it tells base from oracles by {objectives.INFORMATIVE:g} standard errors, and the base does not "
        "show less of what must be forgotten",
        "attacks": f"the thing comes back if presence exceeds the oracles' by more than {verdict.MARGIN}, one-sided, false "
        f"discoveries at most {verdict.RATE:.0%}; destroyed below {verdict.INVALID:.0%} of the oracles' validity",
        "intervals": "95 %, by the means named in each line",
    }


def write(folder: Path, content: dict[str, Any], tables: dict[str, Path], judge: Path | None) -> Path:
    """Writes a card; tables: name -> Parquet file to copy. Returns the path of its JSON."""
    for name, source in tables.items():
        write_bytes(folder / name, source.read_bytes())
    if judge is not None:
        write_bytes(folder / JUDGE, judge.read_bytes())
    files = {p.name: _sha(p) for p in sorted(folder.iterdir()) if p.suffix in (".parquet", ".safetensors")}
    card = content | {"card": 1, "files": files, "thresholds": thresholds()}
    card["digest"] = digest_of(card)
    write_bytes(folder / PAGE, page(card).encode())
    write_json(folder / CARD, card)
    return folder / CARD


def page(card: dict[str, Any]) -> str:
    """The card as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raysweep.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("card.html.j2").render(card=card, groups=_by_check(card["findings"]))


def read(path: Path) -> dict[str, Any]:
    """A card by its JSON file or its folder; raises ConfigError."""
    file = path / CARD if path.is_dir() else path
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: no such file; a card is the folder or the {CARD} that `raysweep audit` wrote"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not a card ({error})") from error
    if not isinstance(card, dict) or card.get("card") != 1:
        raise ConfigError(f"{file}: not a card of this version of raysweep")
    return card


def verify(path: Path, task: Path | None = None) -> list[Finding]:
    """Checks a card against its files and recomputes its numbers. task: the task's folder, if not where the card says."""
    card = read(path)
    folder = path if path.is_dir() else path.parent
    own = {k: v for k, v in card.items() if k != "digest"}
    findings = [_compare("the card's own digest", card["digest"], digest_of(own))]
    for name, sha in card["files"].items():
        there = folder / name
        findings.append(_compare(name, sha, _sha(there) if there.is_file() else "missing"))
    for name, model in card["models"].items():
        findings.append(_digest(f"weights of {name}", model["digest"], Path(model["folder"]), _model_digest))
    if card["judge_digest"]:
        findings.append(_digest("judge", card["judge_digest"], folder / JUDGE, _judge_digest))
    findings.append(_code(card))
    place = task or Path(card["task"]["folder"])
    if not (place / "task.json").is_file():
        findings.append(Finding("task", None, f"{place}: not here, so no number was recomputed"))
        return findings
    from raysweep.tasks.task import Task

    loaded = Task.load(place)
    findings.append(_compare("task", card["task"]["digest"], loaded.digest))
    if all(f.holds is not False for f in findings):
        findings += _recomputed(card, folder, loaded)
    return findings


def _code(card: dict[str, Any]) -> Finding:
    from raysweep.plugins import audit_code

    try:
        same = audit_code(f["check"] for f in card["findings"]) == card["code"]["audit"]
    except RegistryError as error:
        return Finding("code of the checks", None, f"not all of it is here: {error}")
    said = "the code that measured it" if same else "other code than measured it: differences below may come from that"
    return Finding("code of the checks", True if same else None, said)


def _recomputed(card: dict[str, Any], folder: Path, task: Any) -> list[Finding]:
    """Each finding of the card against what its scores give."""
    from raysweep.audit.auditor import load_judge
    from raysweep.audit.measure import reduce, subject_of
    from raysweep.registry import resolve

    judge = load_judge(folder / JUDGE) if card["judge_digest"] else None  # of a model that is its own judge
    found = []
    for tier_name, settings in card["tiers"].items():
        absent = [f"{key}: {path}" for key, path in settings["weights"].items() if not Path(path).exists()]
        if absent:
            found.append(Finding(f"{tier_name} tier", None, f"weights that are not here: {', '.join(absent)}"))
            continue
        tier = Tier.model_validate(
            settings, context={"stored": True}
        )  # its checks may be of packages that are not here
        subject = subject_of(None, task, judge, tier)
        scores = load_scores(folder / f"{tier_name}-scores.parquet")
        stated = {
            (f["check"], f["metric"]): f for f in card["findings"] if f["tier"] == tier_name and f["status"] == "ok"
        }
        for check in dict.fromkeys(c for c, _ in stated):
            mine = {name.split(".", 1)[1]: a for name, a in scores.items() if name.split(".", 1)[0] == check}
            try:
                evaluator = resolve("evaluator", check)()
            except RegistryError as error:
                found.append(Finding(f"{tier_name}: {check}", None, str(error)))
                continue
            again = {m.name: m for m in reduce(evaluator, mine, subject, tier.groups).metrics}
            wrong = [
                f"{metric} {f[key]!r} is {getattr(again.get(metric), key, None)!r}"
                for (c, metric), f in stated.items()
                if c == check
                for key in ("value", "lo", "hi")
                if not _close(f[key], getattr(again.get(metric), key, None))
            ]
            number = sum(c == check for c, _ in stated)
            detail = "; ".join(wrong[:3]) if wrong else f"{number} numbers and their intervals, from the scores"
            found.append(Finding(f"{tier_name}: {check}", not wrong, detail))
    return found


def load_scores(path: Path) -> dict[str, np.ndarray]:
    """ "check.score" -> array, units along the first axis."""
    units: dict[str, list[tuple[int, list[float], list[int]]]] = {}
    for row in read_table(path, SCORES).to_pylist():
        units.setdefault(row["score"], []).append((row["unit"], row["values"], row["shape"]))
    return {
        name: np.array([values for _, values, _ in sorted(rows)]).reshape(len(rows), *rows[0][2])
        for name, rows in units.items()
    }


def findings_of(rows: Path, paired: Path | None, tier: str) -> list[dict[str, Any]]:
    """The lines of a card from an audit's rows and, if there are any, its paired differences."""
    deltas: dict[tuple[str, str], dict[str, Any]] = {}
    if paired is not None and paired.is_file():
        for r in read_table(paired, ROWS).to_pylist():
            delta = {k: r[k] for k in ("value", "lo", "hi")}
            deltas.setdefault((r["check"], r["metric"]), {})[r["paired_with"]] = delta
    keys = ("check", "metric", "value", "lo", "hi", "n", "interval", "direction", "status", "reason")
    return [
        {k: r[k] for k in keys} | {"tier": tier, "to": deltas.get((r["check"], r["metric"]), {})}
        for r in read_table(rows, ROWS).to_pylist()
    ]


def _by_check(findings: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for f in findings:
        groups.setdefault(f["check"] if f["tier"] == "audit" else f"{f['check']} (attack)", []).append(f)
    return list(groups.items())


def _close(stated: float | None, found: float | None) -> bool:
    if stated is None or found is None:
        return stated is None and found is None
    return abs(stated - found) <= TOLERANCE * max(1.0, abs(stated))


def _compare(what: str, stated: str, found: str) -> Finding:
    same = stated == found
    return Finding(what, same, stated if same else f"the card says {stated}, here it is {found}")


def _digest(what: str, stated: str, place: Path, digest: Callable[[Path], str]) -> Finding:
    if not place.exists():
        return Finding(what, None, f"{place}: not here")
    try:
        return _compare(what, stated, digest(place))
    except (ValueError, StoreError) as error:
        return Finding(what, False, str(error))


def _model_digest(folder: Path) -> str:
    from raysweep.models.families import load

    return load(folder).digest


def _judge_digest(path: Path) -> str:
    from raysweep.storage.cache import load_tensors

    return digest_state(load_tensors(path))


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
