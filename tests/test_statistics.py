"""Intervals and distances against brute force, theory and simulation."""

import numpy as np
import pytest
from scipy import stats

from evaluators.statistics import (
    clopper_pearson,
    delong,
    delong_paired,
    frechet,
    jackknife,
    jackknife_se,
    kid,
    normal_interval,
)


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in pos for n in neg]
    assert delong(pos, neg)[0] == pytest.approx(np.mean(pairs))
    assert delong(-pos, -neg)[0] == pytest.approx(1 - np.mean(pairs))
    assert delong(np.ones(5), np.ones(7))[0] == 0.5


def test_delong_covers():
    rng = np.random.default_rng(1)
    true = stats.norm.cdf(0.7 / np.sqrt(2))
    covered = 0
    for _ in range(600):
        auc, se = delong(rng.normal(0.7, 1, 60), rng.normal(0, 1, 60))
        lo, hi = normal_interval(auc, se)
        covered += lo <= true <= hi
    assert 0.92 <= covered / 600 <= 0.97


def test_paired_difference_is_zero_for_the_same_scores_and_sharper_than_unpaired():
    rng = np.random.default_rng(2)
    pos, neg = rng.normal(0.5, 1, 200), rng.normal(0, 1, 200)
    delta, se = delong_paired(pos, neg, pos, neg)
    assert (delta, se) == (0.0, 0.0)
    other_pos, other_neg = pos + rng.normal(0, 0.2, 200), neg + rng.normal(0, 0.2, 200)
    _, paired = delong_paired(pos, neg, other_pos, other_neg)
    assert paired < 0.5 * np.hypot(delong(pos, neg)[1], delong(other_pos, other_neg)[1])


def test_one_positive_has_the_error_of_its_negatives():
    auc, se = delong(np.array([0.5]), np.array([0.0, 1.0, 0.2, 0.3]))
    assert auc == 0.75
    assert se == pytest.approx(np.sqrt(0.75 * 0.25 / 3))


def test_clopper_pearson():
    assert clopper_pearson(0, 128)[1] == pytest.approx(1 - 0.025 ** (1 / 128))
    assert clopper_pearson(0, 10)[0] == 0.0
    assert clopper_pearson(10, 10)[1] == 1.0
    rng = np.random.default_rng(3)
    hits = [lo <= 0.1 <= hi for lo, hi in (clopper_pearson(int(k), 200) for k in rng.binomial(200, 0.1, 500))]
    assert np.mean(hits) >= 0.94


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(4).normal(size=100)
    value, se = jackknife(lambda v: float(v.mean()), np.split(x, 100))
    assert value == pytest.approx(x.mean())
    assert se == pytest.approx(x.std(ddof=1) / 10)
    assert jackknife_se(np.full(7, 3.0)) == 0.0


def test_frechet_distance():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20_000, 3))
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-6)
    y = rng.normal(size=(20_000, 3)) * np.array([2.0, 1.0, 1.0]) + np.array([1.0, 0.0, 0.0])
    assert frechet(x, y) == pytest.approx(1 + (2 - 1) ** 2, rel=0.05)
    assert frechet(x, y) == pytest.approx(frechet(y, x))


def test_the_jackknife_of_frechet_is_not_the_invalid_bootstrap():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(500, 16))
    values, errors = [], []
    for _ in range(25):
        groups = np.split(rng.normal(size=(400, 16)), 20)
        value, se = jackknife(lambda v: frechet(v, reference), groups)
        values.append(value)
        errors.append(se)
    true = np.std(values, ddof=1)
    assert 0.7 * true < np.mean(errors) < 2.0 * true
    x = np.concatenate(groups)
    boot = [frechet(x[rng.integers(len(x), size=len(x))], reference) for _ in range(60)]
    assert np.quantile(boot, 0.025) > frechet(x, reference)


def test_kid_is_unbiased_at_zero():
    rng = np.random.default_rng(7)
    values = [kid(rng.normal(size=(100, 8)), rng.normal(size=(100, 8))) for _ in range(40)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(40)
