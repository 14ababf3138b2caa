"""Several results side by side: audit cards of models, or sweeps that differ in their seed. No Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.statistics import t_interval
from raysweep.audit import card
from raysweep.config.schema import ConfigError, Sweep
from raysweep.results import pareto
from raysweep.results.front_row import read_front
from raysweep.results.trials import read_trials
from raysweep.rundir import RunDir
from raysweep.storage.files import digest_of, write_bytes

SHARES = (0.25, 0.5, 0.75)


def is_card(path: Path) -> bool:
    """Whether a path is an audit card, by its folder or its file."""
    return (path / card.CARD).is_file() or path.name == card.CARD


def cards_table(paths: Sequence[Path]) -> dict[str, Any]:
    """Cards side by side: `subjects`, `answers`, `warnings`, and `rows` of {"name", "cells"}.

    A cell is "value [low, high]"; a metric that only some cards have is "-" in the others.
    """
    found = [card.read(path) for path in paths]
    refuse_card_copies(paths, found)
    warnings = []
    for what, value in (
        ("tasks", lambda c: c["task"]["digest"]),
        ("judges", lambda c: c["judge_digest"]),
        ("settings or seeds of the audit", lambda c: json.dumps(c["tiers"], sort_keys=True)),
        ("code of the checks", lambda c: c["code"]["audit"]),
        ("bases", lambda c: c["models"]["base"]["digest"]),
    ):
        if len({value(c) for c in found}) > 1:
            warnings.append(f"The cards differ in the {what}: their numbers do not compare.")
    names = dict.fromkeys((f["tier"], f["check"], f["metric"]) for c in found for f in c["findings"])
    by_card = [{(f["tier"], f["check"], f["metric"]): f for f in c["findings"]} for c in found]
    rows = []
    for tier, check, metric in names:
        title = f"{check}.{metric}" + (" (attack)" if tier == "durability" else "")
        rows.append({"name": title, "cells": [_cell(findings.get((tier, check, metric))) for findings in by_card]})
    objectives = [
        {"name": key + (" (standard error)" if k else ""), "cells": [f"{c['objectives'][key]:.3f}" for c in found]}
        for name in ("residue", "damage")
        for k, key in enumerate((name, f"{name}_se"))
    ]
    verdict = {"name": "under attack", "cells": [c["verdict"]["label"] for c in found]}
    seeds = [", ".join(f"{name} {tier['seed']}" for name, tier in c["tiers"].items()) for c in found]
    origin = [
        {"name": "seeds", "cells": seeds},
        {"name": "commit", "cells": [c["code"]["commit"][:12] for c in found]},
    ]
    return {
        "subjects": [c["subject"] for c in found],
        "digests": [c["digest"] for c in found],
        "answers": [{"subject": c["subject"], "lines": c["answer"]} for c in found],
        "warnings": warnings,
        "rows": [*objectives, verdict, *origin, *rows],
    }


def runs_table(folders: Sequence[RunDir]) -> dict[str, Any]:
    """Sweeps of the same task and methods side by side: hypervolumes by method, paired by run, and attainment bands.

    Raises ConfigError if they do not compare, or if two of them are one run, a copy of it, or a repetition of its seeds.
    """
    sweeps = [f.sweep() for f in folders]
    manifests = [f.read_manifest() for f in folders]
    for folder in folders:
        if not folder.front_json.is_file():
            raise ConfigError(f"{folder.path}: has no front yet; finish the run first")
    refuse_run_copies(folders, sweeps)
    first = sweeps[0]
    for folder, sweep, manifest in zip(folders[1:], sweeps[1:], manifests[1:], strict=True):
        for what, own, other in (
            ("task", manifest["digests"]["task"], manifests[0]["digests"]["task"]),
            ("methods", sorted(sweep.methods), sorted(first.methods)),
            ("trials", sweep.search.trials, first.search.trials),
        ):
            if own != other:
                raise ConfigError(f"{folder.path}: another {what} than {folders[0].path}: the two do not compare")
    points = [[p for p in read_front(f) if p.is_candidate] for f in folders]
    by_method = {
        method: [np.array([[p.residue, p.damage] for p in run if p.method == method]).reshape(-1, 2) for run in points]
        for method in first.methods
    }
    volumes = {method: np.array([pareto.hypervolume(s) for s in sets]) for method, sets in by_method.items()}
    best = max(volumes, key=lambda m: volumes[m].mean())
    rows = []
    for method, values in sorted(volumes.items(), key=lambda item: -item[1].mean()):
        difference = "-" if method == best else _mean(volumes[best] - values)
        rows.append({"name": method, "cells": [_mean(values), difference, *(f"{v:.3f}" for v in values)]})
    overall = np.array(
        [pareto.hypervolume(np.concatenate([by_method[m][k] for m in by_method])) for k in range(len(folders))]
    )
    rows.append({"name": "all methods", "cells": [_mean(overall), "", *(f"{v:.3f}" for v in overall)]})
    differences = _differences(sweeps) | _differences_of_code(manifests)
    return {
        "runs": _labels(folders),
        "best": best,
        "differences": [f"{key}: {', '.join(values)}" for key, values in differences.items()],
        "sweeps": [_origin(*of) for of in zip(_labels(folders), folders, sweeps, manifests, strict=True)],
        "rows": rows,
        "bands": {
            method: {share: pareto.attainment(sets, share) for share in SHARES}
            for method, sets in by_method.items()
            if any(len(s) for s in sets)
        },
    }


def refuse_run_copies(folders: Sequence[RunDir], sweeps: Sequence[Sweep]) -> None:
    """Raises ConfigError if two runs are not independent: one folder, equal results or weights, or equal seeds.

    An average over copies of one run has an interval that is too narrow, whatever the copies are called.
    """
    seen: dict[tuple[str, str], int] = {}
    for k, (folder, sweep) in enumerate(zip(folders, sweeps, strict=True)):
        for what, digest in _identities(folder, sweep).items():
            first = seen.setdefault((what, digest), k)
            if first != k:
                same = SAME[what].format(other=folders[first].path, digest=digest)
                raise ConfigError(f"--compare: {folder.path} {same}")


SAME = {
    "folder": "is the same run as {other}: name each run once",
    "results": "holds the same results as {other} (digest {digest}): it is a copy, and a copy adds no evidence",
    "weights": "holds the same candidates as {other} (digest of their weights {digest}): it adds no evidence about methods",
    "seeds": "has the settings and seeds of {other} (digest {digest}): it repeats that run; give each sweep its own search.seed",
}


def _identities(folder: RunDir, sweep: Sweep) -> dict[str, str]:
    """What two independent runs cannot share: kind of identity -> digest. Names and places have no part in them."""
    points = [p.stored() for p in read_front(folder) if p.is_candidate]
    results = [[p[k] for k in ("method", "hyperparameters", "residue", "damage")] for p in points]
    found = {"folder": str(folder.path.resolve())}
    if results:
        found["results"] = digest_of(sorted(results))
    weights = sorted(t.digest for t in read_trials(folder) if t.digest)
    if weights:
        found["weights"] = digest_of(weights)
    return found | {"seeds": sweep.digest}


def refuse_card_copies(paths: Sequence[Path], cards: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError if two cards are one, or copies of one."""
    seen: dict[str, int] = {}
    for k, content in enumerate(cards):
        digest = digest_of({key: value for key, value in content.items() if key != "digest"})
        first = seen.setdefault(digest, k)
        if first != k:
            raise ConfigError(f"{paths[k]} and {paths[first]} are the same card (digest {digest}): name each card once")


