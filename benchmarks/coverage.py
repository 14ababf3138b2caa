"""How often each interval holds the truth, at nominal 95 %.

    python benchmarks/coverage.py            # prints a table; about three minutes

Each line draws data for which the truth is known, makes the interval as the audit does, and counts. The count's own interval is
Clopper and Pearson's. Where an interval is exact or holds at every look, more than 95 % is as it should be.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from ground import machine
from scipy import stats

from evaluators.statistics import (
    anytime_interval,
    auc_interval,
    clopper_pearson,
    cluster_interval,
    delong_paired,
    frechet,
    jackknife_interval,
    kid,
    normal_interval,
    t_interval,
    wilson,
)
from raysweep import pareto

GROUPS = 20
Case = Callable[[np.random.Generator], tuple[float, float, float]]


def share(rate: float, n: int, interval: Callable) -> Case:
    """A proportion."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        return rate, *interval(int(rng.binomial(n, rate)), n)

    return case


def auc(shift: float, n: int, m: int) -> Case:
    """The AUC of two normal distributions."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        found = auc_interval(rng.normal(shift, 1, n), rng.normal(0, 1, m))
        return float(stats.norm.cdf(shift / np.sqrt(2))), *found[2:]

    return case


def paired_auc(n: int, common: float = 0.8) -> Case:
    """The difference of the AUCs of two scorers that share most of their noise."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        noise = rng.normal(size=(2, n))
        a, b = (common * noise + np.sqrt(1 - common**2) * rng.normal(size=(2, n)) for _ in range(2))
        delta, se = delong_paired(a[0] + 1.0, a[1], b[0] + 0.5, b[1])
        truth = stats.norm.cdf(1 / np.sqrt(2)) - stats.norm.cdf(0.5 / np.sqrt(2))
        return float(truth), *normal_interval(delta, se)

    return case


def distance(statistic: Callable, n: int, truth: float, d: int = 8) -> Case:
    """A distance between features by the delete-a-group jackknife, around its own expectation at this n."""
    reference = np.random.default_rng(99).normal(size=(2000, d))

    def value(x: np.ndarray) -> float:
        return statistic(x, reference)

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        groups = np.array_split(rng.normal(0.3, 1.2, (n, d)), GROUPS)
        parts = [value(np.concatenate([*groups[:g], *groups[g + 1 :]])) for g in range(GROUPS)]
        return truth, *jackknife_interval(value(np.concatenate(groups)), np.array(parts))[1:]

    return case


def expectation(statistic: Callable, n: int, d: int = 8, repeats: int = 400) -> float:
    """What the distance is on average over samples of size n."""
    reference = np.random.default_rng(99).normal(size=(2000, d))
    rng = np.random.default_rng(7)
    return float(np.mean([statistic(rng.normal(0.3, 1.2, (n, d)), reference) for _ in range(repeats)]))


def clusters(n: int, per: int) -> Case:
    """A mean over prompts with several images each."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        values = (rng.normal(size=(n, 1)) + rng.normal(size=(n, per))).ravel()
        found = cluster_interval(values, np.repeat(np.arange(n), per), draws=500)
        return 0.0, *found[1:]

    return case


def mean(n: int) -> Case:
    """A mean of a skewed quantity."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        return 1.0, *t_interval(rng.gamma(4, 0.25, n))[1:]

    return case


def hypervolume(units: int) -> Case:
    """The hypervolume of three points, each a mean over units."""
    centre = np.array([[0.1, 0.6], [0.3, 0.3], [0.7, 0.1]])
    truth = pareto.hypervolume(centre)

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        data = centre[:, None] + 0.3 * rng.normal(size=(3, units, 2))
        parts = np.stack([np.delete(data, np.arange(g, units, GROUPS), 1).mean(1) for g in range(GROUPS)], 1)
        return truth, *pareto.hypervolume_interval(data.mean(1), parts)

    return case


def objective(units: int) -> Case:
    """A ratio of differences of means, as an objective is, by the jackknife."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        own, base, oracle = (rng.normal(m, 0.4, units) for m in (0.3, 1.0, 0.0))

        def value(keep: np.ndarray) -> float:
            return float((own[keep].mean() - oracle[keep].mean()) / (base[keep].mean() - oracle[keep].mean()))

        index = np.arange(units)
        parts = np.array([value(index % GROUPS != g) for g in range(GROUPS)])
        return 0.3, *jackknife_interval(value(index >= 0), parts)[1:]

    return case


def main() -> None:
    """Prints the table."""
    cases: dict[str, tuple[Case, int]] = {
        "Clopper-Pearson, 3 % of 200": (share(0.03, 200, clopper_pearson), 4000),
        "Wilson, 3 % of 200": (share(0.03, 200, wilson), 4000),
        "Wilson, 40 % of 60": (share(0.4, 60, wilson), 4000),
        "any time, 10 % of 300, at the end": (share(0.1, 300, anytime_interval), 1000),
        "DeLong, AUC 0.5, 100 and 100": (auc(0.0, 100, 100), 2000),
        "DeLong, AUC 0.76, 50 and 50": (auc(1.0, 50, 50), 2000),
        "paired DeLong, 100 and 100": (paired_auc(100), 2000),
        "Frechet distance, n = 400, jackknife": (distance(frechet, 400, expectation(frechet, 400)), 800),
        "KID, n = 400, jackknife": (distance(kid, 400, expectation(kid, 400)), 800),
        "mean over 30 prompts of 5 images, BCa": (clusters(30, 5), 1000),
        "mean of 20 skewed values, Student": (mean(20), 4000),
        "hypervolume, jackknife": (hypervolume(200), 1000),
        "objective (ratio), jackknife": (objective(60), 2000),
    }
    print(f"{machine()}\n\n| interval | holds the truth | draws |\n|---|---|---|")
    for name, (case, draws) in cases.items():
        rng = np.random.default_rng(0)
        held = sum(low <= truth <= high for truth, low, high in (case(rng) for _ in range(draws)))
        low, high = clopper_pearson(held, draws)
        print(f"| {name} | {held / draws:.3f} ({low:.3f} to {high:.3f}) | {draws} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
