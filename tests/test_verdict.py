"""Verdicts: labels by the attacks that bring the forgotten data back."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators import durability
from evaluators.oracles import compare
from raysweep.auditing import verdict as verdict_words
from raysweep.auditing.terms import columns_of, comparison_of
from raysweep.auditing.verdict import MARGIN, verdict

REACH = {"latent_noise": "input", "relearning": "weights", "interpolation": "base", "quantisation": "weights"}


def row(check, strength, value, se=0.03, oracles=5):
    """An excess whose error is half of sampling and half of the oracles' spread."""
    half = se / np.sqrt(2)
    comparison = (
        compare(value, _spread(half, oracles), half, df=400) if oracles > 1 else compare(value, [0.0], se, df=400)
    )
    common = {"check": check, "metric": f"excess@{strength}", "status": "ok", "paired_with": ""}
    return common | {"value": value, "se": comparison.se} | columns_of(comparison)


def _spread(se, oracles):
    """Values of oracles with mean 0 that leave a standard error of prediction `se`."""
    values = np.linspace(-1, 1, oracles)
    return values / values.std(ddof=1) * se / np.sqrt(1 + 1 / oracles)


def rows(none=0.0, latent=0.0, relearned=0.0, rounded=0.0, moved=0.9, se=0.03):
    return [
        row("relearning", "none", none, se),
        row("latent_noise", "eta 1", latent, se),
        row("relearning", "25 steps", relearned, se),
        row("quantisation", "int4", rounded, se),
        row("interpolation", "0.5", moved, se),
    ]


@pytest.mark.parametrize(
    ("attacked", "label"),
    [
        (rows(), "like the oracle"),
        (rows(none=0.9, latent=0.9, relearned=0.5), "remembers"),
        (rows(latent=0.6), "merely avoided"),
        (rows(relearned=0.5), "concealed"),
        (rows(rounded=0.4), "concealed"),
        (rows(latent=0.6, relearned=0.6), "merely avoided"),
        (rows(relearned=-0.9), "like the oracle"),
    ],
)
def test_labels(attacked, label):
    assert verdict(attacked, REACH, 0.9, 0.9).label == label


def test_the_null_of_an_attack_does_not_count():
    assert verdict_words.NULL == durability.NULL
    attacked = [*rows(), row("latent_noise", f"{durability.NULL}something else", 0.9)]
    assert verdict(attacked, REACH, 0.9, 0.9) == verdict(rows(), REACH, 0.9, 0.9)


def test_a_verdict_names_the_attacks_behind_it():
    v = verdict(rows(relearned=0.5), REACH, 0.9, 0.9)
    assert v.by == ("relearning 25 steps (+0.50)",)
    assert "relearning 25 steps" in v.sentence()
    like = verdict(rows(), REACH, 0.9, 0.9)
    assert 0 < like.within <= MARGIN
    below = verdict(rows(-0.5, -0.5, -0.5, -0.5), REACH, 0.9, 0.9)
    assert "more than 0.00 above the mean of the oracles" in below.sentence()  # "more than -0.44" would be no bound
    assert like.tested == 4  # moving towards the base does not count


def test_a_destroyed_model_gets_no_better_label():
    assert verdict(rows(), REACH, 0.3, 0.9).label == "destroyed"
    assert verdict([], REACH, 0.3, 0.9).label == "not tested"


def test_like_the_oracle_is_a_claim_of_equivalence():
    """More noise never turns a verdict into a better one: what it leaves open is undecided."""
    assert verdict(rows(relearned=0.05, se=0.01), REACH, 0.9, 0.9).label == "like the oracle"
    for se in (0.1, 0.3, 1.0):
        open_ = verdict(rows(relearned=0.05, se=se), REACH, 0.9, 0.9)
        assert open_.label == "undecided"
        assert open_.within > MARGIN
        assert f"an excess of up to {open_.within:.2f}" in open_.sentence()
    assert verdict(rows(relearned=0.3, se=0.2), REACH, 0.9, 0.9).label == "undecided"
    at_the_margin = verdict(rows(relearned=0.1, se=0.001), REACH, 0.9, 0.9)
    assert at_the_margin.label == "undecided"
    assert verdict(rows(rounded=0.2, se=0.0), REACH, 0.9, 0.9).label == "concealed"


def test_an_undecided_verdict_says_what_would_decide():
    by_draws = verdict([row("relearning", "25 steps", 0.04, 0.08, oracles=12)], REACH, 0.9, 0.9)
    assert by_draws.label == "undecided"
    assert by_draws.draws > 1
    assert "times the samples and noises of audit.durability would decide" in by_draws.sentence()
    by_oracles = verdict([row("relearning", "25 steps", 0.02, 0.16, oracles=3)], REACH, 0.9, 0.9)
    assert by_oracles.draws is None
    assert by_oracles.oracles > 3
    assert f"at least {by_oracles.oracles} are needed" in by_oracles.sentence()


def test_one_oracle_never_shows_equivalence():
    one = verdict([row("relearning", "25 steps", 0.0, 0.001, oracles=1)], REACH, 0.9, 0.9)
    assert one.label == "undecided"
    assert one.oracles == 3


def test_many_attacks_on_a_further_oracle_rarely_accuse_it():
    rng, accused = np.random.default_rng(0), 0
    for _ in range(300):
        attacked = []
        for k in range(14):
            values = 0.08 * rng.normal(size=6)  # all of one population, which differs as much as the margin
            comparison = compare(values[0], values[1:], 0.02)
            common = {"check": "quantisation", "metric": f"excess@{k}", "status": "ok", "paired_with": ""}
            attacked.append(common | {"value": comparison.difference, "se": comparison.se} | columns_of(comparison))
        accused += verdict(attacked, REACH, 0.9, 0.9).label not in ("like the oracle", "undecided")
    assert accused / 300 <= 0.08


def test_each_label_is_tested_apart_from_the_attacks_of_the_others():
    """One input attack that is clear alone, next to many attacks on the weights that bring nothing back."""
    silent = [row("quantisation", f"int{bits}", 0.0, 0.01) for bits in range(2, 14)]
    avoided = row("latent_noise", "eta 1", 0.3, 0.1)
    assert (
        0.05 / 13 < comparison_of(avoided).p_excess(MARGIN) < 0.05
    )  # one false-discovery control over all would miss it
    assert verdict([*silent, avoided], REACH, 0.9, 0.9).label == "merely avoided"
    strengths = [row("latent_noise", f"eta {k}", 0.0, 0.01) for k in range(2, 14)]
    assert verdict([*strengths, avoided], REACH, 0.9, 0.9).label not in ("merely avoided", "concealed")


def test_missing_and_paired_rows_are_left_out():
    absent = {**row("relearning", "25 steps", 0.9), "status": "failed"}
    paired = {**row("latent_noise", "eta 1", 0.9), "paired_with": "base"}
    assert verdict([*rows(), absent, paired], REACH, 0.9, 0.9).label == "like the oracle"
