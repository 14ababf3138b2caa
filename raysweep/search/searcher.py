"""ParetoSearch: a Ray Tune searcher over a multi-objective Optuna study on a journal file in the run directory.

What a study records is exactly what happened: finite objectives of a finished trial are COMPLETE, a trial stopped early is
PRUNED, an error or an objective that is missing or not finite is FAIL with its reason. Trials come in batches: a batch is
suggested all at once, from the results of all batches but the one before it, which still runs then; so workers have
something to do while the last trials of a batch are being probed. A result that comes before its time is held back until
the next batch has been suggested. So neither the number of workers nor the order in which they finish can change a
suggestion. Each method has the same share of every sweep.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from raysweep.search.spaces import Space
from raysweep.storage.seeds import derive_seed

OBJECTIVES = ("residue", "damage")
FINAL = "raysweep_final"


def open_study(journal: Path, name: str) -> Study:
    """The study on a journal file, made if it is not there; both objectives are minimised."""
    return _open(_storage(journal), name)


def _storage(journal: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(journal)))


def _open(storage: JournalStorage, name: str) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * len(OBJECTIVES), load_if_exists=True
        )
        study.set_metric_names(list(OBJECTIVES))
    return study


class ParetoSearch(Searcher):
    """Suggests settings to Tune and records what became of them.

    Args:
        journal: file of the study; `optuna.load_study` and optuna-dashboard open it while the sweep runs.
        name: name of the study.
        spaces: one per method, in the order in which methods take turns.
        trials, batch, seed, sampler: as in `SearchConfig`.
        limits: the limits of time that end a trial, by setting.
    """

    def __init__(
        self,
        journal: Path,
        name: str,
        spaces: list[Space],
        trials: int,
        batch: int,
        seed: int,
        sampler: str = "tpe",
        limits: dict[str, float] | None = None,
    ):
        super().__init__(metric=list(OBJECTIVES), mode=["min"] * len(OBJECTIVES))
        self.journal, self.name, self.spaces = journal, name, spaces
        self.trials, self.batch, self.seed, self.sampler = trials, batch, seed, sampler
        self.limits = limits or {}
        self._attach()

    def _attach(self) -> None:
        self._open()
        self.numbers: dict[str, int] = {}  # Tune's trial id -> number in the study
        self.held: dict[int, tuple[dict[str, Any], bool]] = {}  # number -> (result, error) that comes before its time
        self.ready: list[dict[str, Any]] = [
            json.loads(t.user_attrs["config"])
            for t in self._planned().values()
            if t.state == TrialState.RUNNING and "config" in t.user_attrs
        ]

    def _open(self) -> None:
        self.storage = _storage(self.journal)
        self.study = _open(self.storage, self.name)

    def retry(self) -> list[str]:
        """Plans again, with the same settings, the trials that failed by a limit that is wider by now; their names.

        The failed ones stay in the study, as what happened.
        """
        again = []
        for t in self._planned().values():
            ended_by = t.user_attrs.get("limit", {})
            if t.state == TrialState.FAIL and any(self.limits.get(name, 0) > at for name, at in ended_by.items()):
                config = json.loads(t.user_attrs["config"]) | {"number": len(self.study.get_trials(deepcopy=False))}
                kept = {k: t.user_attrs[k] for k in ("place", "trial", "method")} | {"config": json.dumps(config)}
                self.study.add_trial(
                    optuna.create_trial(
                        state=TrialState.RUNNING, params=t.params, distributions=t.distributions, user_attrs=kept
                    )
                )
                self.ready.append(config)
                again.append(config["trial"])
        return again

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None: wait for the batch before the running one; FINISHED: all were suggested."""
        if not self.ready:
            self._advance()
        if not self.ready:
            return Searcher.FINISHED if len(self._planned()) >= self.trials else None
        config = self.ready.pop(0)
        self.numbers[trial_id] = config["number"]
        self._set(config["number"], "tune_id", trial_id)
        return config

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Records the end of a trial, as soon as the batch after its own has been suggested."""
        number = self.numbers.pop(trial_id, None)
        if number is None or self.study.trials[number].state.is_finished():
            return
        self.held[number] = (result or {}, error)
        self._advance()

    def _advance(self) -> None:
        """Records what has been held back for long enough and suggests what that allows, until nothing moves."""
        while True:
            planned = self._planned()
            asked = len(planned)
            due = [n for p, t in planned.items() if (n := t.number) in self.held and self._next_is_asked(p, asked)]
            for number in due:
                self._record(number, *self.held.pop(number))
            first = asked // self.batch * self.batch  # of the batch to suggest
            planned = self._planned()
            before = (planned[place] for place in range(first - self.batch))
            more = asked < self.trials and all(t.state.is_finished() for t in before)
            if more:
                self.ready += [self._ask(place) for place in range(asked, min(self.trials, first + self.batch))]
            if not due and not more:
                return

    def _next_is_asked(self, place: int, asked: int) -> bool:
        return asked >= min(self.trials, (place // self.batch + 2) * self.batch)

    def _record(self, number: int, result: dict[str, Any], error: bool) -> None:
        values = [result.get(name) for name in OBJECTIVES]
        if error or (result.get(FINAL) and not _finite(values)):
            fallback = "the trial ended with an error" if error else f"objectives are not finite: {values}"
            self._set(number, "reason", result.get("reason") or fallback)
            self._set(number, "result", json.dumps({k: result[k] for k in _COSTS if k in result}))
            if result.get("limit") in self.limits:
                self._set(number, "limit", {result["limit"]: self.limits[result["limit"]]})
            self.study.tell(number, state=TrialState.FAIL)
        elif not result.get(FINAL):
            self._set(number, "reason", result.get("reason") or "stopped early")
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            trial = optuna.trial.Trial(self.study, self._id(number))
            trial.set_constraint("validity", float(result.get("constraint", 0.0)))
            self._set(number, "result", json.dumps({k: result[k] for k in sorted(result) if k in _KEPT}))
            self.study.tell(number, values=[float(v) for v in values])  # type: ignore[arg-type]

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Attaches to the journal again; trials that had not ended are suggested again under their numbers."""
        self._attach()

    def left(self) -> int:
        """Trials that have not ended yet."""
        return self.trials - sum(t.state.is_finished() for t in self._planned().values())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("study", "storage")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _planned(self) -> dict[int, FrozenTrial]:
        """Place in the sweep -> its trial; a place that was interrupted while being suggested is free again."""
        planned: dict[int, FrozenTrial] = {}
        for t in self.study.get_trials(deepcopy=False):
            if "config" not in t.user_attrs and t.state == TrialState.RUNNING:
                self._set(t.number, "reason", "interrupted while being suggested")
                self.study.tell(t.number, state=TrialState.FAIL)
            elif "config" in t.user_attrs:
                planned[t.user_attrs["place"]] = t
        return planned

    def _ask(self, place: int) -> dict[str, Any]:
        """Asks the study for the trial at one place of the sweep and records its config."""
        space = self.spaces[place % len(self.spaces)]
        turn = place // len(self.spaces)
        point = space.points[turn] if turn < len(space.points) else None
        searched = {p.name for p in space.parameters}
        values = {} if point is None else point.values
        fixed = {f"{space.method}.{k}": v for k, v in values.items() if k in searched}
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.tell(self.study.ask().number, state=TrialState.FAIL)  # left by an interrupted suggestion
        self.study.enqueue_trial(fixed)
        self.study.sampler = self._make_sampler(derive_seed("sampler", self.seed, place))
        trial = self.study.ask()
        hyperparameters = space.ask(trial, values)
        config = {
            "number": trial.number,
            "place": place,
            "trial": f"{place:03d}-{space.method}",
            "method": space.method,
            "hyperparameters": hyperparameters,
            "seed": derive_seed("trial seed", self.seed, place),
            "source": "" if point is None else point.source,
        }
        trial.set_user_attr("place", place)
        trial.set_user_attr("trial", config["trial"])
        trial.set_user_attr("method", space.method)
        trial.set_user_attr("config", json.dumps(config))
        return config

    def _make_sampler(self, seed: int) -> BaseSampler:
        seed %= 2**32
        if self.sampler == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            return TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2 * len(self.spaces)
            )

    def _set(self, number: int, key: str, value: Any) -> None:
        self.storage.set_trial_user_attr(self._id(number), key, value)

    def _id(self, number: int) -> int:
        """The storage's own name of a trial. Of a trial that an earlier process asked for, nothing else lets attributes be set."""
        study = self.storage.get_study_id_from_name(self.name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)


_COSTS = ("train_s", "audit_s", "step_s", "probe")  # what is known of a trial that failed, too
_KEPT = ("residue", "damage", "residue_se", "damage_se", "over_forgetting", "validity", "digest", "views", *_COSTS)


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)
