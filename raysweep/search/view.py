"""The view of a sampler: a study in memory with the trials of one method that a suggestion may learn from.

A sampler reads all trials of its study several times for each suggestion. So that a suggestion costs the same after 100 and after
100,000 trials, the view holds at most `LEARNED` trials that have ended: the `BEST` of them by non-dominated sorting, and the
latest others. It holds at most `RUNNING` trials under way, the latest, without anything that is known of their results.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import moocore
import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from raysweep.search.outcome import OBJECTIVES
from raysweep.search.study import CONSTRAINTS, quiet

LEARNED, BEST, RUNNING = 300, 75, 60
_RESULTS = ("result", "reason", "limit", "tune_id")  # user attributes that depend on when and how a trial ended
_TRANSIENT = "tpe:relative_params"  # a note of TPE for other processes; the trial's parameters say the same


class History:
    """What suggestions may know of the trials of one method, and the way to ask for the next one."""

    def __init__(self) -> None:
        self.running: dict[int, FrozenTrial] = {}  # place -> trial whose results must not be seen yet
        self.ended: list[FrozenTrial] = []  # complete or stopped early, in the order in which they were learned
        self.valid = array("q")  # indices of those that are complete and satisfy the constraint
        self.objectives = array("d")  # of these, one after the other

    def start(self, place: int, trial: FrozenTrial) -> None:
        """Adds a trial that was planned, as one under way, whatever became of it."""
        self.running[place] = trial

    def learn(self, place: int, trial: FrozenTrial) -> None:
        """Replaces a trial under way by its outcome; a failed one is forgotten."""
        del self.running[place]
        if trial.state == TrialState.FAIL:
            return
        if trial.state == TrialState.COMPLETE and all(v <= 0 for v in trial.constraints.values()):
            self.valid.append(len(self.ended))
            self.objectives.extend(trial.values)
        self.ended.append(trial)

    def visible(self) -> list[FrozenTrial]:
        """The trials that a sampler sees, by number."""
        indices: Sequence[int] = range(len(self.ended))
        if len(indices) > LEARNED:
            best = set(self._best())
            latest = (i for i in reversed(indices) if i not in best)
            indices = [*best, *islice(latest, LEARNED - len(best))]
        running = islice(reversed(self.running.values()), RUNNING)
        return sorted([*(self.ended[i] for i in indices), *map(_without_results, running)], key=lambda t: t.number)

    def _best(self) -> list[int]:
        """Indices of the best, by non-dominated sorting; among equals the earliest."""
        if not self.valid:
            return []
        ranks = moocore.pareto_rank(np.frombuffer(self.objectives).reshape(-1, len(OBJECTIVES)))
        return [self.valid[i] for i in np.argsort(ranks, kind="stable")[:BEST]]

    def ask(
        self, sampler: BaseSampler, fixed: dict[str, Any], number: int, draw: Callable[[Trial], dict[str, Any]]
    ) -> tuple[FrozenTrial, dict[str, Any]]:
        """Lets a sampler suggest a trial; returns it, and what `draw` made of it.

        fixed: values of parameters, by their names in the study, that are not sampled. number: above those of all trials seen.
        """
        with quiet():
            study = optuna.create_study(
                storage=View(self, number),
                directions=["minimize"] * len(OBJECTIVES),
                sampler=PartialFixedSampler(fixed, sampler) if fixed else sampler,
            )
            trial = study.ask()
            values = draw(trial)
        asked = study._storage.get_trial(trial._trial_id)
        asked.system_attrs = {k: v for k, v in asked.system_attrs.items() if not k.startswith(_TRANSIENT)}
        return asked, values


class View(InMemoryStorage):  # type: ignore[misc]  # Optuna is not typed
    """A storage that shows the visible trials of a history and the trial that is being asked for, which has the number `number`."""

    def __init__(self, history: History, number: int):
        super().__init__()
        self.history, self.number = history, number
        self.trials: list[FrozenTrial] | None = None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id: int = super().create_new_trial(study_id, template_trial)
        self.get_trial(trial_id).number = self.number
        return trial_id

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):  # asked for at every suggestion; there are none
            return []
        if self.trials is None:  # a sampler that draws at random never looks
            self.trials = self.history.visible()
        trials = [*self.trials, *super().get_all_trials(study_id, deepcopy=False)]
        trials = trials if states is None else [t for t in trials if t.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


def _without_results(trial: FrozenTrial) -> FrozenTrial:
    """A trial as it was when it was planned."""
    early = copy.copy(trial)
    early.state, early.values, early.datetime_complete = TrialState.RUNNING, None, None
    early.user_attrs = {k: v for k, v in trial.user_attrs.items() if k not in _RESULTS}
    early.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith(CONSTRAINTS)}
    return early
