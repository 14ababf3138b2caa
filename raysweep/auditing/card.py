"""Audit cards: one page about one model, with everything that is needed to check it again. No Ray.

A card is a folder. `card.json` and `card.html` state what was asked, measured and not tested; the tables beside them contain the
rows and every score per sample of the model, the base, the oracles and the destroyed model, and `judge.safetensors` the judge.
`raysweep.results.verify` compares all hashes and computes the card again from the scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from raysweep.auditing.objectives import Placement
from raysweep.auditing.verdict import Verdict
from raysweep.config.schema import ConfigError
from raysweep.storage.files import digest_of, write_bytes, write_json
from raysweep.storage.schemas import ROWS, SCORES, read_table, write_table

CARD = "card.json"
PAGE = "card.html"
JUDGE = "judge.safetensors"
PICTURES = "strip."  # begins the names of scores that are pictures for people
VERSION = 2


@dataclass(frozen=True)
class Difference:
    """A metric's paired difference to a reference, with its 95 % interval; None without one."""

    value: float
    lo: float | None
    hi: float | None


@dataclass(frozen=True)
class Finding:
    """One metric of one check; see `ROWS` for the fields. to: "base" and "oracle" -> paired difference."""

    tier: str
    check: str
    metric: str
    value: float | None
    lo: float | None
    hi: float | None
    n: int
    interval: str
    direction: str
    status: str
    reason: str
    to: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFolder:
    """A model that took part.

    digest: hash of its tensors and of the settings that its output depends on. networks: hashes of its network's tensors alone,
    rounded to half precision. not_read: files, subfolders and settings in the folder that have no influence on it.
    """

    folder: str
    digest: str
    networks: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskFolder:
    """The task: its name, the hash of its data and settings, and the folder of both."""

    name: str
    digest: str
    folder: str


@dataclass(frozen=True)
class Code:
    """The code that measured: version and commit of raysweep, and the hash of the code of the checks."""

    version: str
    commit: str
    audit: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of `card.json`.

    answer: sentences. asked: the question. untested, incomplete: what no number covers, and the checks that failed.
    tiers: tier -> its settings. models: name -> the audited model, the base and the oracles. files: name -> SHA-256 of the
    files beside the card. thresholds: what was fixed before any model was looked at. digest: hash of all other fields.
    """

    card: int = VERSION
    subject: str
    created_at: str
    answer: tuple[str, ...]
    asked: str
    objectives: Placement
    verdict: Verdict
    findings: tuple[Finding, ...]
    untested: tuple[str, ...]
    incomplete: tuple[str, ...]
    tiers: dict[str, dict[str, Any]]
    models: dict[str, ModelFolder]
    task: TaskFolder
    judge_digest: str
    code: Code
    versions: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    thresholds: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def plain(self) -> dict[str, Any]:
        """The card as JSON data."""
        return asdict(self)

    @property
    def content_digest(self) -> str:
        """The hash of all fields but `digest`, which equals it unless the card was changed."""
        return content_digest(self.plain())


def thresholds() -> dict[str, str]:
    """Sentences on the thresholds that were fixed before any model was measured."""
    from evaluators import classifier, membership, memorisation, reconstruction
    from raysweep.auditing import anchors, verdict

    return {
        "membership": f"equivalent to the oracles within {membership.MARGIN} of the AUC; step and sign by half of the base's "
        "retained images against half of their holdout",
        "memorisation": f"a correlation above {reconstruction.HIT} counts as the forgotten image",
        "copies": f"a sample extracts an image below {memorisation.ALPHA} of its mean distance to its {memorisation.NEIGHBOURS} "
        f"nearest training images; by SSCD above the {memorisation.QUANTILE:.1%} quantile of held-out images",
        "validity": f"a sample is valid above the {classifier.REAL_QUANTILE:.0%} quantile of real images' energy",
        "views": f"a view counts if base and oracles differ by {anchors.INFORMATIVE:g} standard errors of the difference to a further "
        "oracle, and the base does not show less of what must be forgotten",
        "attacks": f"forgotten data come back if presence exceeds the oracles' mean by more than {verdict.MARGIN} and exceeds what a "
        f"further oracle would show, one-sided, each label at {verdict.ALPHA:.0%}; like the oracle if every excess is shown "
        f"to be at most {verdict.MARGIN} (95 %); destroyed below {verdict.INVALID:.0%} of the oracles' validity",
        "intervals": "95 %, by the method named in each line",
    }


def write(
    folder: Path,
    card: Card,
    tables: Mapping[str, Path],
    judge: Path | None,
    anchors: Mapping[str, tuple[Path, Path]] | None = None,
) -> Path:
    """Writes a card and returns the path of its JSON.

    tables: name -> Parquet file to copy. anchors: name of an anchor -> its rows and its scores; their pictures are left out.
    `files`, `thresholds` and `digest` are filled in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in [p for p in folder.glob("*") if p.suffix in (".parquet", ".safetensors")]:
        path.unlink()  # of an earlier card with other anchors
    for name, source in tables.items():
        write_bytes(folder / name, source.read_bytes())
    for name, (rows, scores) in (anchors or {}).items():
        write_bytes(folder / anchor_table(name, "rows"), rows.read_bytes())
        kept = [row for row in read_table(scores, SCORES).to_pylist() if not row["score"].startswith(PICTURES)]
        write_table(folder / anchor_table(name, "scores"), kept, SCORES)
    if judge is not None:
        write_bytes(folder / JUDGE, judge.read_bytes())
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.suffix in (".parquet", ".safetensors")}
    whole = replace(card, files=files, thresholds=thresholds())
    card = _parse(json.dumps(whole.plain(), sort_keys=True))  # numbers and the order of names as they are read again
    card = replace(card, digest=card.content_digest)
    write_bytes(folder / PAGE, page(card).encode())
    write_json(folder / CARD, card.plain())
    return folder / CARD


