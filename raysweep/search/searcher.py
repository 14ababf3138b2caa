"""ParetoSearch: a Ray Tune searcher that suggests the trials of a sweep and records their results in its study.

Trials come in batches. A batch is suggested all at once, from the results of all batches but the one before it, which is still
running then: so workers have work while the last trials of a batch are being probed. A result that arrives early is held back
until the next batch has been suggested. Neither the number of workers nor the order in which they finish can therefore change
a suggestion. Every method gets the same share of the trials.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raysweep.registry import resolve
from raysweep.search.spaces import Space
from raysweep.search.study import OBJECTIVES, SweepStudy, TrialConfig, config_of
from raysweep.storage.seeds import derive_seed

FINAL = "raysweep_final"  # key of a trial's last result; a trial that ends without it was stopped early
_COSTS = ("train_s", "audit_s", "step_s", "probe")  # parts of a result that are kept of failed trials, too
_KEPT = ("residue", "damage", "residue_se", "damage_se", "over_forgetting", "validity", "digest", "views", *_COSTS)


class ParetoSearch(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Suggests settings to Tune and records how the trials ended.

    Args:
        journal: file of the study.
        name: name of the study.
        spaces: one per method, in the order in which methods take turns.
        trials, batch, seed, sampler: as in `SearchConfig`.
        limits: the time limits that end a trial, in seconds, by setting.
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
        self.study = SweepStudy(self.journal, self.name)
        self.numbers: dict[str, int] = {}  # Tune's trial id -> number in the study
        self.held: dict[int, tuple[dict[str, Any], bool]] = {}  # number -> (result, error) of trials that ended early
        self.ready: list[TrialConfig] = [
            config_of(t) for t in self.study.planned().values() if t.state.name == "RUNNING"
        ]

    def retry(self) -> list[str]:
        """Plans again, with the same settings, the trials that failed by a limit that is wider now; returns their names."""
        again = []
        for t in self.study.planned().values():
            ended_by = t.user_attrs.get("limit", {})
            if t.state.name == "FAIL" and any(self.limits.get(name, 0) > limit for name, limit in ended_by.items()):
                config = self.study.plan_again(t)
                self.ready.append(config)
                again.append(config["trial"])
        return again

    def suggest(self, trial_id: str) -> TrialConfig | str | None:
        """The next trial's config; None: wait for the batch before the running one; FINISHED: all were suggested."""
        if not self.ready:
            self._advance()
        if not self.ready:
            return Searcher.FINISHED if len(self.study.planned()) >= self.trials else None
        config = self.ready.pop(0)
        self.numbers[trial_id] = config["number"]
        self.study.annotate(config["number"], "tune_id", trial_id)
        return config

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records the end of a trial, as soon as the batch after its own has been suggested."""
        number = self.numbers.pop(trial_id, None)
        if number is None or self.study.trials[number].state.is_finished():
            return
        self.held[number] = (result or {}, error)
        self._advance()

    def _advance(self) -> None:
        """Records held results that are due and suggests the batches that this allows, until nothing changes."""
        while True:
            planned = self.study.planned()
            asked = len(planned)
            due = [t.number for p, t in planned.items() if t.number in self.held and self._next_is_asked(p, asked)]
            for number in due:
                self._record(number, *self.held.pop(number))
            first = asked // self.batch * self.batch  # place of the next batch's first trial
            planned = self.study.planned()
            before = (planned[place] for place in range(first - self.batch))
            more = asked < self.trials and all(t.state.is_finished() for t in before)
            if more:
                self.ready += [self._ask(place) for place in range(asked, min(self.trials, first + self.batch))]
            if not due and not more:
                return

    def _next_is_asked(self, place: int, asked: int) -> bool:
        """Whether the batch after that of `place` has been suggested."""
        return asked >= min(self.trials, (place // self.batch + 2) * self.batch)

    def _record(self, number: int, result: dict[str, Any], error: bool) -> None:
        objectives = [result.get(name) for name in OBJECTIVES]
        if error or (result.get(FINAL) and not _finite(objectives)):
            fallback = "the trial ended with an error" if error else f"objectives are not finite: {objectives}"
            attributes: dict[str, Any] = {"result": json.dumps({k: result[k] for k in _COSTS if k in result})}
            if result.get("limit") in self.limits:
                attributes["limit"] = {result["limit"]: self.limits[result["limit"]]}
            self.study.fail(number, result.get("reason") or fallback, **attributes)
        elif not result.get(FINAL):
            self.study.prune(number, result.get("reason") or "stopped early")
        else:
            kept = {k: result[k] for k in sorted(result) if k in _KEPT}
            values = [float(v) for v in objectives]  # type: ignore[arg-type]
            self.study.complete(number, values, kept, float(result.get("constraint", 0.0)))

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Attaches to the journal again; trials that had not ended are suggested again under their numbers."""
        self._attach()

    def left(self) -> int:
        """Number of trials that have not ended yet."""
        return self.trials - sum(bool(t.state.is_finished()) for t in self.study.planned().values())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "study"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.study = SweepStudy(self.journal, self.name)

    def _ask(self, place: int) -> TrialConfig:
        """Asks the study for the trial at one place of the sweep and records its config."""
        turn, index = divmod(place, len(self.spaces))
        space = self.spaces[index]
        point = space.points[turn] if turn < len(space.points) else None
        values = {} if point is None else point.values
        searched = {p.name for p in space.parameters}
        sampler_seed = derive_seed("sampler", self.seed, place) % 2**32
        trial = self.study.ask(
            resolve("sampler", self.sampler)(sampler_seed, self.spaces),
            {f"{space.method}.{k}": v for k, v in values.items() if k in searched},
        )
        config = TrialConfig(
            number=trial.number,
            place=place,
            trial=f"{place:03d}-{space.method}",
            method=space.method,
            hyperparameters=space.ask(trial, values),
            seed=derive_seed("trial seed", self.seed, place),
            source="" if point is None else point.source,
        )
        self.study.plan(trial, config)
        return config


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)
