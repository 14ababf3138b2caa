"""From a run's tables to its answer: the trials, the audited front, paired differences, the recommendation. No Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna

from evaluators.statistics import jackknife_interval, jackknife_se, t_interval
from raysweep.audit.objectives import Measured, Objectives, Unmeasured, objectives
from raysweep.audit.power import Requirement, decided_by
from raysweep.audit.request import rows_path
from raysweep.audit.verdict import Verdict, verdict
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.registry import reach_of
from raysweep.results import pareto
from raysweep.results.choice import FORGOTTEN, Choice, choose
from raysweep.rundir import RunDir
from raysweep.search.searcher import open_study
from raysweep.storage.files import FRONT, ROWS, TRIALS, read_table, write_json, write_table
from raysweep.tasks.task import Task

RATE = 0.05  # of false discoveries over a sweep's candidates


def trial_table(folder: RunDir, name: str) -> list[dict[str, Any]]:
    """One row per trial of the study, in the order of the sweep."""
    if not folder.journal.is_file():
        return []
    rows = {}
    for t in open_study(folder.journal, name).get_trials(deepcopy=False):
        if "config" not in t.user_attrs:
            continue
        config = json.loads(t.user_attrs["config"])
        result = json.loads(t.user_attrs.get("result", "{}"))
        done = t.state == optuna.trial.TrialState.COMPLETE
        rows[config["place"]] = {
            "trial": config["trial"],
            "number": t.number,
            "method": config["method"],
            "source": config["source"],
            "state": t.state.name,
            "hyperparameters": json.dumps(config["hyperparameters"], sort_keys=True),
            "seed": config["seed"],
            "residue": t.values[0] if done else None,
            "damage": t.values[1] if done else None,
            **{k: result.get(k) for k in ("residue_se", "damage_se", "train_s", "audit_s")},
            "digest": result.get("digest", ""),
            "probe": result.get("probe", ""),
            "reason": t.user_attrs.get("reason", ""),
        }
    return [rows[place] for place in sorted(rows)]


def write_trials(folder: RunDir, name: str) -> list[dict[str, Any]]:
    """Brings trials.parquet up to date with the study."""
    rows = trial_table(folder, name)
    write_table(folder.trials, rows, TRIALS)
    return rows


def pick_for_audit(trials: Sequence[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """The candidates worth a full audit: each method's best and its front, the overall front first, at most `top`."""
    done = [t for t in trials if t["state"] == "COMPLETE"]
    if not done:
        return []
    order: dict[str, dict[str, Any]] = {}
    points = _points(done)
    overall = [done[i] for i in pareto.front(points, ("min", "min"))]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for t in done:
        by_method.setdefault(t["method"], []).append(t)
    best = [ts[pareto.balanced(_points(ts))] for ts in by_method.values()]
    fronts = [ts[i] for ts in by_method.values() for i in pareto.front(_points(ts), ("min", "min"))]
    worst = {t["trial"]: max(t["residue"], t["damage"]) for t in done}
    for group in (best, overall, fronts):
        for t in sorted(group, key=lambda t: worst[t["trial"]]):
            order.setdefault(t["trial"], t)
    return list(order.values())[: max(top, len(best))]


@dataclass
class Front:
    """The audited candidates and anchors.

    rows: as in store.FRONT; p_dominates[i, j]: i dominates j; draws: paired resamples (n, candidates, 2), not kept on disk.
    valid: candidate -> share of valid samples, its own and the oracles'; keys: see `choice.choose`.
    """

    rows: list[dict[str, Any]]
    candidates: list[str]
    p_dominates: np.ndarray
    hypervolume: float
    hypervolume_lo: float
    hypervolume_hi: float
    probe_hypervolume: float
    draws: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 2)))
    valid: dict[str, tuple[float, float]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)  # not surely on the front or off it, or rivals of such
    picks: dict[str, Any] = field(default_factory=dict)  # other ways to choose, and how stable each is
    unmet: dict[str, list[str]] = field(default_factory=dict)  # candidate -> requirements that its audit does not show
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)  # finalist -> why its attacks gave no verdict
    audits: dict[str, dict[str, str]] = field(default_factory=dict)  # tier -> subject -> key of the audit behind it all
    unplaced: list[str] = field(default_factory=list)  # audits that lack an objective, and why

    @property
    def choice(self) -> Choice:
        """The answer, by the verdicts as far as there are any."""
        rows = [r for r in self.rows if r["kind"] == "candidate"]
        mine = {n: v for n, v in self.verdicts.items() if n in self.candidates}
        oracles = [r["residue"] for r in self.rows if r["trial"].startswith("oracle") and r["kind"] == "anchor"]
        return choose(rows, self.draws, self.unmet, self.valid, mine, self.keys, max([FORGOTTEN, *oracles]), self.gaps)

    def finalists(self, count: int) -> list[str]:
        """The candidates to attack: first those that the audit alone would recommend, then the front, then the others, each
        by the larger of residue and damage."""
        against, rows = self.choice.against, [r for r in self.rows if r["kind"] == "candidate"]

        def rank(r: dict[str, Any]) -> tuple[bool, bool, float]:
            refused = bool(against[r["trial"]])
            return refused, refused and not r["on_front"], max(r["residue"], r["damage"])

        best = sorted(rows, key=rank)
        return [r["trial"] for r in best[:count]]


