"""The terms of residue and damage: one metric of a model and of the oracles, on the scale that measured models fix. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluators.oracles import Comparison, compare
from evaluators.statistics import jackknife_se

Transform = Callable[[float], float]


@dataclass(frozen=True)
class Measured:
    """Metric values and their leave-one-group-out replicates (groups,), both by "check.metric".

    absent: reason why a metric has no value, by "check.metric". floors: least standard error of a share, whose units may all be
    equal by chance.
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    absent: dict[str, str] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Number of groups of units; the smallest if metrics differ in it."""
        return min((len(r) for r in self.replicates.values()), default=0)

    def has(self, metric: str) -> bool:
        """Whether the metric was measured and is finite."""
        return bool(np.isfinite(self.values.get(metric, np.nan)))

    def why_absent(self, metric: str) -> str:
        """The reason why the metric has no finite value."""
        if metric in self.values:
            return f"it is {self.values[metric]:g}"
        if metric in self.absent:
            return self.absent[metric]
        check = metric.partition(".")[0]  # a failed check lists only its main metrics
        reasons = (reason for name, reason in self.absent.items() if name.startswith(f"{check}."))
        return next(reasons, f"{check} does not give it")

    def without(self, group: int) -> Mapping[str, float]:
        """The values without one group of units."""
        return {name: float(r[group]) for name, r in self.replicates.items()}


@dataclass(frozen=True)
class Term:
    """A model's value and those of the oracles (k,), in one unit, and the sampling errors of their differences.

    sampling: of the model to the oracles' mean, on `df` degrees of freedom; oracle_sampling (k,): of each oracle to the mean of
    the others, empty for one oracle.
    """

    value: float
    oracles: np.ndarray
    sampling: float
    oracle_sampling: np.ndarray
    df: float

    @property
    def comparison(self) -> Comparison:
        """The model against the oracles."""
        return compare(self.value, self.oracles, self.sampling, self.oracle_sampling, self.df)

    def scaled(self, factor: float) -> Term:
        """In another unit, of which one old unit is `factor`; a negative one turns the direction."""
        size = abs(factor)
        return Term(
            self.value * factor, self.oracles * factor, self.sampling * size, self.oracle_sampling * size, self.df
        )


def term(model: Measured, oracles: Sequence[Measured], metric: str, transform: Transform = float) -> Term:
    """One metric of a model and of the oracles, after a monotonic `transform`."""
    floor = model.floors.get(metric, 0.0)
    rows = [_replicates(oracle, metric, transform) for oracle in oracles]

    def error(replicates: np.ndarray, others: Sequence[np.ndarray]) -> float:
        return max(floor, float(jackknife_se(replicates - np.mean(others, axis=0))))

    rest = [error(row, rows[:k] + rows[k + 1 :]) for k, row in enumerate(rows)] if len(rows) > 1 else []
    own = _replicates(model, metric, transform)
    return Term(
        value=transform(model.values[metric]),
        oracles=np.array([transform(oracle.values[metric]) for oracle in oracles]),
        sampling=error(own, rows),
        oracle_sampling=np.array(rest),
        df=len(own) - 1,
    )


def mean_over_rounds(terms: Sequence[Term]) -> Term:
    """The mean of one term over independent rounds of audits.

    Only the sampling error shrinks with the number of rounds: the oracles are the same models in each.
    """
    count = len(terms)
    return Term(
        value=float(np.mean([t.value for t in terms])),
        oracles=np.mean([t.oracles for t in terms], axis=0),
        sampling=float(np.sqrt(np.sum([t.sampling**2 for t in terms])) / count),
        oracle_sampling=np.sqrt(np.sum([t.oracle_sampling**2 for t in terms], axis=0)) / count,
        df=float(np.sum([t.df for t in terms])),
    )


def _replicates(model: Measured, metric: str, transform: Transform) -> np.ndarray:
    return np.array([transform(float(value)) for value in model.replicates[metric]])


def columns_of(comparison: Comparison | None) -> dict[str, Any]:
    """A comparison with the oracles as the columns of `storage.schemas.ROWS` that only such rows have; all None without one."""
    names = ("oracles", "spread", "df", "se_mean")
    return {name: None if comparison is None else getattr(comparison, name) for name in names}


def comparison_of(row: Mapping[str, Any]) -> Comparison | None:
    """The comparison with the oracles behind a row; None for other rows."""
    if row["oracles"] is None:
        return None
    return Comparison(row["value"], row["se"], row["se_mean"], row["df"], row["oracles"], row["spread"])
