"""Intervals and distances against brute force, theory and simulation."""

import numpy as np
import pytest
from scipy import stats

from evaluators.statistics import (
    advantage,
    anytime_interval,
    auc_interval,
    clopper_pearson,
    cluster_interval,
    corrected_shares,
    delong,
    delong_paired,
    detectable_auc,
    detectable_proportion,
    equivalence,
    frechet,
    jackknife,
    jackknife_interval,
    jackknife_se,
    kid,
    normal_interval,
    tpr_at_fpr,
    wilson,
    zero_hits_needed,
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


def test_the_interval_of_an_auc_never_shrinks_to_a_point():
    apart = auc_interval(np.arange(5.0) + 10, np.arange(20.0) - 20)
    assert apart[0] == 1
    assert apart[2:] == clopper_pearson(5, 5)
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(0.5, 1, 60), rng.normal(0, 1, 60)
    auc, se, low, high = auc_interval(pos, neg)
    assert (auc, se) == delong(pos, neg)
    assert (low, high) == normal_interval(auc, se)
    assert auc_interval(neg - 9, pos)[2:] == clopper_pearson(0, 60)


def test_the_interval_of_a_jackknife_covers_with_few_groups():
    rng, covered, normal = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        x = rng.normal(size=40)
        parts = np.array([np.delete(x, np.arange(g, 40, 8)).mean() for g in range(8)])
        se, low, high = jackknife_interval(x.mean(), parts)
        covered += low <= 0 <= high
        normal += normal_interval(x.mean(), se)[0] <= 0 <= normal_interval(x.mean(), se)[1]
    assert 0.935 <= covered / 2000 <= 0.965
    assert normal / 2000 < 0.93
    se, low, high = jackknife_interval(0.0, np.zeros(8), more=0.5)
    assert (se, high) == (0.5, pytest.approx(0.5 * stats.t.ppf(0.975, 7)))


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


def test_interval_coverage_of_proportions():
    rng = np.random.default_rng(8)
    averages = []
    for rate, n in ((0.05, 100), (0.1, 80), (0.3, 60), (0.5, 100), (0.9, 200)):
        counts, weights = np.unique(rng.binomial(n, rate, 4000), return_counts=True)
        for interval in (wilson, clopper_pearson):
            inside = [lo <= rate <= hi for lo, hi in (interval(int(k), n) for k in counts)]
            averages.append((interval, np.average(inside, weights=weights)))
    assert 0.93 <= np.mean([c for i, c in averages if i is wilson]) <= 0.97  # right on average over rates
    assert min(c for i, c in averages if i is clopper_pearson) >= 0.94  # never too short


def test_an_anytime_interval_holds_at_every_look():
    rng = np.random.default_rng(9)
    missed, looks = 0, range(10, 400, 10)
    for _ in range(150):
        hits = np.cumsum(rng.random(400) < 0.2)
        missed += any(not low <= 0.2 <= high for low, high in (anytime_interval(int(hits[n - 1]), n) for n in looks))
    assert missed / 150 <= 0.05
    assert anytime_interval(0, 0) == (0.0, 1.0)


def test_zero_hits():
    n = zero_hits_needed(0.01)
    assert 0.99**n <= 0.05 < 0.99 ** (n - 1)
    m = zero_hits_needed(0.01, sequential=True)
    assert anytime_interval(0, m)[1] <= 0.01 < anytime_interval(0, m - 1)[1]
    assert m > n
    with pytest.raises(ValueError, match="not between 0 and 1"):
        zero_hits_needed(0.0)


def test_clusters_widen_the_interval_as_they_should():
    rng = np.random.default_rng(10)
    covered = naive = 0
    for _ in range(150):
        prompts = rng.normal(size=30)
        values = np.repeat(prompts, 8) + 0.5 * rng.normal(size=240)
        _, low, high = cluster_interval(values, np.repeat(np.arange(30), 8), draws=500)
        covered += low <= 0 <= high
        se = values.std(ddof=1) / np.sqrt(240)
        naive += abs(values.mean()) <= 1.96 * se
    assert 0.88 <= covered / 150 <= 0.99
    assert naive / 150 < 0.7
    with pytest.raises(ValueError, match="at least two"):
        cluster_interval(np.ones(4), np.zeros(4))
    assert cluster_interval(np.ones(4), np.arange(4)) == (0.0, 1.0, 1.0)


def test_shares_behind_an_erring_classifier():
    confusion = np.array([[0.9, 0.2, 0.0], [0.1, 0.7, 0.1], [0.0, 0.1, 0.9]])
    true = np.array([0.5, 0.0, 0.5])
    np.testing.assert_allclose(corrected_shares(confusion @ true, confusion), true, atol=1e-6)
    found = corrected_shares(np.array([1.0, 0.0, 0.0]), confusion)  # more than a pure class 0 could give
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)