def judged_by_attacks(
    folder: RunDir, context: Context, audits: dict[str, str], attacks: dict[str, str]
) -> dict[str, Verdict]:
    """Verdicts by subject. audits, attacks: subject -> key of its audit in the full and in the durability tier."""
    return {
        name: verdict_of(folder, name, {"audit": audits[name], "durability": attacks[name]}, context)
        for name in attacks
        if name in audits
    }


def verdict_of(folder: RunDir, name: str, keys: dict[str, str], context: Context) -> Verdict:
    """The verdict on one subject. keys: "audit" and "durability" -> key of its audit in that tier."""
    anchors, _ = context.load_anchors("audit")
    own = load_measured(folder.path, keys["audit"]).values
    rows = read_table(rows_path(folder.path, keys["durability"]), ROWS).to_pylist()
    reach = {check: reach_of(check) for check in {r["check"] for r in rows}}
    oracle = float(np.mean([o.values[context.validity] for o in anchors.oracles]))
    return verdict(rows, reach, own[context.validity], oracle)


def _unmet(folder: RunDir, key: str, required: Sequence[Requirement]) -> list[str]:
    rows = {f"{r['check']}.{r['metric']}": r for r in read_table(rows_path(folder.path, key), ROWS).to_pylist()}
    ends = {r.metric: (rows[r.metric]["lo"], rows[r.metric]["hi"]) for r in required if r.metric in rows}
    return [str(r) for r in required if not r.met(*ends.get(r.metric, (None, None)))]


def audited_front(
    folder: RunDir,
    context: Context,
    task: Task,
    rounds: Sequence[dict[str, str]],
    trials: list[dict],
    required: Sequence[Requirement] = (),
) -> Front:
    """The front of the audited candidates. rounds: for each round of audits, trial -> key of its audit in it."""
    anchors, views = context.load_anchors("audit")
    by_trial = {t["trial"]: t for t in trials}
    keys = rounds[0]
    places, audits, unplaced = _places(folder, context, task, rounds)
    names = list(places)
    points = np.array([[places[n].residue, places[n].damage] for n in names]).reshape(-1, 2)
    on_front = {names[i] for i in pareto.front(points, ("min", "min"))} if names else set()
    own = {
        names[mine[i]]
        for method in {by_trial[n]["method"] for n in names}
        for mine in [[k for k, n in enumerate(names) if by_trial[n]["method"] == method]]
        for i in pareto.front(points[mine], ("min", "min"))
    }
    unmet = {n: _unmet(folder, keys[n], required) for n in names}
    draws = np.empty((0, 0, 2))
    p_dominates, p_dominated = np.zeros((0, 0)), np.zeros(0)
    low, high, again = 0.0, 0.0, []
    picks: dict[str, Any] = {}
    if names:
        draws = pareto.resample(points, np.stack([places[n].replicates for n in names]))
        p_dominates, p_dominated = pareto.dominance_probability(draws), pareto.dominated_probability(draws)
        again = [names[i] for i in pareto.undecided(draws)]
        picks = _picks(names, points, draws, [places[n].residue_se for n in names])
        low, high = pareto.hypervolume_interval(points, np.stack([places[n].replicates for n in names]))
    rows = []
    for k, n in enumerate(names):
        t, place = by_trial[n], places[n]
        rows.append(
            _front_row(n, t["method"], "candidate", place)
            | {
                "probe_residue": t["residue"],
                "probe_damage": t["damage"],
                "on_front": n in on_front,
                "on_method_front": n in own,
                "p_dominated": float(p_dominated[k]),
                "audits": audits[n],
                "hyperparameters": t["hyperparameters"],
            }
        )
    for name, measured in {"base": anchors.base, **_oracles(anchors), "destroyed": anchors.destroyed}.items():
        rows.append(_front_row(name, "", "anchor", objectives(measured, anchors, views, task.quality, task.validity)))
    probe = [t for t in trials if t["state"] == "COMPLETE"]
    valid = float(np.mean([o.values[context.validity] for o in anchors.oracles]))
    return Front(
        rows=rows, candidates=names, p_dominates=p_dominates, hypervolume=pareto.hypervolume(points),
        hypervolume_lo=low, hypervolume_hi=high, probe_hypervolume=pareto.hypervolume(_points(probe)),
        draws=draws, valid={n: (places[n].validity, valid) for n in names}, keys=_keys(task), unmet=unmet, undecided=again,
        picks=picks, unplaced=unplaced,
    )  # fmt: skip


