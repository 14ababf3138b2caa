"""A simulation of a search in simulated time: how busy its slots are, given the lengths of its trials."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from raysweep.search.window import Window


class Searches(Protocol):
    """The part of a searcher that a simulation drives; `suggest` returns a mapping with `place`, or anything else to wait."""

    def suggest(self, trial_id: str) -> Any: ...
    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Timeline:
    """What a simulated search took.

    slots: trials that train at once; seconds: until the last trial ended; busy: share of the slots' time in training, 0 to 1.
    """

    slots: int
    seconds: float
    busy: float


class Ahead:
    """A searcher that suggests nothing but positions, by the rule of the window."""

    def __init__(self, window: int | None, trials: int):
        self.window, self.next = Window(window, trials), 0

    def suggest(self, trial_id: str) -> dict[str, int] | None:
        if self.next >= self.window.open:
            return None
        self.next += 1
        return {"place": self.next - 1}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None:
        self.window.end(result["place"])


def simulate(
    searcher: Searches,
    slots: int,
    auditors: int,
    concurrent: int,
    train: Callable[[int], float],
    probe: Callable[[int], float],
    result: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Timeline:
    """Runs a search in simulated time: each trial waits for a slot, trains, waits for an auditor and is probed.

    Args:
        concurrent: trials in flight, at most.
        train, probe: seconds of both parts of a trial, by its place.
        result: what a trial reports, given its config.
    """
    now, busy = 0.0, 0.0
    free = {train: slots, probe: auditors}
    waiting: dict[Any, deque[str]] = {train: deque(), probe: deque()}
    events: list[tuple[float, int, Any, str]] = []  # (time, tie-break, part that ends, trial)
    configs: dict[str, Any] = {}  # of trials in flight
    order = count()
    while True:
        while len(configs) < concurrent and isinstance(config := searcher.suggest(trial := str(next(order))), dict):
            configs[trial] = config
            waiting[train].append(trial)
        for part in (train, probe):
            while free[part] and waiting[part]:
                trial = waiting[part].popleft()
                seconds = part(configs[trial]["place"])
                free[part] -= 1
                busy += seconds if part is train else 0.0
                heapq.heappush(events, (now + seconds, next(order), part, trial))
        if not events:
            return Timeline(slots, now, busy / (slots * now) if now else 0.0)
        now, _, part, trial = heapq.heappop(events)
        free[part] += 1
        if part is train:
            waiting[probe].append(trial)
        else:
            searcher.on_trial_complete(trial, result(configs.pop(trial)))
