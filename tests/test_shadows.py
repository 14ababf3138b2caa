"""U-LiRA on made-up scores: power where unlearned and retrained models differ, chance where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.attacks import lira_online
from raysweep.engine.shadows import u_lira


def scores(gap: float, seed: int = 0, shadows: int = 16, images: int = 12):
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=images)  # images differ from each other by more than the effect of unlearning
    unlearned, retrained = (hard + 0.3 * rng.normal(size=(shadows, images)) for _ in range(2))
    return unlearned + gap, retrained, hard + gap + 0.3 * rng.normal(size=images)


def test_models_that_differ_are_separated_though_images_vary_more():
    summary = u_lira(*scores(0.9)).summary()
    assert summary["accuracy"]["lo"] > 0.8
    assert summary["auc_over_models"]["value"] > 0.95
    assert summary["candidate"]["images_told"] >= 9
    assert (summary["shadows"], summary["images"]) == (16, 12)


def test_models_that_do_not_differ_are_not_separated():
    accuracies = [u_lira(*scores(0.0, seed)).summary()["accuracy"] for seed in range(40)]
    assert np.mean([f["value"] for f in accuracies]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([f["lo"] <= 0.5 <= f["hi"] for f in accuracies]) >= 0.85


def test_a_model_is_not_judged_by_itself():
    unlearned, retrained, candidate = scores(0.3)
    ratios = u_lira(unlearned, retrained, candidate)
    np.testing.assert_allclose(ratios.unlearned[0], lira_online(unlearned[0], unlearned[1:].T, retrained[1:].T))
    np.testing.assert_allclose(
        ratios.retrained[2], lira_online(retrained[2], *(np.delete(m, 2, 0).T for m in (unlearned, retrained)))
    )


def test_fewer_than_three_shadows_are_refused():
    unlearned, retrained, candidate = scores(0.5)
    with pytest.raises(ValueError, match="at least 3 shadows"):
        u_lira(unlearned[:2], retrained[:2], candidate)
