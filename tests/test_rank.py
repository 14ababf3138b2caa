"""Membership of a single image: its rank beside the oracles' ranks, and how far one further oracle may lie from them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from test_evaluators import TIER, subject
from tiny import tiny_model

from evaluators.judge import Judge
from evaluators.membership import PIA, LiRA, Loss
from evaluators.rank import ONE_IMAGE, mid_rank, rank_rows


def rows(pos, neg, oracles=None):
    return {m.name: m for m in rank_rows(np.array(pos), np.array(neg), oracles, "no oracle")}


def drawn(rng, models: int, images: int = 100):
    """Scores of one image (models,) and of unseen ones (images, models): the image is easier than most for every model."""
    easy, shared = 1.0, rng.normal(size=(images, 1))
    return easy + 0.3 * rng.normal(size=models), shared + 0.3 * rng.normal(size=(images, models))


def test_a_rank_counts_half_of_the_ties():
    others = np.array([1.0, 2.0, 2.0, 2.0, 3.0])
    assert mid_rank(np.array([2.0]), others) == (1 + 3 / 2) / 5
    assert mid_rank(np.array([0.0]), others) == 0
    assert mid_rank(np.array([9.0]), others) == 1
    assert mid_rank(np.array([5.0]), np.full(7, 5.0)) == 0.5
    assert "rank 1 of 6 among 5 unseen images" in rows([9.0], others)["rank"].reason
    assert "rank 6 of 6" in rows([0.0], others)["rank"].reason
    assert "rank 3.5 of 6" in rows([2.0], others)["rank"].reason


def test_a_rank_has_no_interval_and_states_those_of_the_oracles():
    rng = np.random.default_rng(0)
    pos, neg = drawn(rng, 4)
    found = rows(pos[:1], neg[:, 0], (pos[None, 1:], neg[:, 1:]))
    ranks = [mid_rank(pos[k : k + 1], neg[:, k]) for k in range(1, 4)]
    rank = found["rank"]
    assert (rank.se, rank.lo, rank.hi, rank.interval, rank.n) == (None, None, None, "none", 1)
    assert rank.reason.endswith("oracles: " + ", ".join(f"{r:.2f}" for r in ranks))
    gap, spread = found["gap"], np.std(ranks, ddof=1) * np.sqrt(4 / 3)
    assert gap.value == pytest.approx(rank.value - np.mean(ranks))
    assert gap.se == pytest.approx(spread)
    assert (gap.lo, gap.hi) == pytest.approx(tuple(gap.value + spread * np.array(stats.t.interval(0.95, 2))))


def test_the_interval_of_a_gap_holds_zero_for_one_further_oracle_at_its_nominal_rate():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(600):
        pos, neg = drawn(rng, 4)  # all alike: none has seen the image
        gap = rows(pos[:1], neg[:, 0], (pos[None, 1:], neg[:, 1:]))["gap"]
        held.append(gap.lo <= 0 <= gap.hi)
    assert 0.92 <= np.mean(held) <= 0.98


def test_no_interval_without_a_spread_of_oracles():
    others = np.arange(10.0)
    for count, words in ((1, "at least two"), (2, "same rank")):
        same = (np.full((1, count), 4.5), np.stack([others] * count, 1))
        gap = rows([9.5], others, same)["gap"]
        assert gap.value == 0.5
        assert (gap.se, gap.lo, gap.hi) == (None, None, None)
        assert words in gap.reason
    alone = rows([9.5], others)["gap"]
    assert (alone.value, alone.status, alone.reason) == (None, "skipped", "no oracle")


@pytest.mark.parametrize("attack", [Loss, PIA, LiRA])
def test_a_single_forgotten_image_has_a_rank_and_no_auc(points_task, attack):
    judge = Judge(1, 6).eval()
    oracles = {f"oracle-{k}": subject(points_task, judge, tiny_model(points_task, seed=k + 1)) for k in range(4)}
    for name, model in {"candidate": tiny_model(points_task, seed=9), "oracle-0": None}.items():
        s = oracles[name] if model is None else subject(points_task, judge, model)
        s.peers = {"base": subject(points_task, judge)} | oracles
        scores = attack().scores(s)
        by_name = {m.name: m for m in attack().rows(scores, s, {})}
        assert 0 <= by_name["rank"].value <= 1
        assert by_name["gap"].lo <= by_name["gap"].value <= by_name["gap"].hi
        assert "leak" not in by_name
        for metric in ("auc", "advantage", "tpr_at_1", "tpr_at_01", "equivalence_p"):
            assert (by_name[metric].value, by_name[metric].reason) == (None, ONE_IMAGE)
        assert set(attack().values(scores, s)) <= {"retain_auc"}  # a rank has no jackknife
        assert set(by_name) <= set(attack.directions)
    assert TIER.membership_images >= 2  # so that one image means one distinct image