def _labels(folders: Sequence[RunDir]) -> list[str]:
    """Names of runs, or their paths where two have the same name."""
    names = [f.path.name for f in folders]
    return names if len(set(names)) == len(names) else [str(f.path) for f in folders]


def _origin(label: str, folder: RunDir, sweep: Sweep, manifest: dict[str, Any]) -> dict[str, str]:
    """Where a column of the comparison comes from."""
    front = json.loads(folder.front_json.read_text())
    seeds = {key: value for key, value in _flat(sweep.resolved()).items() if key.endswith("seed")}
    return {
        "run": label,
        "path": str(folder.path),
        "seeds": ", ".join(f"{key} {value}" for key, value in seeds.items()),
        "commit": manifest["commit"],
        "config": manifest["config_digest"],
        "started": manifest["created_at"],
        "state": manifest["state"],
        "answer": front.get("answer", ["-"])[0],
    }


def write(paths: Sequence[Path], folders: Sequence[RunDir], out: Path) -> Path:
    """Writes the comparison of cards, or of runs if there are no cards, as one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("raysweep.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    context: dict[str, Any] = {"cards": None, "runs": None, "figure": "", "plotly": ""}
    if paths:
        context["cards"] = cards_table(paths)
    else:
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs

        from raysweep.report.figures import attainment
        from raysweep.report.page import embed

        context["runs"] = runs_table(folders)
        context |= {"figure": embed(attainment(context["runs"]["bands"])), "plotly": Markup(get_plotlyjs())}
    write_bytes(out, environment.get_template("compare.html.j2").render(context).encode())
    return out


def _cell(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return "-"
    if finding["status"] != "ok":
        return finding["status"]
    interval = "" if finding["lo"] is None else f" [{finding['lo']:.3g}, {finding['hi']:.3g}]"
    return f"{finding['value']:.3g}{interval}"


def _mean(values: np.ndarray) -> str:
    if len(values) < 2 or np.ptp(values) == 0:
        return f"{values.mean():.3f}"
    _, low, high = t_interval(values)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def _differences_of_code(manifests: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Commits and versions that are not the same everywhere."""
    flat = [
        {"commit": ", resumed at ".join(m.get("commits", [m["commit"]]))}
        | {f"version of {name}": v for name, v in m["versions"].items()}
        for m in manifests
    ]
    keys = dict.fromkeys(k for f in flat for k in f)
    return {key: values for key in keys if len(set(values := [str(f.get(key)) for f in flat])) > 1}


def _differences(sweeps: Sequence[Sweep]) -> dict[str, list[str]]:
    """Settings, besides seeds and what no result depends on, that are not the same everywhere."""
    flat = [_flat(s.decisive()) for s in sweeps]
    keys = sorted({k for f in flat for k in f})
    return {
        key: [str(f.get(key)) for f in flat]
        for key in keys
        if not key.endswith("seed") and len({str(f.get(key)) for f in flat}) > 1
    }


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
