"""ParetoSearch: a Ray Tune searcher that suggests the trials of a sweep and records their results in its study.

What a suggestion sees is fixed by its place in the sweep (see `raysweep.search.window`), and each method is searched by itself, with
the same share of the trials. Results are recorded as they arrive; suggestions that must not see them yet see a trial under way.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raysweep.registry import resolve
from raysweep.search.outcome import FINAL, OBJECTIVES
from raysweep.search.spaces import Space
from raysweep.search.study import SweepStudy, TrialConfig, config_of
from raysweep.search.view import History
from raysweep.search.window import Window
from raysweep.settings import DISK
from raysweep.storage.seeds import derive_seed

_COSTS = ("train_s", "audit_s", "step_s", "probe")  # parts of a result that are kept of failed trials, too
_KEPT = ("residue", "damage", "residue_se", "damage_se", "over_forgetting", "validity", "digest", "views", *_COSTS)


class ParetoSearch(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Suggests settings to Tune and records how the trials ended.

    Args:
        journal: file of the study.
        name: name of the study.
        spaces: one per method, in the order in which methods take turns.
        trials, seed, sampler: as in `SearchConfig`.
        window: see `raysweep.search.window.resolve_window`.
        limits: the time limits that end a trial, in seconds, by setting.
        most: how many trials may be in flight at present; None: any number.
    """

    def __init__(
        self,
        journal: Path,
        name: str,
        spaces: list[Space],
        trials: int,
        window: int | None,
        seed: int,
        sampler: str = "tpe",
        limits: dict[str, float] | None = None,
        most: Callable[[], int] | None = None,
    ):
        super().__init__(metric=list(OBJECTIVES), mode=["min"] * len(OBJECTIVES))
        self.journal, self.name, self.spaces = journal, name, spaces
        self.trials, self.size, self.seed, self.sampler = trials, window, seed, sampler
        self.limits, self.most = limits or {}, most
        self._attach()

    def _attach(self) -> None:
        self.study = SweepStudy(self.journal, self.name)
        self.places: dict[str, int] = {}  # Tune's trial id -> place
        self._load()

    def _load(self) -> None:
        """Takes the state of all trials from the study."""
        self.window = Window(self.size, self.trials)
        self.histories = [History() for _ in self.spaces]
        self.ready: deque[int] = deque()  # places of trials that were planned and not handed over
        for place, trial in sorted(self.study.planned.items()):
            self._history(place).start(place, trial)
            if trial.state.is_finished():
                self.window.end(place)
            else:
                self.ready.append(place)

    def retry(self) -> list[str]:
        """Plans again, with the same settings, the trials that failed by a limit that is wider now, or on a full disk; their names.

        Called before the first suggestion.
        """
        again = []
        for place, trial in sorted(self.study.planned.items()):
            ended_by = trial.user_attrs.get("limit", {})
            wider = any(name == DISK or self.limits.get(name, 0) > limit for name, limit in ended_by.items())
            if trial.state.name == "FAIL" and wider:
                again.append(self.study.plan_again(place)["trial"])
        if again:
            self._load()
        return again

    def suggest(self, trial_id: str) -> TrialConfig | str | None:
        """The next trial's config; None: the results that it must see are not known yet; FINISHED: all were suggested."""
        if self.most is not None and len(self.places) >= self.most():
            return None
        place = len(self.study.planned)
        if self.ready:
            place = self.ready.popleft()
            self.study.annotate(place, "tune_id", trial_id)
            config = config_of(self.study.planned[place])
        elif place >= self.trials:
            return str(Searcher.FINISHED)
        elif place >= self.window.open:
            return None
        else:
            config = self._ask(place, trial_id)
        self.places[trial_id] = place
        return config

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records the end of a trial."""
        place = self.places.pop(trial_id, None)
        if place is None or self.study.planned[place].state.is_finished():
            return
        self._record(place, result or {}, error)
        self.window.end(place)

    def _record(self, place: int, result: dict[str, Any], error: bool) -> None:
        objectives = [result.get(name) for name in OBJECTIVES]
        if error or (result.get(FINAL) and not _finite(objectives)):
            fallback = "the trial ended with an error" if error else f"objectives are not finite: {objectives}"
            attributes: dict[str, Any] = {"result": json.dumps({k: result[k] for k in _COSTS if k in result})}
            if result.get("limit"):
                attributes["limit"] = {result["limit"]: self.limits.get(result["limit"], 0.0)}
            self.study.fail(place, result.get("reason") or fallback, **attributes)
        elif not result.get(FINAL):
            self.study.prune(place, result.get("reason") or "stopped early")
        else:
            kept = {k: result[k] for k in sorted(result) if k in _KEPT}
            values = [float(v) for v in objectives]  # type: ignore[arg-type]
            self.study.complete(place, values, kept, float(result.get("constraint", 0.0)))

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Attaches to the journal again; trials that had not ended are suggested again under their numbers."""
        self._attach()

    def left(self) -> int:
        """Number of trials that have not ended yet."""
        return self.trials - len(self.window.ended)

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("study", "window", "histories", "ready", "places", "most")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, most=None)
        self._attach()

    def _history(self, place: int) -> History:
        return self.histories[place % len(self.spaces)]

    def _ask(self, place: int, trial_id: str) -> TrialConfig:
        """Has the trial at one place of the sweep suggested, and records it with its config."""
        for known in self.window.news(place):
            self._history(known).learn(known, self.study.planned[known])
        turn, index = divmod(place, len(self.spaces))
        space = self.spaces[index]
        point = space.points[turn] if turn < len(space.points) else None
        values = {} if point is None else point.values
        searched = {p.name for p in space.parameters}
        asked, hyperparameters = self._history(place).ask(
            resolve("sampler", self.sampler)(derive_seed("sampler", self.seed, place) % 2**32, space),
            {f"{space.method}.{k}": v for k, v in values.items() if k in searched},
            self.study.count,
            lambda trial: space.ask(trial, values),
        )
        config = TrialConfig(
            place=place,
            trial=f"{place:03d}-{space.method}",
            method=space.method,
            hyperparameters=hyperparameters,
            seed=derive_seed("trial seed", self.seed, place),
            source="" if point is None else point.source,
        )
        self.study.plan(config, asked, tune_id=trial_id)
        self._history(place).start(place, self.study.planned[place])
        return config


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)
