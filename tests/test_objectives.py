"""Residue and damage are anchored by measured models."""

import numpy as np
import pytest
from finished import row
from scipy import stats

from raysweep.auditing.anchors import Anchors, Unmeasured, assess_views, check_scale
from raysweep.auditing.objectives import floor_in_words, mean_objectives, noise_floor, objectives
from raysweep.auditing.terms import Measured
from raysweep.results.front import search_against_audit

RNG = np.random.default_rng(0)
VALIDITY = "classifier.validity"


def measured(recall, loss, distance, noise=0.0, groups=10):
    values = {"r.recall": recall, "d.loss": loss, "f.frechet": distance, VALIDITY: 0.9}
    return Measured(values, {k: v + noise * RNG.normal(size=groups) for k, v in values.items()})


ANCHORS = Anchors(
    base=measured(1.0, -1.0, 4.0, 0.001),
    oracles=(measured(0.0, 1.0, 2.0, 0.001), measured(0.2, 1.0, 2.0, 0.001)),
    destroyed=measured(0.3, 0.9, 32.0, 0.001),
)
VIEWS = assess_views(ANCHORS, ("r.recall", "d.loss"))


def placed(*values):
    return objectives(measured(*values), ANCHORS, VIEWS, "f.frechet", VALIDITY)


def test_anchors_define_the_ends_of_the_scales():
    base = objectives(ANCHORS.base, ANCHORS, VIEWS, "f.frechet", VALIDITY)
    assert base.residue == pytest.approx(1.0)
    destroyed = objectives(ANCHORS.destroyed, ANCHORS, VIEWS, "f.frechet", VALIDITY)
    assert destroyed.damage == pytest.approx(1.0)
    oracle = placed(0.1, 1.0, 2.0)
    assert (oracle.residue, oracle.damage) == pytest.approx((0.0, 0.0))


def test_residue_is_the_worst_view_and_damage_logarithmic():
    one = placed(0.1, 0.0, 8.0)
    assert one.views == pytest.approx({"r.recall": 0.0, "d.loss": 0.5})
    assert one.residue == pytest.approx(0.5)
    assert one.damage == pytest.approx(0.5)


def test_beyond_the_oracle_is_damage_not_more_forgetting():
    over = placed(0.1, 2.0, 2.0)
    assert over.residue == pytest.approx(0.0)
    assert over.over_forgetting == pytest.approx(0.5)
    assert over.damage == pytest.approx(0.5)


def test_over_forgetting_costs_at_most_as_much_as_destruction():
    far = placed(0.1, 9.0, 2.0)
    assert far.over_forgetting > 3
    assert far.damage == pytest.approx(1.0)


def test_an_uninformative_view_is_left_out_with_the_reason():
    blurred = measured(0.5, -1.0, 4.0, 0.01)
    blurred.replicates["r.recall"] = 0.5 + 0.5 * RNG.normal(size=10)
    noisy = Anchors(blurred, (measured(0.4, 1.0, 2.0, 0.01),), ANCHORS.destroyed)
    views = {v.metric: v for v in assess_views(noisy, ("r.recall", "d.loss"))}
    assert not views["r.recall"].informative
    needed = 4 * views["r.recall"].gap_se
    assert f"at least {needed:.3g} is needed to tell the base from a further oracle" in views["r.recall"].reason
    assert "base and oracles differ by 0.1 (0.5 and 0.4)" in views["r.recall"].reason
    with pytest.raises(Unmeasured, match="nothing to forget"):
        assess_views(noisy, ("r.recall",))


def test_a_missing_or_infinite_measurement_is_an_error():
    broken = measured(0.5, 0.0, 3.0)
    del broken.values["d.loss"]
    with pytest.raises(Unmeasured, match=r"d\.loss was not measured"):
        objectives(broken, ANCHORS, VIEWS, "f.frechet", VALIDITY)
    with pytest.raises(Unmeasured, match=r"f\.frechet"):
        objectives(measured(0.5, 0.0, float("nan")), ANCHORS, VIEWS, "f.frechet", VALIDITY)


