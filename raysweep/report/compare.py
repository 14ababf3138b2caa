"""Several results side by side: audit cards of models, or sweeps that differ in their seeds. No Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.statistics import t_interval
from raysweep.auditing import card
from raysweep.config.schema import ConfigError, Sweep
from raysweep.report.tables import TableLine
from raysweep.results import pareto
from raysweep.results.front_row import read_front
from raysweep.results.trials import read_trials
from raysweep.rundir import RunDir
from raysweep.storage.files import digest_of, write_bytes

SHARES = (0.25, 0.5, 0.75)  # of sweeps, for the attainment bands
SAME = {
    "folder": "is the same run as {other}: name each run once",
    "results": "holds the same results as {other} (digest {digest}): it is a copy, and a copy adds no evidence",
    "weights": "holds the same candidates as {other} (digest of their weights {digest}): it adds no evidence about methods",
    "seeds": "has the settings and seeds of {other} (digest {digest}): it repeats that run; give each sweep its own search.seed",
}


def is_card(path: Path) -> bool:
    """Whether a path is an audit card, by its folder or its file."""
    return (path / card.CARD).is_file() or path.name == card.CARD


@dataclass(frozen=True)
class CardAnswer:
    """The answer of one card, in sentences."""

    subject: str
    lines: list[str]


@dataclass(frozen=True)
class CardsTable:
    """Cards side by side. warnings: why their numbers do not compare. rows: one cell per card."""

    subjects: list[str]
    digests: list[str]
    answers: list[CardAnswer]
    warnings: list[str]
    rows: list[TableLine]


def cards_table(paths: Sequence[Path]) -> CardsTable:
    """Cards side by side. A cell is "value [lower, upper end of the 95 % interval]"; "-" where a card lacks the metric.

    Raises ConfigError if two of them are one card, or copies of one.
    """
    cards = [card.read(path) for path in paths]
    refuse_card_copies(paths, cards)
    by_card = [{(f.tier, f.check, f.metric): f for f in c.findings} for c in cards]
    metrics = [
        TableLine(
            f"{check}.{metric}" + (" (attack)" if tier == "durability" else ""),
            [_cell(findings.get((tier, check, metric))) for findings in by_card],
        )
        for tier, check, metric in dict.fromkeys(key for findings in by_card for key in findings)
    ]
    objectives = [
        TableLine(key + suffix, [f"{getattr(c.objectives, key):.3f}" for c in cards])
        for name in ("residue", "damage")
        for key, suffix in ((name, ""), (f"{name}_se", " (standard error)"))
    ]
    return CardsTable(
        subjects=[c.subject for c in cards],
        digests=[c.digest for c in cards],
        answers=[CardAnswer(c.subject, list(c.answer)) for c in cards],
        warnings=_incomparable(cards),
        rows=[
            *objectives,
            TableLine("under attack", [c.verdict.label for c in cards]),
            TableLine("seeds", [", ".join(f"{name} {tier['seed']}" for name, tier in c.tiers.items()) for c in cards]),
            TableLine("commit", [c.code.commit[:12] for c in cards]),
            *metrics,
        ],
    )


def _incomparable(cards: Sequence[card.Card]) -> list[str]:
    """A warning for everything that must be equal in cards to compare their numbers, and is not."""
    parts = {
        "tasks": [c.task.digest for c in cards],
        "judges": [c.judge_digest for c in cards],
        "settings or seeds of the audit": [json.dumps(c.tiers, sort_keys=True) for c in cards],
        "code of the checks": [c.code.audit for c in cards],
        "bases": [c.models["base"].digest for c in cards],
    }
    differing = [part for part, values in parts.items() if len(set(values)) > 1]
    return [f"The cards differ in the {part}: their numbers do not compare." for part in differing]


@dataclass(frozen=True)
class SweepOrigin:
    """The origin of one column of a comparison."""

    run: str
    path: str
    seeds: str
    commit: str
    config: str
    started: str
    state: str
    answer: str


@dataclass(frozen=True)
class RunsTable:
    """Sweeps side by side.

    runs: their names; best: the method with the largest mean hypervolume; differences: settings and versions besides seeds
    that are not the same everywhere; rows: per method the mean hypervolume, how much `best` exceeds it, and each run's;
    bands: method -> share of sweeps -> corners (m, 2) of the region that they attain.
    """

    runs: list[str]
    best: str
    differences: list[str]
    sweeps: list[SweepOrigin]
    rows: list[TableLine]
    bands: dict[str, dict[float, np.ndarray]]


def runs_table(folders: Sequence[RunDir]) -> RunsTable:
    """Sweeps of the same task and methods side by side: hypervolumes by method, paired by run, and attainment bands.

    Raises ConfigError if they do not compare, or if two of them are one run, a copy of it, or a repetition of its seeds.
    """
    sweeps = [folder.sweep() for folder in folders]
    manifests = [folder.read_manifest() for folder in folders]
    for folder in folders:
        if not folder.front_json.is_file():
            raise ConfigError(f"{folder.path}: has no front yet; finish the run first")
    refuse_run_copies(folders, sweeps)
    _refuse_incomparable(folders, sweeps, manifests)
    by_method = _points_by_method(folders, sweeps[0].methods)
    volumes = {method: np.array([pareto.hypervolume(s) for s in sets]) for method, sets in by_method.items()}
    best = max(volumes, key=lambda method: volumes[method].mean())
    rows = []
    for method, values in sorted(volumes.items(), key=lambda item: -item[1].mean()):
        difference = "-" if method == best else _mean(volumes[best] - values)
        rows.append(TableLine(method, [_mean(values), difference, *(f"{v:.3f}" for v in values)]))
    overall = np.array([pareto.hypervolume(np.concatenate(sets)) for sets in zip(*by_method.values(), strict=True)])
    rows.append(TableLine("all methods", [_mean(overall), "", *(f"{v:.3f}" for v in overall)]))
    differences = _differences(sweeps) | _differences_of_code(manifests)
    return RunsTable(
        runs=_labels(folders),
        best=best,
        differences=[f"{key}: {', '.join(values)}" for key, values in differences.items()],
        sweeps=[_origin(*run) for run in zip(_labels(folders), folders, manifests, strict=True)],
        rows=rows,
        bands={
            method: {share: pareto.attainment(sets, share) for share in SHARES}
            for method, sets in by_method.items()
            if any(len(s) for s in sets)
        },
    )


def _points_by_method(folders: Sequence[RunDir], methods: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Method -> for each run, (residue, damage) of its audited candidates (n, 2)."""
    runs = [[row for row in read_front(folder) if row.is_candidate] for folder in folders]
    return {
        method: [np.array([[r.residue, r.damage] for r in run if r.method == method]).reshape(-1, 2) for run in runs]
        for method in methods
    }


