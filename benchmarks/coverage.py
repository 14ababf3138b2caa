"""Coverage of the audit's intervals: the share that contains the true value, at nominal 95 %.

    python benchmarks/coverage.py            # prints a table; about three minutes

Each line draws data with a known true value, computes the interval as the audit does, and counts. The interval of the count is
Clopper and Pearson's. Exact intervals are expected to exceed 95 %.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
from ground import machine
from scipy import stats

from evaluators.statistics import (
    auc_interval,
    clopper_pearson,
    frechet,
    jackknife_interval,
    kid,
    normal_interval,
    paired_gap,
    t_interval,
)
from raysweep.results import pareto

GROUPS = 20
Case = Callable[[np.random.Generator], tuple[float, float, float]]


def share(rate: float, n: int) -> Case:
    """A proportion."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        return rate, *clopper_pearson(int(rng.binomial(n, rate)), n)

    return case


def prompts(count: int, each: int) -> Case:
    """A proportion of samples of several prompts, each with its own rate, around the mean of these rates."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        rates = rng.beta(0.5, 1.0, count)
        return float(rates.mean()), *clopper_pearson(int(rng.binomial(each, rates).sum()), count * each)

    return case


def auc(shift: float, n: int, m: int) -> Case:
    """The AUC of two normal distributions."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        interval = auc_interval(rng.normal(shift, 1, n), rng.normal(0, 1, m))
        return float(stats.norm.cdf(shift / np.sqrt(2))), *interval[2:]

    return case


def paired_auc(n: int, common: float = 0.8) -> Case:
    """The difference of the AUCs of two scorers that share most of their noise."""

    def case(rng: np.random.Generator) -> tuple[float, float, float]:
        noise = rng.normal(size=(2, n))
        a, b = (common * noise + np.sqrt(1 - common**2) * rng.normal(size=(2, n)) for _ in range(2))
        delta, se = paired_gap(a[0] + 1.0, a[1], b[0][:, None] + 0.5, b[1][:, None])
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
    """Mean of the distance over samples of size n."""
    reference = np.random.default_rng(99).normal(size=(2000, d))
    rng = np.random.default_rng(7)
    return float(np.mean([statistic(rng.normal(0.3, 1.2, (n, d)), reference) for _ in range(repeats)]))


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
        candidate, base, oracle = (rng.normal(m, 0.4, units) for m in (0.3, 1.0, 0.0))

        def value(keep: np.ndarray) -> float:
            return float((candidate[keep].mean() - oracle[keep].mean()) / (base[keep].mean() - oracle[keep].mean()))

        index = np.arange(units)
        parts = np.array([value(index % GROUPS != g) for g in range(GROUPS)])
        return 0.3, *jackknife_interval(value(index >= 0), parts)[1:]

    return case


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    cases: dict[str, tuple[Case, int]] = {
        "Clopper-Pearson, 3 % of 200": (share(0.03, 200), 4000),
        "Clopper-Pearson, 200 samples of 10 prompts": (prompts(10, 20), 4000),
        "DeLong, AUC 0.5, 100 and 100": (auc(0.0, 100, 100), 2000),
        "DeLong, AUC 0.76, 50 and 50": (auc(1.0, 50, 50), 2000),
        "paired DeLong, 100 and 100": (paired_auc(100), 2000),
        "Frechet distance, n = 400, jackknife": (distance(frechet, 400, expectation(frechet, 400)), 800),
        "KID, n = 400, jackknife": (distance(kid, 400, expectation(kid, 400)), 800),
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