def test_errors_come_from_the_oracles_and_from_what_a_model_samples_beyond_them():
    sharp, blurred = (
        objectives(measured(0.5, 0.0, 4.0, n), ANCHORS, VIEWS, "f.frechet", VALIDITY) for n in (0.001, 0.2)
    )
    assert sharp.replicates.shape == (10, 2)
    assert 0 < sharp.damage_se < blurred.damage_se
    low, high = sharp.residue_lo, sharp.residue_hi
    assert low <= sharp.residue <= high
    # the view on which the oracles differ (0 and 0.2) is uncertain by their spread, whatever is sampled
    recall = sharp.residue_terms["r.recall"].comparison
    assert recall.se >= 0.1414 * np.sqrt(1 + 1 / 2) / 0.9


def population(k, rng, spread=0.05):
    """Anchors whose k oracles are drawn from one population."""
    draws = [
        measured(0.1 + spread * a, 1.0 + spread * b, 2.0 * np.exp(spread * c), 0.001)
        for a, b, c in rng.normal(size=(k, 3))
    ]
    return Anchors(measured(1.0, -1.0, 4.0, 0.001), tuple(draws), measured(0.3, 0.9, 32.0, 0.001))


@pytest.mark.parametrize("k", [3, 5])
def test_a_further_oracle_is_rarely_called_imperfect(k):
    rng, left, lost = np.random.default_rng(k), 0, 0
    for _ in range(200):
        anchors = population(k + 1, rng)
        views = assess_views(anchors, ("r.recall", "d.loss"))
        placed = objectives(anchors.oracles[0], anchors.without_oracle(0), views, "f.frechet", VALIDITY)
        left += placed.residue_lo > 0
        lost += placed.damage_lo > 0
    assert left / 200 <= 0.08
    assert lost / 200 <= 0.08


def apart(*errors):
    """A placement whose views lie so many errors (one-sided t of 4 degrees of freedom) above 5 oracles."""
    views = [f"r.view{i}" for i in range(len(errors))]

    def model(values, distance=2.0):
        values = dict(zip(views, values, strict=True)) | {"f.frechet": distance, VALIDITY: 0.9}
        return Measured(values, {k: np.full(10, v) for k, v in values.items()})

    oracles = tuple(model([d] * len(views)) for d in (-0.02, -0.01, 0.0, 0.01, 0.02))
    anchors = Anchors(model([1.0] * len(views)), oracles, model([0.0] * len(views), 32.0))
    error = np.sqrt(0.00025 * (1 + 1 / 5))
    known = assess_views(anchors, views)
    return objectives(model([e * error for e in errors]), anchors, known, "f.frechet", VALIDITY), error


def test_the_low_end_of_a_residue_holds_for_all_views_at_once():
    t = lambda tail: stats.t.isf(tail, 4)  # noqa: E731
    alone, error = apart(5.0)
    assert alone.residue_lo == pytest.approx(error * (5 - t(0.025)), abs=1e-5)
    largest, error = apart(6.5, 0.0, 0.0)  # as by Bonferroni, with a quarter of the error
    assert largest.residue_lo == pytest.approx(error * (6.5 - t(0.025 / 4 / 3)), abs=1e-5)
    assert apart(3.5, 0.0, 0.0)[0].residue_lo == 0
    assert apart(3.5, 3.5, 3.5)[0].residue_lo == pytest.approx(error * (3.5 - t(0.75 * 0.025)), abs=1e-5)  # together
    assert apart(-3.0, -5.0)[0].residue_lo == 0


@pytest.mark.parametrize(("known", "least", "most"), [(0.0, 0.0, 0.05), (0.2, 0.8, 1.0)])
def test_views_that_agree_a_little_are_told_by_their_mean(known, least, most):
    """Four views whose oracles differ by a third of what the model knows, by 5 oracles."""
    rng, names, flagged, alone = np.random.default_rng(3), [f"r.view{i}" for i in range(4)], 0, 0

    def model(level, spread=0.0, distance=2.0):
        values = {n: level + spread * rng.normal() for n in names} | {"f.frechet": distance, VALIDITY: 0.9}
        return Measured(values, {k: np.full(10, v) for k, v in values.items()})

    for _ in range(100):
        oracles = tuple(model(0.0, 0.07) for _ in range(5))
        anchors = Anchors(model(1.0), oracles, model(0.0, distance=32.0))
        placed = objectives(model(known, 0.07), anchors, assess_views(anchors, names), "f.frechet", VALIDITY)
        flagged += placed.residue_lo > 0
        alone += min(t.comparison.p_at_most(0.0) for t in placed.residue_terms.values()) <= 0.025 / 4
        assert placed.residue_lo <= placed.residue
    assert least <= flagged / 100 <= most
    assert not known or alone < flagged


