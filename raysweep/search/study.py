"""The Optuna study of a sweep, on a journal file in its run directory. Only this module and `samplers` import Optuna.

A trial's place in the sweep and its config are user attributes of the study's trial. States say exactly what happened: COMPLETE
with finite objectives, PRUNED if stopped early, FAIL with a reason otherwise. `optuna.load_study` and optuna-dashboard can open
the journal while the sweep runs.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

OBJECTIVES = ("residue", "damage")  # both are minimised


class TrialConfig(TypedDict):
    """The config of a trial, as Tune hands it over. place: position in the sweep, from 0; number: the trial's number in the study."""

    number: int
    place: int
    trial: str
    method: str
    hyperparameters: dict[str, Any]
    seed: int
    source: str


def open_study(journal: Path, name: str) -> Study:
    """Opens the study `name` on a journal file, and creates it if it does not exist."""
    return _open(_storage(journal), name)


def _storage(journal: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(journal)))


def _open(storage: JournalStorage, name: str) -> Study:
    with quiet():
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * len(OBJECTIVES), load_if_exists=True
        )
        study.set_metric_names(list(OBJECTIVES))
    return study


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mutes Optuna's messages about opened studies, and its warnings about experimental features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def config_of(trial: FrozenTrial) -> TrialConfig:
    """The config that was recorded with a trial."""
    config: TrialConfig = json.loads(trial.user_attrs["config"])
    return config


class SweepStudy:
    """The trials of one sweep, by place; asks for new ones and records how they ended."""

    def __init__(self, journal: Path, name: str):
        self.name = name
        self.storage = _storage(journal)
        self.study = _open(self.storage, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, by number, with those that were interrupted or tried again."""
        trials: list[FrozenTrial] = self.study.trials
        return trials

    def planned(self) -> dict[int, FrozenTrial]:
        """Place in the sweep -> its trial. Trials interrupted while being suggested are failed, and their places free again."""
        planned: dict[int, FrozenTrial] = {}
        for t in self.study.get_trials(deepcopy=False):
            if "config" in t.user_attrs:
                planned[t.user_attrs["place"]] = t
            elif t.state == TrialState.RUNNING:
                self.fail(t.number, "interrupted while being suggested")
        return planned

    def ask(self, sampler: BaseSampler, fixed: dict[str, Any]) -> Trial:
        """A new trial whose parameters have the values `fixed` (by their names in the study) or are sampled."""
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.tell(self.study.ask().number, state=TrialState.FAIL)  # left by an interrupted suggestion
        self.study.enqueue_trial(fixed)
        self.study.sampler = sampler
        return self.study.ask()

    def plan(self, trial: Trial, config: TrialConfig) -> None:
        """Records the config of a trial that was asked for; with that, its place is taken."""
        for key in ("place", "trial", "method"):
            trial.set_user_attr(key, config[key])
        trial.set_user_attr("config", json.dumps(config))

    def plan_again(self, failed: FrozenTrial) -> TrialConfig:
        """Plans a failed trial again with the same settings, under a new number; the failed one stays in the study."""
        config = config_of(failed)
        config["number"] = len(self.study.get_trials(deepcopy=False))
        attributes = {k: failed.user_attrs[k] for k in ("place", "trial", "method")} | {"config": json.dumps(config)}
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=failed.params,
                distributions=failed.distributions,
                user_attrs=attributes,
            )
        )
        return config

    def complete(self, number: int, objectives: list[float], result: dict[str, Any], constraint: float) -> None:
        """Records a trial with finite objectives; constraint: satisfied if not above 0."""
        trial = Trial(self.study, self._storage_id(number))
        trial.set_constraint("validity", constraint)
        self.annotate(number, "result", json.dumps(result))
        self.study.tell(number, values=objectives)

    def prune(self, number: int, reason: str) -> None:
        """Records a trial that was stopped early."""
        self.annotate(number, "reason", reason)
        self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str, **attributes: Any) -> None:
        """Records a trial that failed, with more attributes (`result`, `limit`)."""
        for key, value in {"reason": reason, **attributes}.items():
            self.annotate(number, key, value)
        self.study.tell(number, state=TrialState.FAIL)

    def annotate(self, number: int, key: str, value: Any) -> None:
        """Sets a user attribute of a trial, also of one that an earlier process asked for."""
        self.storage.set_trial_user_attr(self._storage_id(number), key, value)

    def _storage_id(self, number: int) -> int:
        """The storage's own id of a trial: `Study` offers no way to set attributes of a trial of an earlier process."""
        study = self.storage.get_study_id_from_name(self.name)
        trial: int = self.storage.get_trial_id_from_study_id_trial_number(study, number)
        return trial
