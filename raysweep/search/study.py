"""The Optuna study of a sweep, on a journal file in its run directory. Only `study`, `view` and `samplers` import Optuna.

A trial's place in the sweep and its config are user attributes of the study's trial; they are written together, so a trial exists
with all of them or not at all. States say exactly what happened: COMPLETE with finite objectives, PRUNED if stopped early, FAIL with
a reason otherwise. `optuna.load_study` and optuna-dashboard can open the journal while the sweep runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from raysweep.search.outcome import OBJECTIVES

# codes of operations in Optuna's journal: a new trial, its state, an attribute of it
_CREATED, _ENDED, _NOTED = 4, 6, 8
CONSTRAINTS = "constraints"  # Optuna's prefix of the system attributes of a trial that hold its constraints


class TrialConfig(TypedDict):
    """The config of a trial, as Tune hands it over. place: position in the sweep, from 0."""

    place: int
    trial: str
    method: str
    hyperparameters: dict[str, Any]
    seed: int
    source: str


def open_study(journal: Path, name: str) -> Study:
    """Opens the study `name` on a journal file, and creates it if it does not exist."""
    return _open(JournalStorage(JournalFileBackend(str(journal))), name)


def _open(storage: JournalStorage, name: str) -> Study:
    with quiet():
        try:
            return optuna.load_study(storage=storage, study_name=name)
        except KeyError:
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


def standings(journal: Path) -> list[tuple[str, str, str]]:
    """(name, state, reason) of the trial at each place of the sweep, the latest one if it was tried again.

    From the records of the journal alone: Optuna would build each trial with its distributions, which takes three times as long.
    """
    trials: list[tuple[dict[str, Any], dict[str, Any]]] = []  # as planned, and what was noted since, by Optuna's id
    for record in JournalFileBackend(str(journal)).read_logs(0):
        if record["op_code"] == _CREATED:
            trials.append((record["user_attrs"], {"state": record["state"]}))
        elif record["op_code"] == _ENDED:
            trials[record["trial_id"]][1]["state"] = record["state"]
        elif record["op_code"] == _NOTED:
            trials[record["trial_id"]][1].update(record["user_attr"])
    by_place = {planned["place"]: (planned["trial"], noted) for planned, noted in trials if "place" in planned}
    return [
        (name, TrialState(noted["state"]).name, noted.get("reason", ""))
        for _, (name, noted) in sorted(by_place.items())
    ]


class SweepStudy:
    """The trials of one sweep, by place: plans new ones and records how they ended. One process writes at a time.

    planned: place in the sweep -> its trial, the latest one if it was tried again.
    count: number of trials in the study, with those that were tried again.
    """

    def __init__(self, journal: Path, name: str):
        _cut_unfinished_line(journal)
        self.storage = JournalStorage(JournalFileBackend(str(journal)))
        self.study = _open(self.storage, name)
        trials = self.study.get_trials(deepcopy=False)
        self.count = len(trials)
        self.planned: dict[int, FrozenTrial] = {t.user_attrs["place"]: t for t in trials if "place" in t.user_attrs}

    def plan(self, config: TrialConfig, asked: FrozenTrial, **attributes: Any) -> None:
        """Records a trial with its config, with the parameters of `asked`, and with more attributes, in one write."""
        known = {key: config[key] for key in ("place", "trial", "method")}
        trial = optuna.create_trial(
            state=TrialState.RUNNING,
            params=asked.params,
            distributions=asked.distributions,
            user_attrs=known | {"config": json.dumps(config)} | attributes,
            system_attrs=asked.system_attrs,
        )
        trial_id = self.storage.create_new_trial(self.study._study_id, template_trial=trial)
        self.planned[config["place"]] = self.storage.get_trial(trial_id)
        self.count += 1

    def plan_again(self, place: int) -> TrialConfig:
        """Plans a failed trial again with the same settings, under a new number; the failed one stays in the study."""
        failed = self.planned[place]
        config = config_of(failed)
        self.plan(config, failed)
        return config

    def complete(self, place: int, objectives: list[float], result: dict[str, Any], constraint: float) -> None:
        """Records a trial with finite objectives; constraint: satisfied if not above 0."""
        self.annotate(place, "result", json.dumps(result))
        # `Trial.set_constraint` would keep the value of a process that was killed right here
        self.storage.set_trial_system_attr(self.planned[place]._trial_id, f"{CONSTRAINTS}:validity", constraint)
        self._end(place, TrialState.COMPLETE, objectives)

    def prune(self, place: int, reason: str) -> None:
        """Records a trial that was stopped early."""
        self.annotate(place, "reason", reason)
        self._end(place, TrialState.PRUNED)

    def fail(self, place: int, reason: str, **attributes: Any) -> None:
        """Records a trial that failed, with more attributes (`result`, `limit`)."""
        for key, value in {"reason": reason, **attributes}.items():
            self.annotate(place, key, value)
        self._end(place, TrialState.FAIL)

    def annotate(self, place: int, key: str, value: Any) -> None:
        """Sets a user attribute of the trial at a place."""
        self.storage.set_trial_user_attr(self.planned[place]._trial_id, key, value)

    def _end(self, place: int, state: TrialState, objectives: list[float] | None = None) -> None:
        trial_id = self.planned[place]._trial_id
        self.storage.set_trial_state_values(trial_id, state, objectives)
        self.planned[place] = self.storage.get_trial(trial_id)


def _cut_unfinished_line(journal: Path) -> None:
    """Removes what a full disk or a crash left of a record: Optuna would append to it, and then refuse the whole journal."""
    if not journal.is_file() or not journal.stat().st_size:
        return
    with journal.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            whole = journal.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)