def _refuse_incomparable(
    folders: Sequence[RunDir], sweeps: Sequence[Sweep], manifests: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ConfigError if a run's task, methods or number of trials are not those of the first."""
    keys = [
        {"task": manifest["digests"]["task"], "methods": sorted(sweep.methods), "trials": sweep.search.trials}
        for sweep, manifest in zip(sweeps, manifests, strict=True)
    ]
    for folder, key in zip(folders, keys, strict=True):
        for part, expected in keys[0].items():
            if key[part] != expected:
                raise ConfigError(f"{folder.path}: another {part} than {folders[0].path}: the two do not compare")


def refuse_run_copies(folders: Sequence[RunDir], sweeps: Sequence[Sweep]) -> None:
    """Raises ConfigError if two runs are not independent: one folder, equal results or weights, or equal seeds.

    An average over copies of one run has too narrow an interval, also if the copies have other names.
    """
    seen: dict[tuple[str, str], int] = {}
    for k, (folder, sweep) in enumerate(zip(folders, sweeps, strict=True)):
        for kind, digest in _identities(folder, sweep).items():
            first = seen.setdefault((kind, digest), k)
            if first != k:
                same = SAME[kind].format(other=folders[first].path, digest=digest)
                raise ConfigError(f"--compare: {folder.path} {same}")


def _identities(folder: RunDir, sweep: Sweep) -> dict[str, str]:
    """Digests that two independent runs cannot share, by kind of identity. They do not depend on names and paths."""
    rows = [row.stored() for row in read_front(folder) if row.is_candidate]
    results = [[row[key] for key in ("method", "hyperparameters", "residue", "damage")] for row in rows]
    weights = sorted(t.digest for t in read_trials(folder) if t.digest)
    identities = {"folder": str(folder.path.resolve())}
    if results:
        identities["results"] = digest_of(sorted(results))
    if weights:
        identities["weights"] = digest_of(weights)
    return identities | {"seeds": sweep.digest}


def refuse_card_copies(paths: Sequence[Path], cards: Sequence[card.Card]) -> None:
    """Raises ConfigError if two cards are one, or copies of one."""
    seen: dict[str, int] = {}
    for k, content in enumerate(cards):
        digest = content.content_digest
        first = seen.setdefault(digest, k)
        if first != k:
            raise ConfigError(f"{paths[k]} and {paths[first]} are the same card (digest {digest}): name each card once")


def _labels(folders: Sequence[RunDir]) -> list[str]:
    """Names of runs, or their paths if two have the same name."""
    names = [folder.path.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]


def _origin(label: str, folder: RunDir, manifest: Mapping[str, Any]) -> SweepOrigin:
    front = json.loads(folder.front_json.read_text())
    seeds = {key: value for key, value in _flat(folder.in_force().resolved()).items() if key.endswith("seed")}
    return SweepOrigin(
        run=label,
        path=str(folder.path),
        seeds=", ".join(f"{key} {value}" for key, value in seeds.items()),
        commit=manifest["commit"],
        config=manifest["config_digest"],
        started=manifest["created_at"],
        state=manifest["state"],
        answer=front.get("answer", ["-"])[0],
    )


def write(paths: Sequence[Path], folders: Sequence[RunDir], out: Path) -> Path:
    """Writes the comparison of cards, or of runs if there are no cards, as one HTML page."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from raysweep.report.figures import attainment
    from raysweep.report.page import embed, environment

    context: dict[str, Any] = {"cards": None, "runs": None, "figure": "", "plotly": "", "reference": pareto.REFERENCE}
    if paths:
        context["cards"] = cards_table(paths)
    else:
        runs = runs_table(folders)
        context |= {"runs": runs, "figure": embed(attainment(runs.bands)), "plotly": Markup(get_plotlyjs())}
    write_bytes(out, environment().get_template("compare.html.j2").render(context).encode())
    return out


def _cell(finding: card.Finding | None) -> str:
    if finding is None:
        return "-"
    if finding.status != "ok":
        return finding.status
    interval = "" if finding.lo is None else f" [{finding.lo:.3g}, {finding.hi:.3g}]"
    return f"{finding.value:.3g}{interval}"


def _mean(values: np.ndarray) -> str:
    """The mean with its 95 % interval in brackets, if the values differ."""
    if len(values) < 2 or np.ptp(values) == 0:
        return f"{values.mean():.3f}"
    _, low, high = t_interval(values)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def _differences_of_code(manifests: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Commits and versions that are not the same everywhere: key -> value of each run."""
    flat = [
        {"commit": ", resumed at ".join(manifest.get("commits", [manifest["commit"]]))}
        | {f"version of {name}": version for name, version in manifest["versions"].items()}
        for manifest in manifests
    ]
    return _differing(flat, list(dict.fromkeys(key for values in flat for key in values)))


def _differences(sweeps: Sequence[Sweep]) -> dict[str, list[str]]:
    """Settings, except seeds and what no result depends on, that are not the same everywhere: key -> value of each run."""
    flat = [_flat(sweep.decisive()) for sweep in sweeps]
    return _differing(flat, sorted({key for values in flat for key in values if not key.endswith("seed")}))


def _differing(flat: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[str]]:
    columns = {key: [str(values.get(key)) for values in flat] for key in keys}
    return {key: column for key, column in columns.items() if len(set(column)) > 1}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "outer.inner" -> value."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
