"""Intervals and distances against brute force, theory and simulation."""

import ast
import re

import numpy as np
import pytest
from scipy import stats
from tiny import ROOT

from evaluators.oracles import compare
from evaluators.statistics import (
    advantage,
    auc_interval,
    clopper_pearson,
    corrected_shares,
    delong,
    detectable_auc,
    detectable_proportion,
    frechet,
    jackknife_interval,
    jackknife_se,
    kid,
    normal_interval,
    paired_gap,
    tpr_at_fpr,
)


def left_out(statistic, groups) -> np.ndarray:
    """A statistic of rows without each of their groups in turn."""
    return np.array([statistic(np.concatenate([*groups[:g], *groups[g + 1 :]])) for g in range(len(groups))])


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    pos, neg = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in pos for n in neg]
    assert delong(pos, neg)[0] == pytest.approx(np.mean(pairs))
    assert delong(-pos, -neg)[0] == pytest.approx(1 - np.mean(pairs))
    assert delong(np.ones(5), np.ones(7))[0] == 0.5


def test_delong_intervals_cover():
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
    delta, se = paired_gap(pos, neg, pos[:, None], neg[:, None])
    assert (delta, se) == (0.0, 0.0)
    other_pos, other_neg = pos + rng.normal(0, 0.2, 200), neg + rng.normal(0, 0.2, 200)
    _, paired = paired_gap(pos, neg, other_pos[:, None], other_neg[:, None])
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


def test_clopper_pearson():
    assert clopper_pearson(0, 128)[1] == pytest.approx(1 - 0.025 ** (1 / 128))
    assert clopper_pearson(0, 10)[0] == 0.0
    assert clopper_pearson(10, 10)[1] == 1.0
    rng = np.random.default_rng(3)
    hits = [lo <= 0.1 <= hi for lo, hi in (clopper_pearson(int(k), 200) for k in rng.binomial(200, 0.1, 500))]
    assert np.mean(hits) >= 0.94


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(4).normal(size=100)
    assert jackknife_se(left_out(np.mean, np.split(x, 100))) == pytest.approx(x.std(ddof=1) / 10)
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
        values.append(frechet(np.concatenate(groups), reference))
        errors.append(jackknife_se(left_out(lambda v: frechet(v, reference), groups)))
    true = np.std(values, ddof=1)
    assert 0.7 * true < np.mean(errors) < 2.0 * true
    x = np.concatenate(groups)
    boot = [frechet(x[rng.integers(len(x), size=len(x))], reference) for _ in range(60)]
    assert np.quantile(boot, 0.025) > frechet(x, reference)


def test_kid_is_unbiased_at_zero():
    rng = np.random.default_rng(7)
    values = [kid(rng.normal(size=(100, 8)), rng.normal(size=(100, 8))) for _ in range(40)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(40)


def test_the_interval_of_a_share_is_never_too_short():
    rng = np.random.default_rng(8)
    for rate, n in ((0.05, 100), (0.1, 80), (0.3, 60), (0.5, 100), (0.9, 200)):
        assert _covered(rng.binomial(n, rate, 4000), rate, n) >= 0.94


@pytest.mark.parametrize("prompts", [2, 10, 50])
def test_the_interval_of_a_share_covers_for_several_prompts(prompts):
    """Prompts differ in their rates and have the same number of samples; the interval is that of their mean rate."""
    rng = np.random.default_rng(prompts)
    for each in (2, 20):
        rates = rng.beta(0.5, 1.0, prompts)
        hits = rng.binomial(each, rates, (4000, prompts)).sum(1)
        assert _covered(hits, rates.mean(), each * prompts) >= 0.95


def _covered(hits: np.ndarray, rate: float, n: int) -> float:
    counts, weights = np.unique(hits, return_counts=True)
    inside = [low <= rate <= high for low, high in (clopper_pearson(int(k), n) for k in counts)]
    return float(np.average(inside, weights=weights))


def test_every_statistic_is_used_and_the_handbook_names_no_other():
    """The handbook must not describe intervals that no check uses."""
    source = ROOT / "evaluators" / "statistics.py"
    offered = {
        f.name for f in ast.parse(source.read_text()).body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"
    }
    inside = (n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.Call))
    used = {n.func.id for n in inside if isinstance(n.func, ast.Name)} & offered
    for path in (p for package in ("raysweep", "evaluators") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "evaluators.statistics":
                used |= {alias.name for alias in node.names if alias.name.islower()}
    assert offered == used
    handbook = (ROOT / "docs" / "audit.md").read_text().partition("## Intervals")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", handbook.partition("Tests simulate")[0])
    assert set(named) <= offered | {"gap", "excess"}


def test_shares_behind_an_imperfect_classifier():
    confusion = np.array([[0.9, 0.2, 0.0], [0.1, 0.7, 0.1], [0.0, 0.1, 0.9]])
    true = np.array([0.5, 0.0, 0.5])
    np.testing.assert_allclose(corrected_shares(confusion @ true, confusion), true, atol=1e-6)
    shares = corrected_shares(np.array([1.0, 0.0, 0.0]), confusion)  # more than a pure class 0 could give
    assert shares.min() >= 0
    assert shares.sum() == pytest.approx(1)


def test_equivalence_needs_precision_and_not_just_no_difference():
    def p(difference, se):
        return compare(difference, [0.0], se).p_beyond(0.05)

    assert p(0.0, 0.1) > 0.05
    assert p(0.0, 0.01) < 0.001
    assert p(0.06, 0.01) > 0.5
    assert (p(0.0, 0.0), p(0.1, 0.0)) == (0.0, 1.0)
    rng = np.random.default_rng(0)
    wrong = [p(d, 0.02) < 0.05 for d in rng.normal(0.05, 0.02, 2000)]  # truly at the margin
    assert np.mean(wrong) <= 0.06


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
    detected = 0
    for _ in range(400):
        auc, se = delong(rng.normal(shift, 1, n), rng.normal(size=n))
        detected += abs(auc - 0.5) > 1.96 * se
    assert 0.7 <= detected / 400 <= 0.9
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
        groups = np.split(rng.normal(size=(400, 8)), 20)
        value = frechet(np.concatenate(groups), reference)
        lo, hi = normal_interval(value, jackknife_se(left_out(lambda v: frechet(v, reference), groups)))
        covered += lo <= target <= hi
    assert covered >= 90