def test_the_noise_floor_places_each_oracle_by_the_others():
    anchors = population(4, np.random.default_rng(0))
    views = assess_views(anchors, ("r.recall", "d.loss"))
    floor = noise_floor(anchors, views, "f.frechet", VALIDITY)
    assert len(floor) == 4
    assert max(oracle.residue for oracle in floor) > 0
    expected = objectives(anchors.oracles[2], anchors.without_oracle(2), views, "f.frechet", VALIDITY)
    assert floor[2].residue == expected.residue
    text = floor_in_words([(oracle.residue, oracle.damage) for oracle in floor])
    assert f"{floor[0].residue:.3f}, {floor[1].residue:.3f}" in text
    assert "few" not in text
    assert "2 oracles are few" in floor_in_words([(0.1, 0.2), (0.0, 0.1)])
    assert "unknown" in floor_in_words([(0.0, 0.0)])


def test_a_residue_of_zero_has_an_upper_limit():
    anchors = population(3, np.random.default_rng(1))
    views = assess_views(anchors, ("r.recall", "d.loss"))
    at_zero = objectives(measured(0.05, 1.05, 2.0), anchors, views, "f.frechet", VALIDITY)
    assert at_zero.residue == 0
    assert at_zero.residue_lo == 0
    assert 0 < at_zero.residue_upper < at_zero.residue_hi


def test_rounds_are_averaged_before_the_worst_view_is_taken_and_keep_the_spread_of_the_oracles():
    anchors = population(3, np.random.default_rng(2))
    views = assess_views(anchors, ("r.recall", "d.loss"))
    first, second = (
        objectives(measured(*values, 0.02), anchors, views, "f.frechet", VALIDITY)
        for values in ((0.6, 1.0, 2.0), (0.1, 0.0, 2.0))
    )
    both = mean_objectives({1: first, 2: second}, 3, "f.frechet")
    for view in first.views:
        assert both.views[view] == pytest.approx((first.views[view] + second.views[view]) / 2)
    assert both.residue < (first.residue + second.residue) / 2
    assert both.replicates.shape == (30, 2)
    np.testing.assert_allclose(both.replicates[20:], np.tile(both.uncut, (10, 1)))  # no part in the third round
    one, mean = (o.residue_terms["r.recall"] for o in (first, both))
    assert mean.comparison.spread == pytest.approx(one.comparison.spread)
    assert mean.sampling < one.sampling


def test_a_view_that_the_base_does_not_show_is_scaled_by_another():
    def model(altered, correlation):
        values = {
            "altered.presence@mirror": altered,
            "reconstruction.correlation": correlation,
            "f.frechet": 2.0,
            VALIDITY: 0.9,
        }
        return Measured(values, {k: v + 0.001 * RNG.normal(size=10) for k, v in values.items()})

    oracles = tuple(model(0.3 + d, d) for d in (-0.01, 0.0, 0.01))
    destroyed = model(0.0, 0.0)
    destroyed.values["f.frechet"], destroyed.replicates["f.frechet"] = 32.0, np.full(10, 32.0)
    anchors = Anchors(model(0.3, 1.0), oracles, destroyed)
    views = assess_views(anchors, ("altered.presence@mirror", "reconstruction.correlation"))
    assert [v.metric for v in views] == ["altered.presence@mirror", "reconstruction.correlation"]
    assert all(v.informative for v in views)
    mirrored = objectives(model(0.8, 0.0), anchors, views, "f.frechet", VALIDITY)
    assert mirrored.views["altered.presence@mirror"] == pytest.approx(0.5, abs=0.02)
    assert mirrored.residue_lo > 0
    with pytest.raises(Unmeasured, match=r"reconstruction\.correlation, does not separate"):
        assess_views(anchors, ("altered.presence@mirror",))


def test_the_searchs_optimism_is_a_number():
    rows = [
        row("000-rgd", a, d, probe_residue=p, probe_damage=d)
        for p, a, d in ((0.1, 0.2, 0.3), (0.3, 0.4, 0.2), (0.5, 0.6, 0.1))
    ]
    gaps = search_against_audit([*rows, row("base", 1.0, 0.0)])
    assert gaps["residue"].gap == pytest.approx(0.1)
    assert gaps["residue"].rank_correlation == pytest.approx(1.0)
    assert gaps["damage"].gap == pytest.approx(0.0)
    assert gaps["residue"].n == 3
    alone = search_against_audit(rows[:1])
    assert alone["residue"].gap is None


