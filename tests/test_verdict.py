"""Verdicts: labels by the attacks that bring the forgotten data back."""

from __future__ import annotations

import numpy as np
import pytest

from raysweep.auditing.verdict import verdict

REACH = {"latent_noise": "input", "relearning": "weights", "interpolation": "base", "quantisation": "weights"}


def row(check, strength, value, se=0.03):
    return {
        "check": check,
        "metric": f"excess@{strength}",
        "value": value,
        "se": se,
        "hi": value + 1.96 * se,
        "status": "ok",
        "paired_with": "",
    }


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


def test_a_verdict_names_the_attacks_behind_it():
    v = verdict(rows(relearned=0.5), REACH, 0.9, 0.9)
    assert v.by == ("relearning 25 steps (+0.50)",)
    assert "relearning 25 steps" in v.sentence()
    like = verdict(rows(), REACH, 0.9, 0.9)
    assert like.within == pytest.approx(1.96 * 0.03)
    below = verdict(rows(-0.5, -0.5, -0.5, -0.5), REACH, 0.9, 0.9)
    assert "more than 0.00 above the oracles" in below.sentence()  # "more than -0.44" would be no bound
    assert like.tested == 4  # moving towards the base does not count


def test_a_destroyed_model_gets_no_better_label():
    assert verdict(rows(), REACH, 0.3, 0.9).label == "destroyed"
    assert verdict([], REACH, 0.3, 0.9).label == "not tested"


def test_an_excess_within_the_margin_or_the_noise_is_no_evidence():
    assert verdict(rows(relearned=0.1, se=0.001), REACH, 0.9, 0.9).label == "like the oracle"
    assert verdict(rows(relearned=0.3, se=0.2), REACH, 0.9, 0.9).label == "like the oracle"
    # the sentence states the wide bound
    assert verdict(rows(relearned=0.3, se=0.2), REACH, 0.9, 0.9).within > 0.6
    assert verdict(rows(rounded=0.2, se=0.0), REACH, 0.9, 0.9).label == "concealed"


def test_many_attacks_on_an_oracle_rarely_accuse_it():
    rng, accused = np.random.default_rng(0), 0
    for _ in range(300):
        attacked = [
            row("quantisation", f"{k}", 0.1 + 0.05 * rng.normal(), 0.05) for k in range(20)
        ]  # truly at the margin
        accused += verdict(attacked, REACH, 0.9, 0.9).label != "like the oracle"
    assert accused / 300 <= 0.08


def test_missing_and_paired_rows_are_left_out():
    absent = {**row("relearning", "25 steps", 0.9), "status": "failed"}
    paired = {**row("latent_noise", "eta 1", 0.9), "paired_with": "base"}
    assert verdict([*rows(), absent, paired], REACH, 0.9, 0.9).label == "like the oracle"
