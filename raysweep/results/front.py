"""From a run's tables to its answer: the audited front, verdicts, the recommendation. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from evaluators.statistics import t_interval
from raysweep.auditing.anchors import Anchors, Unmeasured, View
from raysweep.auditing.objectives import Objectives, mean_objectives, noise_floor, objectives
from raysweep.auditing.power import Requirement, decided_by
from raysweep.auditing.request import rows_path
from raysweep.auditing.verdict import Verdict, verdict
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.registry import reach_of
from raysweep.results import pareto
from raysweep.results.choice import FORGOTTEN, Choice, choose
from raysweep.results.front_row import OBJECTIVES, FrontRow, Objective
from raysweep.results.picks import Picks, pick
from raysweep.results.trials import Trial, points_of
from raysweep.rundir import RunDir
from raysweep.storage.files import write_json
from raysweep.storage.schemas import FRONT, ROWS, read_table, write_table
from raysweep.tasks.task import Task


@dataclass
class Front:
    """The audited candidates and anchors.

    rows: candidates, then anchors; p_dominates[i, j]: probability that candidate i dominates j; draws: paired resamples
    (n, candidates, 2), not kept on disk. valid: candidate -> (share of its samples that are valid, the oracles' share).
    keys: see `choice.choose`.
    """

    rows: list[FrontRow]
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
    picks: Picks | None = None  # other ways to choose; None without candidates
    unmet: dict[str, list[str]] = field(default_factory=dict)  # candidate -> requirements that its audit does not show
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)  # finalist -> why its attacks gave no verdict
    audits: dict[str, dict[str, str]] = field(default_factory=dict)  # tier -> subject -> key of the audit behind it all
    unplaced: list[str] = field(default_factory=list)  # audits that lack an objective, and why

    @property
    def candidate_rows(self) -> list[FrontRow]:
        """The rows of the candidates, in the order of `candidates`."""
        return [row for row in self.rows if row.is_candidate]

    @property
    def choice(self) -> Choice:
        """The answer, by the verdicts that there are."""
        verdicts = {name: v for name, v in self.verdicts.items() if name in self.candidates}
        oracles = [row.residue for row in self.rows if not row.is_candidate and row.trial.startswith("oracle")]
        limit = max([FORGOTTEN, *oracles])
        return choose(self.candidate_rows, self.draws, self.unmet, self.valid, verdicts, self.keys, limit, self.gaps)

    def finalists(self, count: int) -> list[str]:
        """The candidates to attack: first those that the audit alone would recommend, then the front, then the others, each
        by the larger of residue and damage."""
        against = self.choice.against

        def rank(row: FrontRow) -> tuple[bool, bool, float]:
            refused = bool(against[row.trial])
            return refused, refused and not row.on_front, row.worst

        return [row.trial for row in sorted(self.candidate_rows, key=rank)[:count]]


def judged_by_attacks(
    folder: RunDir, context: Context, audits: Mapping[str, str], attacks: Mapping[str, str]
) -> dict[str, Verdict]:
    """Verdicts by subject. audits, attacks: subject -> key of its audit in the full and in the durability tier."""
    return {
        name: verdict_of(folder, name, {"audit": audits[name], "durability": attacks[name]}, context)
        for name in attacks
        if name in audits
    }


def verdict_of(folder: RunDir, name: str, keys: Mapping[str, str], context: Context) -> Verdict:
    """The verdict on one subject. keys: "audit" and "durability" -> key of its audit in that tier."""
    anchors, _ = context.load_anchors("audit")
    values = load_measured(folder.path, keys["audit"]).values
    rows = read_table(rows_path(folder.path, keys["durability"]), ROWS).to_pylist()
    reaches = {check: reach_of(check) for check in {r["check"] for r in rows}}
    reach = {check: attack for check, attack in reaches.items() if attack is not None}
    return verdict(rows, reach, values[context.validity], _oracle_validity(anchors, context))


def audited_front(
    folder: RunDir,
    context: Context,
    task: Task,
    rounds: Sequence[Mapping[str, str]],
    trials: Sequence[Trial],
    required: Sequence[Requirement] = (),
) -> Front:
    """The front of the audited candidates. rounds: for each round of audits, trial -> key of its audit in it."""
    anchors, views = context.load_anchors("audit")
    by_name = {t.trial: t for t in trials}
    positions, audits, unplaced = _positions(folder, context, task, rounds)
    names = list(positions)
    points = np.array([[p.residue, p.damage] for p in positions.values()]).reshape(-1, 2)
    certainty = _certainty(names, points, positions)
    on_front = {names[i] for i in pareto.front(points, ("min", "min"))}
    on_method_front = _on_method_front(names, points, [by_name[name].method for name in names])
    rows = [
        _front_row(
            name,
            by_name[name].method,
            "candidate",
            position,
            probe_residue=by_name[name].residue,
            probe_damage=by_name[name].damage,
            on_front=name in on_front,
            on_method_front=name in on_method_front,
            p_dominated=float(p_dominated),
            audits=audits[name],
            hyperparameters=by_name[name].hyperparameters,
        )
        for (name, position), p_dominated in zip(positions.items(), certainty.p_dominated, strict=True)
    ]
    rows += [_front_row(name, "", "anchor", position) for name, position in _anchors(anchors, views, task).items()]
    oracle_validity = _oracle_validity(anchors, context)
    return Front(
        rows=rows,
        candidates=names,
        p_dominates=certainty.p_dominates,
        hypervolume=pareto.hypervolume(points),
        hypervolume_lo=certainty.hypervolume[0],
        hypervolume_hi=certainty.hypervolume[1],
        probe_hypervolume=pareto.hypervolume(points_of([t for t in trials if t.is_complete])),
        draws=certainty.draws,
        valid={name: (position.validity, oracle_validity) for name, position in positions.items()},
        keys=_keys(task),
        unmet={name: _unmet(folder, rounds[0][name], required) for name in names},
        undecided=certainty.undecided,
        picks=certainty.picks,
        unplaced=unplaced,
    )


def _front_row(name: str, method: str, kind: str, position: Objectives, **of_candidates: Any) -> FrontRow:
    return FrontRow(
        trial=name,
        method=method,
        kind=kind,
        residue=position.residue,
        residue_lo=position.residue_lo,
        residue_hi=position.residue_hi,
        residue_upper=position.residue_upper,
        damage=position.damage,
        damage_lo=position.damage_lo,
        damage_hi=position.damage_hi,
        over_forgetting=position.over_forgetting,
        views=position.views,
        **of_candidates,
    )


def _anchors(anchors: Anchors, views: Sequence[View], task: Task) -> dict[str, Objectives]:
    """Where the anchors lie; each oracle by the others."""
    ends = {"base": anchors.base, "destroyed": anchors.destroyed}
    places = {name: objectives(model, anchors, views, task.quality, task.validity) for name, model in ends.items()}
    floor = noise_floor(anchors, views, task.quality, task.validity)
    oracles = {f"oracle-{k}": position for k, position in enumerate(floor)}
    return {"base": places["base"], **oracles, "destroyed": places["destroyed"]}


def _on_method_front(names: Sequence[str], points: np.ndarray, methods: Sequence[str]) -> set[str]:
    """The candidates that no other one of the same method dominates. points: (n, 2); methods: of each candidate."""
    members = set()
    for method in set(methods):
        indices = [k for k, other in enumerate(methods) if other == method]
        members |= {names[indices[i]] for i in pareto.front(points[indices], ("min", "min"))}
    return members


def _oracle_validity(anchors: Anchors, context: Context) -> float:
    """The mean over the oracles of their share of valid samples."""
    return float(np.mean([oracle.values[context.validity] for oracle in anchors.oracles]))


def _unmet(folder: RunDir, key: str, required: Sequence[Requirement]) -> list[str]:
    """The requirements that an audit does not show, in words."""
    rows = {f"{r['check']}.{r['metric']}": r for r in read_table(rows_path(folder.path, key), ROWS).to_pylist()}
    ends = {r.metric: (rows[r.metric]["lo"], rows[r.metric]["hi"]) for r in required if r.metric in rows}
    return [str(r) for r in required if not r.met(*ends.get(r.metric, (None, None)))]


def _keys(task: Task) -> dict[str, str]:
    """Metric of a view, or "damage", -> setting whose samples decide it."""
    return {m: decided_by(m, task.kind) for m in task.views} | {"damage": decided_by(task.quality, task.kind)}


def _positions(
    folder: RunDir, context: Context, task: Task, rounds: Sequence[Mapping[str, str]]
) -> tuple[dict[str, Objectives], dict[str, int], list[str]]:
    """Each candidate's objectives, the mean over its rounds; the number of its rounds; which audits lack an objective.

    Every round has anchors on its own seeds.
    """
    by_round: dict[str, dict[int, Objectives]] = {}
    unplaced = []
    for number, keys in enumerate(rounds, 1):
        anchors, views = context.load_anchors("audit" if number == 1 else f"audit-{number}")
        for trial, key in keys.items():
            measured = load_measured(folder.path, key)
            try:
                position = objectives(measured, anchors, views, task.quality, task.validity)
            except Unmeasured as error:
                unplaced.append(f"{trial}: audit {number}: {error}")
            else:
                by_round.setdefault(trial, {})[number] = position
    positions = {trial: mean_objectives(parts, len(rounds), task.quality) for trial, parts in by_round.items()}
    return positions, {trial: len(parts) for trial, parts in by_round.items()}, unplaced


@dataclass(frozen=True)
class _Certainty:
    """Statistics of the front from paired resamples of the candidates; see `Front`. p_dominated: (candidates,)."""

    draws: np.ndarray
    p_dominates: np.ndarray
    p_dominated: np.ndarray
    hypervolume: tuple[float, float]
    undecided: list[str]
    picks: Picks | None


def _certainty(names: list[str], points: np.ndarray, positions: Mapping[str, Objectives]) -> _Certainty:
    if not names:
        return _Certainty(np.empty((0, 0, 2)), np.zeros((0, 0)), np.zeros(0), (0.0, 0.0), [], None)
    replicates = np.stack([position.replicates for position in positions.values()])
    draws = pareto.resample(np.stack([position.uncut for position in positions.values()]), replicates)
    return _Certainty(
        draws=draws,
        p_dominates=pareto.dominance_probability(draws),
        p_dominated=pareto.dominated_probability(draws),
        hypervolume=pareto.hypervolume_interval(points, replicates),
        undecided=[names[i] for i in pareto.undecided(draws)],
        picks=pick(names, points, draws, [position.p_residue(FORGOTTEN) for position in positions.values()]),
    )


@dataclass(frozen=True)
class Gap:
    """The audit of an objective minus the search's estimate: its mean over n candidates, with a 95 % interval.

    Positive: the search was too optimistic (the winner's curse). rank_correlation: Spearman's, of search and audit. What too
    few candidates do not show is None.
    """

    n: int
    gap: float | None = None
    lo: float | None = None
    hi: float | None = None
    rank_correlation: float | None = None


def search_against_audit(rows: Sequence[FrontRow]) -> dict[Objective, Gap]:
    """The search's estimates of the audited candidates against the audit's values, by objective."""
    from scipy import stats

    candidates = [row for row in rows if row.is_candidate]
    gaps: dict[Objective, Gap] = {}
    for objective in OBJECTIVES:
        probe = np.array([row.probe(objective) for row in candidates], dtype=float)
        audit = np.array([row.value(objective) for row in candidates], dtype=float)
        gap = Gap(len(candidates))
        if len(candidates) > 1:
            _, low, high = t_interval(audit - probe)
            gap = replace(gap, gap=float(np.mean(audit - probe)), lo=low, hi=high)
        if len(candidates) > 2 and np.ptp(probe) > 0 and np.ptp(audit) > 0:
            gap = replace(gap, rank_correlation=float(stats.spearmanr(probe, audit).statistic))
        gaps[objective] = gap
    return gaps


def write_front(folder: RunDir, front: Front, sweep: Sweep) -> None:
    """Writes front.json and front.parquet."""
    choice = front.choice
    labels = {name: v.label for name, v in front.verdicts.items()}
    write_table(folder.front_table, [r.stored() | {"verdict": labels.get(r.trial, "")} for r in front.rows], FRONT)
    write_json(
        folder.front_json,
        {
            "run": sweep.name,
            "config_digest": sweep.digest,
            "objectives": dict.fromkeys(OBJECTIVES, "min"),
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
            "answer": choice.answer(front.candidate_rows, front.verdicts),
            "candidates": front.candidates,
            "audits": front.audits,
            "unmet": front.unmet,
            "undecided": front.undecided,
            "picks": front.picks.plain() if front.picks else {},
            "noise_floor": {
                row.trial: [row.residue, row.damage] for row in front.rows if row.trial.startswith("oracle")
            },
            "search_against_audit": {name: asdict(gap) for name, gap in search_against_audit(front.rows).items()},
            "attacks_without_verdict": front.gaps,
            "verdicts": {name: v.plain() | {"sentence": v.sentence()} for name, v in front.verdicts.items()},
            "p_dominates": front.p_dominates.tolist(),
            "points": [row.plain() for row in front.rows],
        },
    )
