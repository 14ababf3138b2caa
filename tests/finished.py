"""Finished run directories, written from points alone: no training, no Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_task

from raysweep.auditing.objectives import Objectives
from raysweep.auditing.terms import Term
from raysweep.auditing.verdict import Verdict
from raysweep.config.reader import load
from raysweep.registry import FAMILIES
from raysweep.results import pareto
from raysweep.results.front import Front, write_front
from raysweep.results.front_row import FrontRow
from raysweep.results.picks import Picks
from raysweep.results.trials import Trial, save_trials, study_size
from raysweep.rundir import RunDir
from raysweep.storage.files import write_json
from raysweep.storage.schemas import ROWS, SCORES, write_table

KEYS = {"reconstruction.correlation": "audit.audit.noises", "damage": "audit.audit.samples"}
LIKE = Verdict(label="like the oracle", within=0.05, tested=9)
UNDECIDED = Verdict(label="undecided", by=("relearning 5 steps",), within=0.19, tested=9, draws=2.5)
REMEMBERS = Verdict(label="remembers", by=("no attack (+0.53)",), tested=9)
CONCEALED = Verdict(label="concealed", by=("relearning 5 steps (+0.30)",), tested=9)
DESTROYED = Verdict(label="destroyed", by=("10% of its samples are valid, 90% of the oracles'",), tested=9)


def row(trial: str, residue: float, damage: float, half: float = 0.02, **more: Any) -> FrontRow:
    """A candidate's or an anchor's row of the front. half: of its 95 % intervals."""
    kind = "anchor" if trial.startswith(("base", "oracle", "destroyed")) else "candidate"
    method = trial.partition("-")[2] if kind == "candidate" else ""
    common = {"trial": trial, "method": method, "kind": kind, "residue": residue, "damage": damage}
    for name, value in (("residue", residue), ("damage", damage)):
        common |= {f"{name}_lo": max(0.0, value - half), f"{name}_hi": value + half}
    common |= {"residue_upper": residue + half, "over_forgetting": 0.0}
    common |= {"views": {"reconstruction.correlation": residue}}
    if kind == "candidate":
        common |= {"probe_residue": residue, "probe_damage": damage, "on_front": True, "on_method_front": True}
        common |= {"p_dominated": 0.0, "audits": 1, "hyperparameters": {"steps": 8}}
    return FrontRow(**common | more)


def placed(residue: float, damage: float, half: float = 0.02) -> Objectives:
    """A model's place on the scales, with 95 % intervals of plus and minus `half`."""
    return Objectives(
        residue=residue,
        residue_se=half / 2,
        residue_lo=max(0.0, residue - half),
        residue_hi=residue + half,
        residue_upper=residue + half,
        damage=damage,
        damage_se=half / 2,
        damage_lo=max(0.0, damage - half),
        damage_hi=damage + half,
        over_forgetting=0.0,
        validity=1.0,
        views={"reconstruction.correlation": residue},
        uncut=np.array([residue, damage]),
        replicates=np.tile([residue, damage], (3, 1)),
        residue_mean=Term(residue, np.zeros(3), half / 2, np.zeros(3), 9),
    )


def trial(name: str, state: str = "COMPLETE", **more: Any) -> Trial:
    """A trial NUMBER-METHOD of the sweep."""
    number, _, method = name.partition("-")
    common = {"trial": name, "number": int(number), "method": method, "source": "", "state": state, "seed": 0}
    return Trial(**common | {"hyperparameters": {"steps": 8}} | more)


ANCHORS = [row("base", 1.0, 0.0), row("oracle-0", 0.0, 0.0), row("oracle-1", 0.02, 0.0), row("destroyed", 0.4, 1.0)]


def front(candidates: list[FrontRow], verdicts: dict[str, Verdict] | None = None, **more: Any) -> Front:
    """A front of these candidates and `ANCHORS`, with draws as wide as their intervals."""
    names = [r.trial for r in candidates]
    points = np.array([[r.residue, r.damage] for r in candidates]).reshape(-1, 2)
    ends = [[r.residue_hi - r.residue, r.damage_hi - r.damage] for r in candidates]
    errors = np.array(ends).reshape(-1, 2) / 2
    draws = points + errors * np.random.default_rng(0).normal(size=(500, *points.shape))
    picks = None
    if names:
        best = names[pareto.balanced(points)]
        sure = [r.trial for r in sorted(candidates, key=lambda r: r.damage) if r.residue_upper <= 0.1]
        picks = Picks(best, 1.0, best, 1.0, sure[0] if sure else None)
    front = Front(
        rows=[*candidates, *ANCHORS],
        candidates=names,
        p_dominates=np.zeros((len(names), len(names))),
        hypervolume=1.0,
        hypervolume_lo=0.9,
        hypervolume_hi=1.1,
        probe_hypervolume=1.0,
        draws=draws,
        valid=dict.fromkeys(names, (0.9, 0.9)),
        keys=KEYS,
        picks=picks,
        unmet={name: [] for name in names},
        verdicts=verdicts or {},
    )
    return replace(front, **more)


def run(
    folder: Path, of: Front | None, *overrides: str, sensitive: bool = False, family: str = "pixel-ddpm", **entries: Any
) -> RunDir:
    """A run directory with that front; without a front, an unfinished run. entries: of the manifest."""
    settings = (f"name={folder.name}", f"storage={folder.parent}", f"cache={folder.parent / 'cache'}")
    sweep = load(None, (*settings, "methods=[rgd, siss]", "search.trials=4", *overrides))
    home, task = RunDir.of(sweep), tiny_task("points")
    with home.claim(sweep, {"config": sweep.digest, "task": "t"}):
        home.task.mkdir(parents=True)
        task.save(home.task)
        plain = json.loads((home.task / "task.json").read_text())
        plain |= {"sensitive": sensitive, "family": family, "model_kind": FAMILIES[family].model_kind}
        write_json(home.task / "task.json", plain)
        home.update(**{"state": "done"} | entries)
    if of is None:
        return home
    keys = {name: f"{name}-audit-0" for name in ("base", "oracle-0")}
    of.audits = {"audit": keys}
    write_front(home, of, sweep)
    write_json(home.anchors("audit"), {"keys": keys, "views": []})
    trials = [trial(r.trial, method=r.method, digest=f"weights of {folder.name}") for r in of.candidate_rows]
    save_trials(home, trials, study_size(home))
    size = task.splits["forget"].x[0].numel()
    pictures = np.random.default_rng(1).uniform(-1, 1, (4, size)).tolist()
    for subject, key in keys.items():
        common = {"subject": subject, "tier": "audit", "shape": [size]}
        scores = [
            common | {"score": score, "unit": k, "values": picture}
            for score in ("strip.rebuilt", "strip.noised", "strip.samples")
            for k, picture in enumerate(pictures)
        ]
        write_table(home.rows / f"{key}.parquet", [], ROWS)
        write_table(home.scores / f"{key}.parquet", scores, SCORES)
    return home
