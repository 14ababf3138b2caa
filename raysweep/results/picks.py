"""Other ways to choose among the audited candidates, how stable each is, and which candidates are shown to have forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.results import pareto
from raysweep.results.choice import FORGOTTEN

RATE = 0.05  # of false discoveries over a sweep's candidates


@dataclass(frozen=True)
class Picks:
    """Candidates picked by rules.

    balanced: smallest larger objective; knee: knee of the front; each with the share of paired resamples in which the rule
    picks the same candidate. forgotten: those whose residue is shown to be under `FORGOTTEN` against the mean of all possible
    oracles, with the rate of false discoveries over the sweep's candidates held to `RATE`. sure: of these the one with the least
    damage, None without any.
    """

    balanced: str
    balanced_share: float
    knee: str
    knee_share: float
    sure: str | None
    forgotten: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The entry of front.json under "picks"."""
        return {
            "balanced": {"trial": self.balanced, "share": self.balanced_share},
            "knee": {"trial": self.knee, "share": self.knee_share},
            "sure": {"trial": self.sure, "limit": FORGOTTEN},
            "forgotten": {"trials": list(self.forgotten), "limit": FORGOTTEN, "rate": RATE},
        }


def pick(names: Sequence[str], points: np.ndarray, draws: np.ndarray, p_residue: Sequence[float]) -> Picks:
    """The picks among at least one candidate.

    points: (n, 2); draws: paired resamples (draws, n, 2); p_residue: p-value of each of "the residue is at least `FORGOTTEN`".
    """
    from scipy import stats

    balanced, knee = pareto.balanced(points), pareto.knee(points)
    shown = [k for k, q in enumerate(stats.false_discovery_control(p_residue)) if q < RATE]
    return Picks(
        balanced=names[balanced],
        balanced_share=_share(draws, pareto.balanced, balanced),
        knee=names[knee],
        knee_share=_share(draws, pareto.knee, knee),
        sure=names[min(shown, key=lambda k: points[k, 1])] if shown else None,
        forgotten=tuple(names[k] for k in shown),
    )


def _share(draws: np.ndarray, rule: Callable[[np.ndarray], int], index: int) -> float:
    """In how many of the resamples a rule picks the same candidate."""
    return float(np.mean([rule(draw) == index for draw in draws]))
