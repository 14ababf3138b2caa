"""Membership of a single image: its rank among images that were never trained on, beside the ranks that oracles give it.

With one forgotten image there is no ROC curve: the share of unseen images that score below it is a rank. It is no
probability of membership, and 0.5 is not what an innocent model gives, because some images are easier than others for every
model. What counts is `gap`, the rank minus the mean of the oracles' ranks. Model and oracles see the same unseen images, so
its uncertainty is that of the oracles: an innocent model is one more oracle (`evaluators.oracles`).
"""

from __future__ import annotations

import numpy as np

from evaluators.metrics import Metric
from evaluators.oracles import compare
from evaluators.statistics import delong

ONE_IMAGE = "one image: an AUC would be a rank"


def mid_rank(scores: np.ndarray, others: np.ndarray) -> float:
    """The share of `others` (m,) below the one score in `scores` (1,), half of the ties included, 0 to 1."""
    return delong(scores, others)[0]


def rank_rows(
    pos: np.ndarray, neg: np.ndarray, oracles: tuple[np.ndarray, np.ndarray] | None, lack: str
) -> list[Metric]:
    """`rank` and `gap` of one image from its score (1,) and those of unseen images (m,), larger for members.

    oracles: the oracles' scores of the same, (1, k) and (m, k); None, with the reason `lack`, if there are none.
    """
    rank, m = mid_rank(pos, neg), len(neg)
    position = m * (1 - rank) + 1
    words = f"one image: rank {position:g} of {m + 1} among {m} unseen images, 1 the most like a training image"
    if oracles is None:
        return [Metric("rank", rank, 1, reason=words), Metric.absent("gap", lack, n=1)]
    ranks = np.array([mid_rank(oracles[0][:, k], oracles[1][:, k]) for k in range(oracles[0].shape[1])])
    shown = f"{'oracle' if len(ranks) == 1 else 'oracles'}: {', '.join(f'{r:.2f}' for r in ranks)}"
    return [Metric("rank", rank, 1, reason=f"{words}; {shown}"), _gap(rank, ranks)]


def _gap(rank: float, ranks: np.ndarray) -> Metric:
    """The rank minus the mean of the oracles' ranks (k,), with the prediction error of one further oracle."""
    comparison, k = compare(rank, ranks, 0.0), len(ranks)
    if comparison.spread is None:
        lack = "the spread of oracles needs at least two of them"
        return Metric("gap", comparison.difference, 1, reason=f"no interval: {lack}")
    if comparison.spread == 0:
        return Metric("gap", comparison.difference, 1, reason=f"no interval: all {k} oracles give the same rank")
    lo, hi = comparison.interval()
    return Metric(
        "gap",
        comparison.difference,
        1,
        se=comparison.se,
        lo=max(-1.0, lo),
        hi=min(1.0, hi),
        interval="student-t for one further oracle",
        comparison=comparison,
        reason=f"rank minus the mean of {k} oracles; an interval with 0 is that of a model like one further oracle",
    )
