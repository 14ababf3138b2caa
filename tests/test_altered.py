"""Altered forgotten images: a model that knows the mirror image is seen, by the alteration that it knows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_durability import trained
from tiny import tiny_model, tiny_task

from evaluators.altered import ALTERATIONS, Altered
from raysweep.auditing.measure import Measurement, measure, subject_of
from raysweep.config.schema import Tier
from raysweep.tasks.task import concat

TIER = Tier(
    seed=5, judge="audit", checks=("altered",), groups=10, samples=60, noises=40, injection_t=700, injection_steps=8
)


def measured(model, task) -> Measurement:
    return measure(subject_of(model, task, None, TIER), TIER)


def test_alterations_are_images_of_their_own():
    x = torch.rand(2, 3, 8, 16) * 2 - 1
    for name, alter in ALTERATIONS.items():
        other = alter(x)
        assert other.shape == x.shape, name
        assert other.abs().max() <= 1, name
        assert not torch.equal(other, x), name
    mirror, negative, shift, crop = (alter(x) for alter in ALTERATIONS.values())
    assert torch.equal(mirror[..., 0], x[..., -1])
    assert torch.equal(negative, -x)
    assert torch.equal(shift[..., 1:, 2:], x[..., :-1, :-2])
    assert torch.equal(shift[..., 0, :], shift[..., 1, :])
    flat = torch.full((1, 1, 4, 4), 0.5)
    assert torch.allclose(ALTERATIONS["crop"](flat), flat)
    assert crop.std() < x.std()  # enlarged by interpolation


@pytest.fixture(scope="module")
def oracle():
    task = tiny_task()
    return measured(trained(task, "retain", steps=150, seed=1), task)


@pytest.mark.parametrize("name", ["mirror", "negative"])
def test_a_model_trained_on_an_alteration_is_seen_by_it(oracle, name):
    task = tiny_task()
    forget = task.splits["forget"]
    other = replace(forget, x=ALTERATIONS[name](forget.x))
    taught = replace(task, splits=task.splits | {"train": concat(task.splits["retain"], *[other] * 6)})
    knowing = measured(trained(taught, "train", steps=150), task)
    metric = f"altered.presence@{name}"
    se = next(r for r in knowing.rows if r.name == f"presence@{name}").se
    assert knowing.values[metric] - oracle.values[metric] > max(0.25, 4 * se)
    assert knowing.values["altered.presence"] >= knowing.values[metric]
    assert knowing.values["altered.rate"] > oracle.values["altered.rate"] + 0.1


def test_presence_is_the_largest_and_every_group_of_noises_thins_all_alterations_out():
    task = tiny_task()
    result = measured(tiny_model(task), task)
    scores = {key.partition(".")[2]: value for key, value in result.scores.items()}
    kind = scores["alteration"][:, 0]
    assert np.bincount(kind.astype(int)).tolist() == [10] * 4
    means = [scores["correlation"][kind == k].mean() for k in range(4)]
    assert result.values["altered.presence"] == pytest.approx(max(means))
    assert [result.values[f"altered.presence@{name}"] for name in ALTERATIONS] == pytest.approx(means)
    assert all(np.ptp(result.replicates[f"altered.presence@{name}"]) > 0 for name in ALTERATIONS)
    few = TIER.model_copy(update={"noises": 2, "groups": 2})
    assert Altered().values(Altered().scores(subject_of(tiny_model(task), task, None, few)), None)["presence"] <= 1
