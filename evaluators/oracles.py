"""Comparison of a model with oracles, which are a sample of all models that retraining could give.

Oracles retrained from other seeds differ from each other. A perfectly unlearned model is one more draw from the same population,
so its distance to the mean of k oracles has the error of a prediction, s sqrt(1 + 1/k), with s their standard deviation and
Student's t with k - 1 degrees of freedom. The spread s contains what the sampling of units (images, noises) adds to an oracle;
what it adds to the model beyond that is added.

Two questions need two errors:

- Is the model unlike an oracle? Its distance must exceed the error of a prediction: `se`, `interval`.
- Is the model within a margin of the oracles? The distance to their population's mean, which is known up to s / sqrt(k), must be
  within it: `upper`, `p_at_least`, `p_beyond`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.statistics import LEVEL, delong, paired_gap


@dataclass(frozen=True)
class Comparison:
    """A model's value minus the mean of the oracles.

    se: error of the difference to one further oracle; se_mean: of the difference to the mean of all possible oracles; df: degrees of
    freedom of both. oracles, spread: their number and standard deviation; None for one oracle, whose spread is unknown: both errors
    are then those of sampling alone.
    """

    difference: float
    se: float
    se_mean: float
    df: float
    oracles: int
    spread: float | None

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """(low, high) of the difference to one further oracle."""
        half = self.se * _t((1 - level) / 2, self.df)
        return self.difference - half, self.difference + half

    def p_at_most(self, limit: float) -> float:
        """One-sided p-value of "the difference to one further oracle is at most `limit`"."""
        return _tail(self.difference - limit, self.se, self.df)

    def upper(self, level: float = LEVEL) -> float:
        """The one-sided upper limit of the difference to the mean of all possible oracles."""
        return self.difference + self.se_mean * _t(1 - level, self.df)

    def p_excess(self, margin: float) -> float:
        """One-sided p-value: small if the model exceeds the oracles' mean by more than `margin`, and further than an oracle would."""
        over = _tail(self.difference - margin, self.se_mean, self.df)
        return max(over, self.p_at_most(0.0))

    def p_at_least(self, margin: float) -> float:
        """One-sided p-value of "the difference to the mean of all possible oracles is at least `margin`"."""
        return _tail(margin - self.difference, self.se_mean, self.df)

    def p_beyond(self, margin: float) -> float:
        """p-value of two one-sided tests of "the absolute difference to that mean is at least `margin`"."""
        return max(self.p_at_least(margin), _tail(margin + self.difference, self.se_mean, self.df))

    def draws_factor(self, margin: float, level: float = LEVEL) -> float:
        """The factor by which the units must grow to place the difference, as it is, on one side of `margin`; infinite if the
        oracles' own spread leaves it open with any number."""
        t = _t(1 - level, self.df)
        if self.difference > margin and self._like_a_further_oracle(self.oracles, t):
            return np.inf
        allowed = ((margin - self.difference) / t) ** 2
        oracles = 0.0 if self.spread is None else self.spread**2 / self.oracles
        sampling = self.se_mean**2 - oracles
        return max(1.0, sampling / (allowed - oracles)) if allowed > oracles else np.inf

    def oracles_needed(self, margin: float, level: float = LEVEL, most: int = 50) -> int | None:
        """The least number of oracles with which enough units would place the difference, as it is, on one side of `margin`.

        None for more than `most`, and for a spread that is unknown.
        """
        if self.spread is None:
            return None
        distance = abs(margin - self.difference)
        for k in range(max(2, self.oracles), most + 1):
            t = _t(1 - level, k - 1)
            unlike = self.difference <= margin or not self._like_a_further_oracle(k, t)
            if unlike and self.spread / math.sqrt(k) * t < distance:
                return k
        return None

    def _like_a_further_oracle(self, k: int, t: float) -> bool:
        """Whether the difference is within the error of a prediction by k oracles that differ as these do, however many units."""
        return self.spread is not None and self.difference <= t * self.spread * math.sqrt(1 + 1 / k)


def compare(
    value: float,
    oracles: Sequence[float] | np.ndarray,
    sampling: float,
    oracle_sampling: Sequence[float] | np.ndarray = (),
    df: float = np.inf,
) -> Comparison:
    """The comparison of a value with those of oracles (k,), k >= 1.

    sampling: standard error that the sampling of units gives to the difference between the value and the oracles' mean, with `df`
    degrees of freedom, which count for one oracle alone. oracle_sampling (k,): the same of each oracle against the mean of the
    others, so of what their spread contains already; empty: none.
    """
    values = np.asarray(oracles, dtype=float)
    k, difference, sampled = len(values), float(value - values.mean()), float(sampling) ** 2
    if k < 2:
        return Comparison(difference, math.sqrt(sampled), math.sqrt(sampled), df, k, None)
    spread = float(values.std(ddof=1))
    known = float(np.square(oracle_sampling).mean()) if len(oracle_sampling) else 0.0
    predicted = spread**2 * (1 + 1 / k)
    se = math.sqrt(predicted + max(0.0, sampled - min(known, predicted)))
    # a small spread may be chance, so the larger degrees of freedom of the sampling must not shorten the interval
    return Comparison(difference, se, math.sqrt(spread**2 / k + sampled), k - 1, k, spread)


def compare_units(units: np.ndarray, oracles: np.ndarray, floor: float = 0.0) -> Comparison:
    """The comparison of a mean of units (n,), n >= 2, with those of oracles (n, k) on the same units.

    floor: least standard error of sampling, for shares near 0 or 1, where units may all be equal by chance.
    """
    n, k = oracles.shape

    def error(differences: np.ndarray) -> float:
        return max(floor, float(differences.std(ddof=1)) / np.sqrt(n))

    rest = [oracles[:, i] - np.delete(oracles, i, 1).mean(1) for i in range(k)] if k > 1 else []
    sampling = error(units - oracles.mean(1))
    return compare(float(units.mean()), oracles.mean(0), sampling, [error(r) for r in rest], n - 1)


def compare_auc(pos: np.ndarray, neg: np.ndarray, pos_ref: np.ndarray, neg_ref: np.ndarray) -> Comparison:
    """The comparison of the AUC of scores (n,) and (m,) with those of oracles, (n, k) and (m, k), on the same images."""
    k = pos_ref.shape[1]
    aucs = [delong(pos_ref[:, i], neg_ref[:, i])[0] for i in range(k)]
    rest = [
        paired_gap(pos_ref[:, i], neg_ref[:, i], np.delete(pos_ref, i, 1), np.delete(neg_ref, i, 1))[1]
        for i in range(k)
        if k > 1
    ]
    return compare(delong(pos, neg)[0], aucs, paired_gap(pos, neg, pos_ref, neg_ref)[1], rest)


def _t(tail: float, df: float) -> float:
    """The quantile of Student's t that is exceeded with probability `tail`."""
    from scipy import stats

    return float(stats.t.isf(tail, df))


def _tail(difference: float, se: float, df: float) -> float:
    """P(T >= difference / se); 0 or 1 without an error."""
    from scipy import stats

    return float(stats.t.sf(difference / se, df)) if se > 0 else float(difference <= 0)