def test_equivalence_needs_precision_and_not_just_no_difference():
    assert equivalence(0.0, 0.1, 0.05) > 0.05
    assert equivalence(0.0, 0.01, 0.05) < 0.001
    assert equivalence(0.06, 0.01, 0.05) > 0.5
    assert (equivalence(0.0, 0.0, 0.05), equivalence(0.1, 0.0, 0.05)) == (0.0, 1.0)
    rng = np.random.default_rng(11)
    wrong = [equivalence(d, 0.02, 0.05) < 0.05 for d in rng.normal(0.05, 0.02, 2000)]  # truly at the margin
    assert 0.03 <= np.mean(wrong) <= 0.07


def test_rates_at_low_false_positives():
    rng = np.random.default_rng(12)
    neg = rng.normal(size=1000)
    value, reason = tpr_at_fpr(rng.normal(2, 1, 500), neg, 0.01)
    assert reason == ""
    threshold = np.sort(neg)[-11]
    assert (neg > threshold).sum() == 10
    assert value is not None
    assert value == pytest.approx(stats.norm.sf(threshold - 2), abs=0.06)
    assert tpr_at_fpr(np.zeros(5), np.zeros(1000), 0.01)[0] == 0.0  # ties never pass
    assert tpr_at_fpr(np.zeros(5), np.zeros(999), 0.01)[0] is None
    assert "10,000" in tpr_at_fpr(np.zeros(5), np.zeros(1000), 0.001)[1]


def test_advantage_is_the_largest_gap_between_the_rates():
    pos, neg = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.5, 2.5])
    rates = [abs((pos > c).mean() - (neg > c).mean()) for c in np.linspace(-1, 4, 501)]
    assert advantage(pos, neg) == pytest.approx(max(rates))


@pytest.mark.parametrize("n", [60, 250])
def test_what_a_sample_size_can_detect(n):
    rng = np.random.default_rng(13)
    effect = detectable_auc(n, n)
    shift = np.sqrt(2) * stats.norm.ppf(0.5 + effect)
    found = 0
    for _ in range(400):
        auc, se = delong(rng.normal(shift, 1, n), rng.normal(size=n))
        found += abs(auc - 0.5) > 1.96 * se
    assert 0.7 <= found / 400 <= 0.9
    delta = detectable_proportion(n, 0.3)
    a, b = rng.binomial(n, 0.3, 2000) / n, rng.binomial(n, 0.3 + delta, 2000) / n
    se = np.sqrt(a * (1 - a) / n + b * (1 - b) / n)
    assert 0.7 <= np.mean(np.abs(b - a) > 1.96 * se) <= 0.9


def test_coverage_of_the_jackknife_of_frechet():
    """Of differences between two models on the same units, where the bias of the distance cancels."""
    rng = np.random.default_rng(14)
    reference = rng.normal(size=(400, 8))
    large = rng.normal(size=(40_000, 8))
    expected = [frechet(part, reference) for part in np.split(large, 100)]
    target, covered = np.mean(expected), 0
    for _ in range(100):
        value, se = jackknife(lambda v: frechet(v, reference), np.split(rng.normal(size=(400, 8)), 20))
        lo, hi = normal_interval(value, se)
        covered += lo <= target <= hi
    assert covered >= 90