def anchor_table(name: str, kind: Literal["rows", "scores"]) -> str:
    """Name of the file with the rows or the scores of an anchor."""
    return f"audit-{kind}-{name}.parquet"


def read(path: Path) -> Card:
    """Reads a card by its JSON file or its folder; raises ConfigError."""
    file = path / CARD if path.is_dir() else path
    try:
        return _parse(json.dumps(read_json(path)))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(
            f"{file}: not a card of this version of raysweep ({key}: {error.errors()[0]['msg']})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON of a card as it is on disk, by its file or its folder; raises ConfigError."""
    file = path / CARD if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: no such file; a card is the folder or the {CARD} that `raysweep audit` wrote"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not a card ({error})") from error
    if not isinstance(content, dict) or content.get("card") != VERSION:
        raise ConfigError(f"{file}: not a card of this version of raysweep")
    return content


def content_digest(content: dict[str, Any]) -> str:
    """The hash of a card's JSON without its field `digest`."""
    return digest_of({key: value for key, value in content.items() if key != "digest"})


def findings_of(rows: Path, paired: Path | None, tier: str) -> list[Finding]:
    """The findings of an audit from its rows and from its paired differences, if there are any."""
    differences: dict[tuple[str, str], dict[str, Difference]] = {}
    if paired is not None and paired.is_file():
        for r in read_table(paired, ROWS).to_pylist():
            by_reference = differences.setdefault((r["check"], r["metric"]), {})
            by_reference[r["paired_with"]] = Difference(r["value"], r["lo"], r["hi"])
    keys = ("check", "metric", "value", "lo", "hi", "n", "interval", "direction", "status", "reason")
    return [
        Finding(tier=tier, to=differences.get((r["check"], r["metric"]), {}), **{key: r[key] for key in keys})
        for r in read_table(rows, ROWS).to_pylist()
    ]


def page(card: Card) -> str:
    """The card as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raysweep.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.html.j2").render(card=card, groups=_by_check(card.findings))


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parse(text: str) -> Card:
    return TypeAdapter(Card).validate_json(text, strict=True)


def _by_check(findings: Iterable[Finding]) -> list[tuple[str, Sequence[Finding]]]:
    groups: dict[str, list[Finding]] = {}
    for f in findings:
        groups.setdefault(f.check if f.tier == "audit" else f"{f.check} (attack)", []).append(f)
    return list(groups.items())
