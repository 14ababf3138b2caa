"""Completing pictures: what is given stays, nothing else of the picture is used, and the sampler is the model's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_evaluators import subject
from test_latent import plain, xl
from tiny import edm_model, latent_task, tiny_model, tiny_task

from evaluators.base import correlation
from evaluators.inpainting import Inpainting, hidden_correlation, known_part
from evaluators.judge import Judge
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models.samplers import OneStep

SEEDS = torch.arange(6) + 3
SAFE = {
    "concept": 2,
    "mu": "at_least_one",
    "scale": 1.0,
    "threshold": 0.01,
    "momentum": 0.3,
    "beta": 0.4,
    "warmup": 0.0,
}


def with_sampler(kind: str, **settings):
    model = copy.copy(tiny_model(tiny_task("class")))
    model.use_sampler(kind, **settings)
    return model


MODELS = {
    "ddim": lambda: tiny_model(tiny_task("class")),
    "heun": edm_model,
    "safe": lambda: with_sampler("safe", **SAFE),
    "latent": plain,
    "xl": xl,
}


def rows(model):
    """(x0, known, cond) for `SEEDS`."""
    x0 = torch.rand((6, *model.image_shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    cond = model.tokens(["a ring", "a box"])[torch.arange(6) % 2] if model.latent else torch.arange(6) % 6
    return x0, known_part(6, model.image_shape[1:], 1 / 2), cond


@pytest.mark.parametrize("name", MODELS)
def test_what_is_given_stays_and_what_is_not_has_no_influence(name):
    model = MODELS[name]()
    x0, known, cond = rows(model)
    drawn = model.complete(x0, known, cond, SEEDS, 4, 1.5)
    everywhere = known.expand(x0.shape)
    assert torch.equal(drawn[everywhere], x0[everywhere])
    other = torch.where(known, x0, -x0.flip(0))
    assert torch.equal(model.complete(other, known, cond, SEEDS, 4, 1.5), drawn)
    moved = model.complete(-x0, known, cond, SEEDS, 4, 1.5)
    assert not torch.equal(moved[~everywhere], drawn[~everywhere])


@pytest.mark.parametrize("name", MODELS)
def test_a_picture_of_which_nothing_is_given_is_a_sample(name):
    model = MODELS[name]()
    x0, known, cond = rows(model)
    nothing = model.complete(x0, torch.zeros_like(known), cond, SEEDS, 4, 1.5)
    torch.testing.assert_close(nothing, model.sample(cond, SEEDS, 4, 1.5), atol=1e-5, rtol=0)
    stochastic = model.complete(x0, torch.zeros_like(known), cond, SEEDS, 4, 1.5, eta=1.0)
    torch.testing.assert_close(stochastic, model.sample(cond, SEEDS, 4, 1.5, eta=1.0), atol=1e-5, rtol=0)


def test_a_generator_of_one_step_completes_by_the_usual_sampler():
    model, distilled = tiny_model(tiny_task("class")), tiny_model(tiny_task("class"))
    distilled.sampler = OneStep(t=700)
    x0, known, cond = rows(model)
    assert torch.equal(distilled.complete(x0, known, cond, SEEDS, 4), model.complete(x0, known, cond, SEEDS, 4))


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 2)])
def test_each_half_and_each_corner_is_given_in_turn(size):
    halves, corners = known_part(9, size, 1 / 2), known_part(9, size, 1 / 4)
    assert halves.shape == corners.shape == (9, 1, *size)
    for masks in (halves, corners):
        assert torch.equal(masks[:4], masks[4:8])
        assert len({m.numpy().tobytes() for m in masks[:4]}) == 4
        assert bool(masks.flatten(1).any(1).all())
        assert bool((~masks).flatten(1).any(1).all())
    assert bool((halves[0] ^ halves[1]).all())
    assert bool((halves[2] ^ halves[3]).all())
    assert bool((corners[:4].sum(0) == 1).all())


def test_the_correlation_is_that_of_the_hidden_part():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 2, 4, 6, generator=g) for _ in range(2))
    known = known_part(4, (4, 6), 1 / 2)
    expected = [
        correlation(a[:, ~m[0]][None, :, :, None], b[:, ~m[0]][None, :, :, None])
        for a, b, m in zip(x, y, known, strict=True)
    ]
    torch.testing.assert_close(hidden_correlation(x, y, known), torch.cat(expected))


def test_a_memorised_picture_is_completed_and_an_unseen_one_is_not(points_task):
    judge, model = Judge(1, 6).eval(), tiny_model(points_task)
    method = Retrain(model, RetrainSettings(steps=80, split="forget", batch_size=8, lr=5e-3, ema=0.9))
    for step in range(80):
        method.step(points_task.batch(method.draws(), 0, step))
    method.finish()
    s = subject(points_task, judge, model, noises=20)
    oracle = subject(points_task, judge, noises=20)
    s.peers = {"oracle-0": oracle}
    scores = Inpainting().scores(s)
    values = Inpainting().values(scores, s)
    assert values["presence@half given"] > values["presence@null: half of another"] + 0.3
    assert values["excess@half given"] > 0.3
    assert values["gain"] > 0
    names = {m.name for m in Inpainting().rows(scores, s, {k: np.full(5, v) for k, v in values.items()})}
    assert {"gain", "excess@null: half of another", "presence@quarter given"} <= names


def test_without_the_label_an_edit_of_the_label_hides_nothing(class_task, monkeypatch):
    brightness = "evaluators.inpainting.recognised"  # in place of an untrained judge, which sees one class everywhere
    monkeypatch.setattr(brightness, lambda s, images: images.flatten(1).mean(1).numpy())
    judge, model, other = Judge(1, 6).eval(), tiny_model(class_task), tiny_model(class_task)
    with torch.no_grad():
        other.net.class_embedding.weight[class_task.forget_class] += 20.0
    one, two = (subject(class_task, judge, m, class_samples=60) for m in (model, other))
    first, second = ({s: attack(x) for s, attack in Inpainting().attacks(x).items()} for x in (one, two))
    np.testing.assert_array_equal(first["half given, no label"], second["half given, no label"])
    for strength in ("half given", "quarter given", "null: half of another"):
        assert not np.array_equal(first[strength], second[strength])


def test_concepts_are_completed_under_the_prompts_of_the_audit():
    tier = Tier(seed=1, judge="audit", checks=("inpainting",), groups=5, class_samples=10)
    torch.manual_seed(0)
    result = measure(subject_of(plain(), latent_task(), Judge(3, 4).eval(), tier), tier)
    assert {r.name for r in result.rows if r.status == "ok"} >= {"presence@half given", "gain"}