def _keys(task: Task) -> dict[str, str]:
    """Metric of a view, or "damage", -> setting whose samples decide it."""
    return {m: decided_by(m, task.kind) for m in task.views} | {"damage": decided_by(task.quality, task.kind)}


def _places(
    folder: RunDir, context: Context, task: Task, rounds: Sequence[dict[str, str]]
) -> tuple[dict[str, Objectives], dict[str, int], list[str]]:
    """Each candidate's place, the mean over its rounds, and their number; and which audits lack an objective.

    Every round has anchors on its own seeds.
    """
    found: dict[str, dict[int, Objectives]] = {}
    unplaced = []
    for number, keys in enumerate(rounds, 1):
        anchors, views = context.load_anchors("audit" if number == 1 else f"audit-{number}")
        for trial, key in keys.items():
            measured = load_measured(folder.path, key)
            try:
                place = objectives(measured, anchors, views, task.quality, task.validity)
            except Unmeasured as error:
                unplaced.append(f"{trial}: audit {number}: {error}")
                continue
            found.setdefault(trial, {})[number] = place
    places = {}
    for trial, parts in found.items():
        first = next(iter(parts.values()))
        values = np.full((len(rounds), 2), np.nan)
        replicates = np.zeros((len(rounds), *first.replicates.shape))
        for number, part in parts.items():
            values[number - 1], replicates[number - 1] = (part.residue, part.damage), part.replicates
        (residue, damage), all_parts = pareto.pooled(values, replicates)
        shared = {view for view in first.views if all(view in p.views for p in parts.values())}
        places[trial] = Objectives(
            residue=float(residue), damage=float(damage), residue_se=jackknife_se(all_parts[:, 0]),
            damage_se=jackknife_se(all_parts[:, 1]),
            over_forgetting=float(np.mean([p.over_forgetting for p in parts.values()])),
            validity=float(np.mean([p.validity for p in parts.values()])),
            views={v: float(np.mean([p.views[v] for p in parts.values()])) for v in first.views if v in shared},
            replicates=all_parts,
        )  # fmt: skip
    return places, {trial: len(parts) for trial, parts in found.items()}, unplaced


def _picks(names: list[str], points: np.ndarray, draws: np.ndarray, residue_se: list[float]) -> dict[str, Any]:
    """Ways to choose among the candidates: by the worse objective, at the knee, and the least damage where forgetting is
    sure. `share`: in how many paired resamples the same candidate is chosen. `forgotten`: candidates whose residue is shown
    to be under `limit`, with control of false discoveries over the sweep's candidates."""
    from scipy import stats

    balanced, knee = pareto.balanced(points), pareto.knee(points)
    sure = pareto.within(points, draws, FORGOTTEN)
    p = [
        float(stats.norm.cdf((points[k, 0] - FORGOTTEN) / se)) if se > 0 else float(points[k, 0] >= FORGOTTEN)
        for k, se in enumerate(residue_se)
    ]
    q = stats.false_discovery_control(p)
    return {
        "balanced": {
            "trial": names[balanced],
            "share": float(np.mean([pareto.balanced(d) == balanced for d in draws])),
        },
        "knee": {"trial": names[knee], "share": float(np.mean([pareto.knee(d) == knee for d in draws]))},
        "sure": {"trial": None if sure is None else names[sure], "limit": FORGOTTEN, "certain": 0.95},
        "forgotten": {
            "trials": [n for n, v in zip(names, q, strict=True) if v < RATE],
            "limit": FORGOTTEN,
            "rate": RATE,
        },
    }


