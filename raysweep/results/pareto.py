"""Fronts, hypervolume and dominance under noise. Objectives are minimised unless a function says otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import moocore
import numpy as np

from evaluators.statistics import jackknife_interval

REFERENCE = (1.1, 1.1)  # fixed beforehand in anchored units, so that hypervolumes of different sweeps compare


def front(points: np.ndarray, directions: Sequence[str]) -> list[int]:
    """Indices of the points (n, k) that no other point dominates, in order; equal points are all kept.

    directions: "min" or "max" per objective. A point with a value that is not finite is never on the front.
    """
    sign = np.array([{"min": 1.0, "max": -1.0}[d] for d in directions])
    costs = np.asarray(points, dtype=float).reshape(-1, len(sign)) * sign
    usable = np.flatnonzero(np.isfinite(costs).all(1))
    return [int(i) for i in usable[_undominated(costs[usable])]]


def hypervolume(points: np.ndarray, reference: Sequence[float] = REFERENCE) -> float:
    """Volume between the points (n, k) and the reference that at least one of them dominates; both minimised."""
    kept = np.asarray(points, dtype=float).reshape(-1, len(reference))
    kept = kept[np.isfinite(kept).all(1) & (kept < np.asarray(reference)).all(1)]
    return float(moocore.hypervolume(kept, ref=list(reference))) if len(kept) else 0.0


def resample(values: np.ndarray, replicates: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired draws (draws, n, k) of n points with k objectives from their leave-one-group-out values, cut at 0.

    values: (n, k); replicates: (n, groups, k), both before the cut, group g being the same units for every point. Groups'
    pseudo-values are drawn with replacement, the same groups for all points, so that what points share cancels in their
    differences: the oracles' own spread, too, which moves all points alike.
    """
    groups = replicates.shape[1]
    pseudo = groups * values[:, None, :] - (groups - 1) * replicates
    picks = np.random.Generator(np.random.Philox(seed)).integers(groups, size=(draws, groups))
    drawn: np.ndarray = np.maximum(0.0, np.stack([pseudo[:, pick, :].mean(1) for pick in picks]))
    return drawn


def dominance_probability(draws: np.ndarray, over: np.ndarray | None = None) -> np.ndarray:
    """P[i, j]: the share of draws (draws, n, k) in which point i dominates the j-th of the points `over`, shape (n, points).

    over: their indices; None for all. One draw at a time, because all pairs in all draws would not fit in memory.
    """
    others = draws if over is None else draws[:, over]
    counts = np.zeros((draws.shape[1], others.shape[1]), dtype=np.int32)
    for mine, theirs in zip(draws, others, strict=True):
        pairs = [(a[:, None], b[None, :]) for a, b in zip(mine.T, theirs.T, strict=True)]
        no_worse = np.logical_and.reduce([a <= b for a, b in pairs])
        counts += no_worse & np.logical_or.reduce([a < b for a, b in pairs])
    probability: np.ndarray = counts / len(draws)
    return probability


def dominated_probability(draws: np.ndarray) -> np.ndarray:
    """The share of draws (draws, n, k) in which some other point dominates point i, (n,)."""
    probability: np.ndarray = np.mean([~_undominated(draw) for draw in draws], axis=0)
    return probability


def undecided(draws: np.ndarray, certain: float = 0.95) -> list[int]:
    """Indices of the points to measure again: those neither on nor off the front with probability `certain`, and those that
    may dominate them."""
    chance = dominated_probability(draws)
    is_open = (chance > 1 - certain) & (chance < certain)
    rivals = (dominance_probability(draws, np.flatnonzero(is_open)) > 1 - certain).any(1)
    return [int(i) for i in np.flatnonzero(is_open | rivals)]


def hypervolume_interval(
    points: np.ndarray, replicates: np.ndarray, reference: Sequence[float] = REFERENCE, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the hypervolume of points (n, k) by the jackknife over their groups of units, replicates (n, groups, k).

    Given these oracles: their spread is not in it. Resampling the points would be biased: noise pushes some of them outwards, so
    their hypervolume is too large.
    """
    cut = np.maximum(0.0, replicates)
    volumes = np.array([hypervolume(cut[:, g], reference) for g in range(cut.shape[1])])
    _, low, high = jackknife_interval(hypervolume(points, reference), volumes, level)
    return max(0.0, low), high


def balanced(points: np.ndarray) -> int:
    """The index with the smallest worst objective, ties by the sum: the default recommendation."""
    points = np.asarray(points, dtype=float)
    order = np.lexsort((points.sum(1), points.max(1)))
    return int(order[0])


def knee(points: np.ndarray) -> int:
    """The index of the point of the front farthest below the line through its ends, objectives scaled to the front's range.

    With fewer than three points on the front, or none below the line, the `balanced` one of them.
    """
    points = np.asarray(points, dtype=float)
    members = front(points, ("min", "min"))
    span = points[members]
    scale = np.ptp(span, axis=0)
    if len(members) > 2 and scale.min() > 0:
        below = 1 - ((span - span.min(0)) / scale).sum(1)  # the ends are (0, 1) and (1, 0): their line is x + y = 1
        if below.max() > 0:
            return members[int(np.argmax(below))]
    return members[balanced(span)]


def attainment(sets: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Corners (m, 2) of the region that at least `share` of the sets of points (n_s, 2) attain, by `moocore`; minimised.

    An empty set attains nothing and still counts as one of the sets; (0, 2) where too few sets attain anything.
    Empirical attainment function (Fonseca, Grunert da Fonseca and Paquete, 2005): the 50 % one is a median front.
    """
    full = [s for s in sets if len(s)]
    needed = math.ceil(round(share * len(sets), 9))
    if not full or needed > len(full):
        return np.empty((0, 2))
    owner = np.repeat(np.arange(1, len(full) + 1), [len(s) for s in full])
    corners = np.asarray(moocore.eaf(np.concatenate(full), sets=owner, percentiles=[100 * needed / len(full)]))
    return corners[np.argsort(corners[:, 0]), :2]


def _undominated(costs: np.ndarray) -> np.ndarray:
    """Whether no other point dominates each of the points (n, k), all of them finite and minimised; equal points are all kept."""
    if not len(costs):
        return np.zeros(0, dtype=bool)
    kept: np.ndarray = moocore.is_nondominated(costs, keep_weakly=True)
    return kept
