"""Other ways to choose among the audited candidates, how stable each is, and which candidates are shown to have forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysweep.results import pareto
from raysweep.results.choice import FORGOTTEN

RATE = 0.05  # of false discoveries over a sweep's candidates
CERTAIN = 0.95  # share of paired resamples from which something counts as sure


@dataclass(frozen=True)
class Picks:
    """Candidates picked by rules.

    balanced: smallest larger objective; knee: knee of the front; each with the share of paired resamples in which the rule
    picks the same candidate. sure: least damage among those whose residue is at most `FORGOTTEN` in a share `CERTAIN` of
    resamples, None if there is none. forgotten: those whose residue is shown to be under `FORGOTTEN`, with the rate of false
    discoveries over the sweep's candidates held to `RATE`.
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
            "sure": {"trial": self.sure, "limit": FORGOTTEN, "certain": CERTAIN},
            "forgotten": {"trials": list(self.forgotten), "limit": FORGOTTEN, "rate": RATE},
        }


def pick(names: Sequence[str], points: np.ndarray, draws: np.ndarray, residue_se: Sequence[float]) -> Picks:
    """The picks among at least one candidate.

    points: (n, 2); draws: paired resamples (draws, n, 2); residue_se: standard error of each residue.
    """
    balanced, knee = pareto.balanced(points), pareto.knee(points)
    sure = pareto.within(points, draws, FORGOTTEN, CERTAIN)
    return Picks(
        balanced=names[balanced],
        balanced_share=_share(draws, pareto.balanced, balanced),
        knee=names[knee],
        knee_share=_share(draws, pareto.knee, knee),
        sure=None if sure is None else names[sure],
        forgotten=tuple(name for name, q in zip(names, _q_values(points[:, 0], residue_se), strict=True) if q < RATE),
    )


def _share(draws: np.ndarray, rule: Callable[[np.ndarray], int], index: int) -> float:
    """In how many of the resamples a rule picks the same candidate."""
    return float(np.mean([rule(draw) == index for draw in draws]))


def _q_values(residue: np.ndarray, residue_se: Sequence[float]) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p values of "the residue is at least `FORGOTTEN`", one-sided normal tests, (n,)."""
    from scipy import stats

    p = [
        float(stats.norm.cdf((value - FORGOTTEN) / se)) if se > 0 else float(value >= FORGOTTEN)
        for value, se in zip(residue, residue_se, strict=True)
    ]
    adjusted: np.ndarray = stats.false_discovery_control(p)
    return adjusted
