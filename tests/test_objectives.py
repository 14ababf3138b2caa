"""Residue and damage are anchored by measured models."""

import numpy as np
import pytest
from finished import row

from raysweep.auditing.anchors import Anchors, Unmeasured, assess_views, check_scale
from raysweep.auditing.objectives import objectives
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
    assert f"at this sample size at least {needed:.3g} is needed to tell them apart" in views["r.recall"].reason
    assert "base and oracle differ by 0.1 (0.5 and 0.4)" in views["r.recall"].reason
    with pytest.raises(Unmeasured, match="nothing to forget"):
        assess_views(noisy, ("r.recall",))


def test_a_missing_or_infinite_measurement_is_an_error():
    broken = measured(0.5, 0.0, 3.0)
    del broken.values["d.loss"]
    with pytest.raises(Unmeasured, match=r"d\.loss was not measured"):
        objectives(broken, ANCHORS, VIEWS, "f.frechet", VALIDITY)
    with pytest.raises(Unmeasured, match=r"f\.frechet"):
        objectives(measured(0.5, 0.0, float("nan")), ANCHORS, VIEWS, "f.frechet", VALIDITY)


def test_standard_errors_come_from_the_groups():
    sharp, blurred = (
        objectives(measured(0.5, 0.0, 4.0, n), ANCHORS, VIEWS, "f.frechet", VALIDITY) for n in (0.001, 0.05)
    )
    assert 0 < sharp.residue_se < blurred.residue_se
    assert sharp.replicates.shape == (10, 2)


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
