"""Fronts, hypervolume and dominance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysweep.results import pareto


@given(
    st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([("min", "min"), ("min", "max"), ("max", "max", "min")])
)
@settings(max_examples=60, deadline=None)
def test_the_front_holds_the_points_that_no_other_dominates(seed, n, directions):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 6, (n, len(directions))).astype(float)
    sign = np.array([1 if d == "min" else -1 for d in directions])
    members = pareto.front(points, directions)
    for i in range(n):
        beaten = any(
            (points[j] * sign <= points[i] * sign).all() and (points[j] * sign < points[i] * sign).any()
            for j in range(n)
        )
        assert (i in members) == (not beaten)
    order = rng.permutation(n)
    assert sorted(order[pareto.front(points[order], directions)]) == members


def test_the_front_ignores_points_that_are_not_finite():
    assert pareto.front(np.array([[0.0, np.nan], [1.0, 1.0], [np.inf, 0.0]]), ("min", "min")) == [1]
    assert pareto.front(np.empty((0, 2)), ("min", "min")) == []


def test_hypervolume_equals_a_grid_and_ignores_dominated_points():
    points = np.array([[0.1, 0.7], [0.4, 0.3], [0.8, 0.05]])
    grid = (np.arange(1100) + 0.5) / 1000
    x, y = np.meshgrid(grid, grid)
    covered = np.zeros_like(x, dtype=bool)
    for a, b in points:
        covered |= (x >= a) & (y >= b)
    volume = pareto.hypervolume(points)
    assert volume == pytest.approx(covered.mean() * 1.21, rel=2e-3)
    assert pareto.hypervolume(np.vstack([points, [0.9, 0.9], [2.0, 0.0], [np.nan, 0.0]])) == pytest.approx(volume)
    assert pareto.hypervolume(points[::-1]) == pytest.approx(volume)
    assert pareto.hypervolume(np.array([[1.2, 0.0]])) == 0.0


def test_dominance_probability_of_independent_and_of_shifted_points():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20_000, 2, 2))
    p = pareto.dominance_probability(draws)
    assert p[0, 1] == pytest.approx(0.25, abs=0.02)
    assert p[0, 0] == 0.0
    draws[:, 1] += 10
    assert pareto.dominance_probability(draws)[0, 1] == 1.0


def test_paired_resampling_cancels_shared_noise():
    rng = np.random.default_rng(1)
    units = 5 + rng.normal(size=(20, 1))
    shift = np.array([0.0, 0.3])
    samples = units + shift
    values = np.repeat(samples.mean(0)[:, None], 2, axis=1)
    parts = np.stack([np.delete(samples, g, 0).mean(0) for g in range(20)], axis=1)
    draws = pareto.resample(values, np.repeat(parts[:, :, None], 2, axis=2))
    assert draws.shape == (2000, 2, 2)
    assert pareto.dominance_probability(draws)[0, 1] == 1.0
    assert draws[:, 0, 0].std() == pytest.approx(units.std() / np.sqrt(20), rel=0.15)


def test_the_interval_of_the_hypervolume_covers_it_and_the_recommendation():
    rng, covered = np.random.default_rng(2), 0
    true = np.array([[0.2, 0.6], [0.35, 0.35], [0.8, 0.1]])
    for _ in range(200):
        units = true[:, None, :] + 0.3 * rng.normal(size=(3, 200, 2))  # a point is a mean over 200 units in 20 groups
        points = units.mean(1)
        groups = units.reshape(3, 10, 20, 2)  # unit i belongs to group i mod 20
        replicates = np.stack([np.delete(groups, g, axis=2).mean((1, 2)) for g in range(20)], 1)
        low, high = pareto.hypervolume_interval(points, replicates)
        assert low <= pareto.hypervolume(points) <= high
        covered += low <= pareto.hypervolume(true) <= high
    assert covered / 200 >= 0.9
    assert pareto.balanced(true) == 1


def test_points_not_surely_on_or_off_the_front_are_undecided_with_their_rivals():
    rng = np.random.default_rng(0)
    centre = np.array([[0.1, 0.5], [0.5, 0.1], [0.52, 0.12], [0.9, 0.9]])
    draws = centre + 0.02 * rng.normal(size=(4000, 4, 2))
    chance = pareto.dominated_probability(draws)
    assert chance[0] < 0.01
    assert 0.3 < chance[2] < 0.9
    assert chance[3] > 0.99
    assert pareto.undecided(draws) == [1, 2]
    assert pareto.undecided(centre + 0.001 * rng.normal(size=(4000, 4, 2))) == []
    assert (chance >= pareto.dominance_probability(draws).max(0) - 1e-12).all()


def test_the_knee_is_farthest_below_the_line_through_the_ends():
    points = np.array([[0.0, 1.0], [0.2, 0.3], [0.6, 0.2], [1.0, 0.0], [0.9, 0.9]])
    assert pareto.knee(points) == 1
    assert pareto.knee(points * np.array([100, 1]) + 5) == 1  # scales do not matter
    assert pareto.knee(np.array([[0.0, 1.0], [0.9, 0.9], [1.0, 0.0]])) in (0, 2, 1)
    assert pareto.knee(points[3:]) == 1  # two of them have no knee: the balanced one


def test_the_attainment_region_is_reached_by_the_share_of_the_sets():
    rng = np.random.default_rng(1)
    sets = [rng.random((6, 2)) for _ in range(5)]
    for share, needed in ((0.2, 1), (0.6, 3), (1.0, 5)):
        corners = pareto.attainment(sets, share)
        for at in rng.random((300, 2)):
            reached = sum(((s <= at).all(1)).any() for s in sets)
            assert bool((corners <= at).all(1).any()) == (reached >= needed)


def test_probabilities_are_shares_of_draws_whatever_the_number_of_points():
    draws = np.maximum(0.0, np.random.default_rng(5).normal(size=(300, 20, 2)))
    a, b = draws[:, :, None, :], draws[:, None, :, :]
    dominates = (a <= b).all(-1) & (a < b).any(-1)
    np.testing.assert_array_equal(pareto.dominance_probability(draws), dominates.mean(0))
    np.testing.assert_array_equal(pareto.dominance_probability(draws, np.array([3, 7])), dominates.mean(0)[:, [3, 7]])
    np.testing.assert_allclose(pareto.dominated_probability(draws), dominates.any(1).mean(0))


def test_the_front_of_a_large_sweep_takes_no_time():
    points = np.random.default_rng(6).random((20_000, 2))
    members = pareto.front(points, ("min", "min"))  # every pair would be 400 million comparisons
    x, y = points[members][np.argsort(points[members, 0])].T
    assert (np.diff(y) < 0).all()
    assert all((points[:, 1] >= b)[points[:, 0] < a].all() for a, b in zip(x, y, strict=True))