def test_over_forgetting_is_measured_against_the_larger_distance():
    """A view with a small gap between base and oracle, but far from destruction, does not inflate a small distance."""
    near = Anchors(
        measured(1.0, 0.2, 4.0, 0.0001), (measured(0.0, 0.0, 2.0, 0.0001),), measured(0.3, -2.0, 32.0, 0.0001)
    )
    views = assess_views(near, ("r.recall", "d.loss"))
    assert all(v.informative for v in views)
    past = objectives(measured(0.0, -0.2, 2.0), near, views, "f.frechet", VALIDITY)
    assert past.over_forgetting == pytest.approx(0.1)


def test_a_quality_that_cannot_tell_damage_is_an_error():
    perfect = Anchors(ANCHORS.base, (measured(0.0, 1.0, 0.0), measured(0.2, 1.0, 0.0)), ANCHORS.destroyed)
    with pytest.raises(Unmeasured, match=r"f\.frechet cannot tell damage: the oracles have 0, a destroyed model 32"):
        objectives(measured(0.1, 0.0, 8.0), perfect, VIEWS, "f.frechet", VALIDITY)
    same = Anchors(ANCHORS.base, ANCHORS.oracles, measured(0.3, 0.9, 2.0))
    with pytest.raises(Unmeasured, match="cannot tell damage"):
        objectives(measured(0.1, 0.0, 8.0), same, VIEWS, "f.frechet", VALIDITY)


def without(model, metric, reason="failed: RuntimeError: no memory"):
    """The model as it was measured without one metric."""
    kept = ({k: v for k, v in part.items() if k != metric} for part in (model.values, model.replicates))
    return Measured(*kept, {metric: reason})


def anchors_without(name, metric):
    base, first, second, destroyed = (
        without(model, metric) if model_name == name else model
        for model_name, model in zip(
            ("base", "oracle-0", "oracle-1", "destroyed"),
            (ANCHORS.base, *ANCHORS.oracles, ANCHORS.destroyed),
            strict=True,
        )
    )
    return Anchors(base, (first, second), destroyed)


@pytest.mark.parametrize("name", ["base", "oracle-0", "oracle-1", "destroyed"])
def test_a_view_that_one_anchor_lacks_is_left_out_with_the_reason(name):
    anchors = anchors_without(name, "d.loss")
    views = {v.metric: v for v in assess_views(anchors, ("r.recall", "d.loss"))}
    assert views["r.recall"].informative
    assert not views["d.loss"].informative
    assert views["d.loss"].reason == f"not measured on {name} (failed: RuntimeError: no memory)"
    result = objectives(measured(0.1, 0.0, 8.0), anchors, list(views.values()), "f.frechet", VALIDITY)
    assert result.views == pytest.approx({"r.recall": 0.0})
    assert result.damage == pytest.approx(0.5)
    with pytest.raises(Unmeasured, match=f"d.loss was not measured on {name} .*no memory"):
        objectives(measured(0.1, 0.0, 8.0), anchors, VIEWS, "f.frechet", VALIDITY)  # views of other anchors


@pytest.mark.parametrize("name", ["base", "oracle-0", "oracle-1", "destroyed"])
@pytest.mark.parametrize("metric", ["f.frechet", VALIDITY])
def test_without_quality_or_validity_of_an_anchor_nothing_is_placed(name, metric):
    anchors = anchors_without(name, metric)
    for use in (
        lambda: check_scale(anchors, "f.frechet", VALIDITY),
        lambda: objectives(measured(0.1, 0.0, 8.0), anchors, VIEWS, "f.frechet", VALIDITY),
    ):
        with pytest.raises(
            Unmeasured, match=rf"{metric} was not measured on {name} \(failed: RuntimeError: no memory\)"
        ):
            use()


def test_a_candidate_without_a_metric_gives_the_reason():
    bare = without(measured(0.1, 0.0, 8.0), "d.loss", "skipped: does not apply")
    with pytest.raises(Unmeasured, match=r"d\.loss was not measured \(skipped: does not apply\)"):
        objectives(bare, ANCHORS, VIEWS, "f.frechet", VALIDITY)
    assert without(bare, "f.frechet@7").why_absent("f.frechet@9") == "failed: RuntimeError: no memory"
