"""Comparisons with oracles treat them as a sample: what a further oracle would show is not held against a model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluators.oracles import compare, compare_auc, compare_units
from evaluators.statistics import share_floor


def drawn(rng, k, spread, noise, units=40):
    """Units of a model and of k oracles, (units,) and (units, k): all means from one population, each unit with its own noise."""
    means = spread * rng.normal(size=k + 1)
    scores = means + noise * rng.normal(size=(units, k + 1))
    return scores[:, 0], scores[:, 1:]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize(("spread", "noise"), [(1.0, 0.0), (1.0, 3.0), (0.0, 1.0)])
def test_a_further_oracle_is_flagged_at_the_nominal_rate(k, spread, noise):
    rng, out, above = np.random.default_rng(k), 0, 0
    for _ in range(2000):
        units, oracles = drawn(rng, k, spread, noise)
        comparison = compare_units(units, oracles)
        low, high = comparison.interval()
        out += not low <= 0 <= high
        above += comparison.p_excess(0.0) < 0.05
    assert out / 2000 <= 0.065
    assert above / 2000 <= 0.065
    if noise == 0:  # exactly Student's t
        assert out / 2000 >= 0.035


@pytest.mark.parametrize("k", [3, 5])
def test_equivalence_is_claimed_wrongly_at_most_at_the_nominal_rate(k):
    """The model lies exactly at the margin above the mean of all possible oracles."""
    rng, wrong, shown = np.random.default_rng(k), 0, 0
    for _ in range(2000):
        oracles = 0.05 * rng.normal(size=k) + 0.2 * rng.normal(size=(40, k))
        wrong += compare_units(0.1 + 0.2 * rng.normal(size=40), oracles).upper() <= 0.1
        shown += compare_units(0.0 + 0.02 * rng.normal(size=40), oracles * 0.1).upper() <= 0.1
    assert wrong / 2000 <= 0.06
    assert shown == 2000


def test_the_spread_of_the_oracles_is_in_the_error_and_vanishes_with_their_number_for_their_mean():
    values = np.array([0.0, 0.2, 0.4])
    few = compare(0.3, values, 0.0)
    assert few.spread == pytest.approx(0.2)
    assert few.se == pytest.approx(0.2 * np.sqrt(1 + 1 / 3))
    assert few.se_mean == pytest.approx(0.2 / np.sqrt(3))
    assert few.df == 2
    low, high = few.interval()
    assert (high - low) / 2 == pytest.approx(few.se * stats.t.ppf(0.975, 2))
    many = compare(0.3, np.tile(values, 30), 0.0)
    assert many.se_mean < few.se_mean / 4
    assert many.se > 0.15  # one further oracle differs as much as ever


def test_sampling_that_the_oracles_spread_contains_already_is_not_added_twice():
    values = [0.0, 0.2, 0.4]
    alone, shared, more = (
        compare(0.3, values, 0.0),
        compare(0.3, values, 0.1, [0.1] * 3),
        compare(0.3, values, 0.5, [0.1] * 3),
    )
    assert shared.se == pytest.approx(alone.se)
    assert more.se == pytest.approx(np.sqrt(alone.se**2 + 0.5**2 - 0.1**2))
    # equal oracles by chance do not make an error of 0
    assert compare(0.3, [0.0, 0.0], 0.1, [0.1, 0.1]).se == pytest.approx(0.1)


def test_one_oracle_leaves_the_spread_unknown():
    one = compare(0.3, [0.1], 0.05, df=9)
    assert one.spread is None
    assert one.se == one.se_mean == 0.05


def test_no_hit_in_any_model_is_no_certainty():
    none = compare_units(np.zeros(50), np.zeros((50, 3)), share_floor(50))
    assert none.difference == 0
    assert none.upper() > 0.02
    assert none.interval()[1] > 0.03


def test_what_would_decide_decides():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 4))
    noise = (noise - noise.mean(0)) / noise.std(0, ddof=1)
    units, oracles = 0.05 + 0.3 * noise[:, 0], 0.3 * noise[:, 1:] + [0.0, 0.01, -0.01]
    few = compare_units(units, oracles)
    factor = few.draws_factor(0.1)
    assert 1 < factor < 100
    more = int(np.ceil(factor))
    assert few.upper() > 0.1
    assert compare_units(np.tile(units, more), np.tile(oracles, (more, 1))).upper() <= 0.1
    # the oracles differ so much that no number of units would
    apart = compare_units(units, oracles + np.array([0.0, 0.2, -0.2]))
    assert apart.draws_factor(0.1) == np.inf
    needed = apart.oracles_needed(0.1)
    assert needed is None or needed > 3


def test_an_auc_among_those_of_oracles_is_not_unlike_them():
    rng, out = np.random.default_rng(0), 0
    for _ in range(300):
        shifts = 1.0 + 0.5 * rng.normal(size=4)  # a model and three oracles of one population
        pos, neg = rng.normal(size=(60, 4)) + shifts, rng.normal(size=(60, 4))
        low, high = compare_auc(pos[:, 0], neg[:, 0], pos[:, 1:], neg[:, 1:]).interval()
        out += not low <= 0 <= high
    assert out / 300 <= 0.09


def test_an_excess_within_the_spread_of_the_oracles_is_not_decided_by_more_units():
    apart = compare(0.5, [-0.4, 0.4], 0.05, [0.05, 0.05])
    assert apart.draws_factor(0.1) == np.inf
    assert apart.oracles_needed(0.1) is None
    closer = compare(0.5, [-0.1, 0.0, 0.1], 0.2, [0.05] * 3)
    assert 1 < closer.draws_factor(0.1) < np.inf
