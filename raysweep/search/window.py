"""The window of a search: how many suggestions are made ahead of results, so that slots stay busy and order does not matter.

A suggestion sees the results of all trials but the `window` - 1 before it, and waits until all that it sees have ended. What
it sees is thus fixed by its position: neither the number of workers nor the order in which trials end can change it. At most
`window` trials are under way, so a window somewhat above the trials that the cluster holds keeps the slots busy while a long
trial holds back the suggestions behind it.
"""

from __future__ import annotations

import math
from itertools import islice

from raysweep.config.sections import SearchConfig

SPARE = 0.6  # window over trials in flight, per doubling of these; benchmarks/utilisation.py shows what it gives
LEARNS_NOTHING = "random"  # this sampler's suggestions need no results, so none waits


def resolve_window(settings: SearchConfig, concurrent: int) -> int | None:
    """The window of a search on a cluster with so many trials in flight; None if suggestions wait for nothing.

    `auto` is a multiple of the trials in flight that grows with their logarithm, as the longest of so many trials does. At least half
    of the trials are suggested from results, even where that leaves slots idle.
    """
    if settings.asynchronous or settings.sampler == LEARNS_NOTHING:
        return None
    if settings.window != "auto":
        return settings.window
    ahead = max(concurrent, round(SPARE * concurrent * math.log2(concurrent)))
    return max(1, min(ahead, settings.trials // 2))


class Window:
    """Counts which trials of a sweep have ended, by their positions; says how far suggestions may go ahead, and what they see.

    Args:
        size: the window; None: suggestions wait for nothing and see whatever has ended.
        trials: number of trials.
    """

    def __init__(self, size: int | None, trials: int):
        self.size, self.trials = size, trials
        self.ended: dict[int, None] = {}  # positions, in the order in which they ended
        self.first = 0  # first position that has not ended
        self.seen = 0  # number of positions that `news` has returned

    def end(self, place: int) -> None:
        """Notes that the trial at a position has ended."""
        self.ended[place] = None
        while self.first in self.ended:
            self.first += 1

    @property
    def open(self) -> int:
        """All positions below this one may be suggested."""
        return self.trials if self.size is None else min(self.trials, self.first + self.size)

    def news(self, place: int) -> list[int]:
        """Positions whose results the suggestion at `place` sees, and no earlier suggestion saw, in the order to learn them."""
        if self.size is None:
            positions = list(islice(self.ended, self.seen, None))
        else:
            positions = list(range(self.seen, place - self.size + 1))
        self.seen += len(positions)
        return positions