def search_against_audit(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the search's view of the audited candidates compares with the audit's: by objective the mean of audit minus probe
    (positive: the search flattered its choices, the winner's curse), its 95 % interval, and Spearman's rank correlation."""
    from scipy import stats

    found: dict[str, Any] = {}
    candidates = [r for r in rows if r["kind"] == "candidate"]
    for objective in ("residue", "damage"):
        probe = np.array([r[f"probe_{objective}"] for r in candidates], dtype=float)
        audit = np.array([r[objective] for r in candidates], dtype=float)
        entry: dict[str, Any] = {"n": len(candidates), "gap": None, "lo": None, "hi": None, "rank_correlation": None}
        if len(candidates) > 1:
            _, low, high = t_interval(audit - probe)
            entry |= {"gap": float(np.mean(audit - probe)), "lo": low, "hi": high}
        if len(candidates) > 2 and np.ptp(probe) > 0 and np.ptp(audit) > 0:
            entry["rank_correlation"] = float(stats.spearmanr(probe, audit).statistic)
        found[objective] = entry
    return found


def write_front(folder: RunDir, front: Front, sweep: Sweep) -> None:
    """Writes front.json and front.parquet."""
    said, choice = {name: v.label for name, v in front.verdicts.items()}, front.choice
    write_table(folder.front_table, [r | {"verdict": said.get(r["trial"], "")} for r in front.rows], FRONT)
    write_json(
        folder.front_json,
        {
            "run": sweep.name,
            "config_digest": sweep.digest,
            "objectives": {"residue": "min", "damage": "min"},
            "reference_point": list(pareto.REFERENCE),
            "hypervolume": {"value": front.hypervolume, "lo": front.hypervolume_lo, "hi": front.hypervolume_hi},
            "probe_hypervolume": front.probe_hypervolume,
            "recommended": {
                "trial": choice.recommended,
                "share_of_resamples": choice.share,
                "reservations": list(choice.reservations),
            },
            "best": {"trial": choice.trial, "try_next": list(choice.steps)},
            "standing": {name: choice.standing(name) for name in front.candidates},
            "against": {name: list(reasons) for name, reasons in choice.against.items()},
            "answer": choice.answer([r for r in front.rows if r["kind"] == "candidate"], front.verdicts),
            "candidates": front.candidates,
            "audits": front.audits,
            "unmet": front.unmet,
            "undecided": front.undecided,
            "picks": front.picks,
            "search_against_audit": search_against_audit(front.rows),
            "attacks_without_verdict": front.gaps,
            "verdicts": {name: v.plain() | {"sentence": v.sentence()} for name, v in front.verdicts.items()},
            "p_dominates": front.p_dominates.tolist(),
            "points": [
                {k: json.loads(v) if k in ("views", "hyperparameters") and v else v for k, v in row.items()}
                for row in front.rows
            ],
        },
    )


def write_paired(folder: RunDir, context: Context, subjects: dict[str, str], methods: dict[str, str]) -> None:
    """Writes, for every audited subject, each metric's difference to the base and to the oracles' mean.

    The same seeds and images served all subjects, so groups of units are left out of both at once and what they share
    cancels. subjects: name -> key of its audit.
    """
    anchors, _ = context.load_anchors("audit")
    for subject, key in subjects.items():
        measured, rows = load_measured(folder.path, key), []
        references = {"base": [anchors.base], "oracle": list(anchors.oracles)}
        for reference, models in references.items():
            for metric, value in measured.values.items():
                if all(metric in m.values for m in models):
                    rows.append(
                        _difference(subject, methods.get(subject, ""), reference, metric, value, measured, models)
                    )
        write_table(folder.rows / f"paired-{key}.parquet", rows, ROWS)


def _difference(
    subject: str, method: str, reference: str, metric: str, value: float, measured: Measured, models: list[Measured]
) -> dict[str, Any]:
    delta = value - float(np.mean([m.values[metric] for m in models]))
    parts = measured.replicates[metric] - np.mean([m.replicates[metric] for m in models], axis=0)
    se = lo = hi = None
    if np.ptp(parts) > 0:  # else there are fewer units than groups, or all are alike: an error of 0 would be a lie
        se, lo, hi = jackknife_interval(delta, parts)
    check, name = metric.split(".", 1)  # a strength, as in weight_noise.presence@0.02, has a dot of its own
    return {
        "subject": subject, "method": method, "tier": "audit", "check": check, "metric": name,
        "paired_with": reference, "value": delta, "n": len(parts), "se": se, "lo": lo, "hi": hi, "level": 0.95,
        "interval": "paired jackknife", "direction": "target", "status": "ok",
        "reason": "" if se is not None else "no interval: leaving groups of units out does not change it",
        "replicates": parts.tolist(),
    }  # fmt: skip


def _front_row(name: str, method: str, kind: str, place: Objectives) -> dict[str, Any]:
    return {
        "trial": name,
        "method": method,
        "kind": kind,
        "residue": place.residue,
        "residue_se": place.residue_se,
        "damage": place.damage,
        "damage_se": place.damage_se,
        "over_forgetting": place.over_forgetting,
        "views": json.dumps(place.views),
    }


def _oracles(anchors: Any) -> dict[str, Measured]:
    return {f"oracle-{k}": o for k, o in enumerate(anchors.oracles)}


def _points(trials: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([[_number(t["residue"]), _number(t["damage"])] for t in trials]).reshape(-1, 2)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
