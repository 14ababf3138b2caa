"""The trials of a sweep as records, read from its study or from the table of them on disk; which of them to audit. No Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from raysweep.results import pareto
from raysweep.rundir import RunDir
from raysweep.storage.schemas import TRIALS, read_table, write_table

STUDY_SIZE = "study_size"  # key in the metadata of trials.parquet


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial; its fields are the columns of `storage.schemas.TRIALS`, which describes them.

    residue, damage and their standard errors are the probe's, None unless the trial is complete.
    """

    trial: str
    number: int
    method: str
    source: str
    state: str
    hyperparameters: dict[str, Any]
    seed: int
    residue: float | None = None
    damage: float | None = None
    residue_se: float | None = None
    damage_se: float | None = None
    train_s: float | None = None
    audit_s: float | None = None
    digest: str = ""
    probe: str = ""
    reason: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the trial made a candidate that was probed."""
        return self.state == "COMPLETE"

    @property
    def has_failed(self) -> bool:
        """Whether the trial ended without a candidate; `reason` says why."""
        return self.state == "FAIL"

    @property
    def has_ended(self) -> bool:
        """Whether the trial is complete, failed or was stopped early."""
        return self.state != "RUNNING"

    @property
    def point(self) -> tuple[float, float]:
        """(residue, damage) by the probe; NaN for a missing one."""
        residue, damage = (math.nan if value is None else value for value in (self.residue, self.damage))
        return residue, damage

    def plain(self) -> dict[str, Any]:
        """The row of trials.parquet: plain values by column, hyperparameters as JSON."""
        return vars(self) | {"hyperparameters": json.dumps(self.hyperparameters, sort_keys=True)}


class Standing(NamedTuple):
    """How far a trial is: the columns of these names."""

    trial: str
    state: str
    reason: str


def trial_table(folder: RunDir, name: str) -> list[Trial]:
    """Trials of the study `name`, in the order of the sweep; empty without a study."""
    if not folder.journal.is_file():
        return []
    from raysweep.search.study import open_study  # Optuna, which readers of trials.parquet do not need

    trials = open_study(folder.journal, name).get_trials(deepcopy=False)
    by_place = {frozen.user_attrs["place"]: frozen for frozen in trials if "place" in frozen.user_attrs}
    return [_trial(by_place[place]) for place in sorted(by_place)]


def _trial(frozen: Any) -> Trial:
    config = json.loads(frozen.user_attrs["config"])
    result = json.loads(frozen.user_attrs.get("result", "{}"))
    residue, damage = frozen.values if frozen.state.name == "COMPLETE" else (None, None)
    return Trial(
        trial=config["trial"],
        number=frozen.number,
        method=config["method"],
        source=config["source"],
        state=frozen.state.name,
        hyperparameters=config["hyperparameters"],
        seed=config["seed"],
        residue=residue,
        damage=damage,
        residue_se=result.get("residue_se"),
        damage_se=result.get("damage_se"),
        train_s=result.get("train_s"),
        audit_s=result.get("audit_s"),
        digest=result.get("digest", ""),
        probe=result.get("probe", ""),
        reason=frozen.user_attrs.get("reason", ""),
    )


def write_trials(folder: RunDir, name: str) -> list[Trial]:
    """Brings trials.parquet up to date with the study; returns the trials."""
    size = study_size(folder)  # before reading: what is added meanwhile makes the table outdated, not wrong
    trials = trial_table(folder, name)
    save_trials(folder, trials, size)
    return trials


def save_trials(folder: RunDir, trials: Sequence[Trial], size: int) -> None:
    """Writes trials.parquet. size: that of the study with these trials."""
    schema = TRIALS.with_metadata(TRIALS.metadata | {STUDY_SIZE: str(size)})
    write_table(folder.trials, [t.plain() for t in trials], schema)


def study_size(folder: RunDir) -> int:
    """Bytes of the study's journal, 0 without one. It only grows, so a study of the same size has the same trials."""
    return folder.journal.stat().st_size if folder.journal.is_file() else 0


def trials_of(folder: RunDir) -> list[Trial]:
    """The trials of a run: of trials.parquet if the study is as it was when that was written, which is much faster, else of the study."""
    return read_trials(folder) if _up_to_date(folder) else trial_table(folder, folder.run_id)


def standings_of(folder: RunDir) -> list[Standing]:
    """How far the trials of a run are, in the order of the sweep; takes a third of the time of `trials_of`."""
    if _up_to_date(folder):
        columns = [
            column.to_pylist() for column in read_table(folder.trials, TRIALS, list(Standing.__annotations__)).columns
        ]
        return [Standing(*values) for values in zip(*columns, strict=True)]
    if not folder.journal.is_file():
        return []
    from raysweep.search.study import standings

    return [Standing(*values) for values in standings(folder.journal)]


def _up_to_date(folder: RunDir) -> bool:
    """Whether trials.parquet was written when the study was as it is now."""
    if not folder.trials.is_file():
        return False
    recorded = (pq.read_schema(folder.trials).metadata or {}).get(STUDY_SIZE.encode())
    return recorded is not None and int(recorded) == study_size(folder)


def read_trials(folder: RunDir) -> list[Trial]:
    """The trials of trials.parquet; empty if the run has not written it."""
    if not folder.trials.is_file():
        return []
    rows = read_table(folder.trials, TRIALS).to_pylist()
    return [Trial(**row | {"hyperparameters": json.loads(row["hyperparameters"])}) for row in rows]


def pick_for_audit(trials: Sequence[Trial], top: int) -> list[Trial]:
    """The candidates to audit, at most `top`, but each method's best in any case.

    In order: each method's best by max(residue, damage), the overall front, the fronts of the methods.
    """
    complete = [t for t in trials if t.is_complete]
    if not complete:
        return []
    by_method: dict[str, list[Trial]] = {}
    for t in complete:
        by_method.setdefault(t.method, []).append(t)
    best = [candidates[pareto.balanced(points_of(candidates))] for candidates in by_method.values()]
    method_fronts = [t for candidates in by_method.values() for t in _front(candidates)]
    picked: dict[str, Trial] = {}
    for group in (best, _front(complete), method_fronts):
        for t in sorted(group, key=lambda t: max(t.point)):
            picked.setdefault(t.trial, t)
    return list(picked.values())[: max(top, len(best))]


def fronts_of_methods(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials that no other one of their method dominates. `pick_for_audit` picks none but these."""
    methods = dict.fromkeys(t.method for t in trials)
    return [t for method in methods for t in _front([t for t in trials if t.method == method and t.is_complete])]


def points_of(trials: Sequence[Trial]) -> np.ndarray:
    """(residue, damage) of each trial by its probe, (n, 2)."""
    return np.array([t.point for t in trials]).reshape(-1, 2)


def _front(trials: Sequence[Trial]) -> list[Trial]:
    return [trials[i] for i in pareto.front(points_of(trials), ("min", "min"))]
