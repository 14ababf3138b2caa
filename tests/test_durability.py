"""Attacks that bring the forgotten data back: what they change, their controls, and what they detect."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_evaluators import overfitted, subject
from tiny import tiny_model

from evaluators.base import Inapplicable
from evaluators.durability import (
    FineTuning,
    Interpolation,
    Inversion,
    LatentNoise,
    PartialDiffusion,
    Quantisation,
    Relearning,
    SamplerRemoval,
    WeightNoise,
    plain,
)
from evaluators.inpainting import Inpainting
from evaluators.judge import train_judge
from evaluators.tampering import changed, fine_tuned, inverted, quantised
from methods.retrain import Retrain, RetrainSettings

SIZES = {"class_samples": 60, "noises": 10, "relearn_steps": (0, 3), "inversion_steps": 3}


@pytest.fixture(scope="module")
def judge(class_task):
    split = class_task.splits["judge_probe"]
    return train_judge(split.x, split.groups, seed=0, steps=150)


def trained(task, split, steps=400, seed=0):
    model = tiny_model(task, seed=seed)
    method = Retrain(model, RetrainSettings(steps=steps, split=split, batch_size=36, lr=5e-3, ema=0.9))
    for step in range(steps):
        method.step(task.batch(method.draws(), seed, step))
    method.finish()
    return model


@pytest.fixture(scope="module")
def base(class_task):
    return trained(class_task, "train")


def whole(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


ATTACKS = [Relearning, FineTuning, Quantisation, WeightNoise, LatentNoise, PartialDiffusion, Inversion, Inpainting]


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_leaves_the_model_alone_and_repeats(class_task, judge, attack):
    one, two = (subject(class_task, judge, **SIZES) for _ in range(2))
    before = whole(one.model).clone()
    first, second = attack().scores(one), attack().scores(two)
    assert torch.equal(before, whole(one.model))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_zero_steps_of_relearning_are_no_attack(class_task, points_task, judge):
    for task in (class_task, points_task):
        s = subject(task, judge, **SIZES)
        scores = Relearning().scores(s)
        np.testing.assert_array_equal(scores["0 steps"], plain(s))
        np.testing.assert_array_equal(scores["none"], plain(s))


@pytest.mark.parametrize("attack", [*ATTACKS, Interpolation])
def test_a_model_has_no_excess_over_itself(class_task, judge, attack):
    s, oracle = subject(class_task, judge, **SIZES), subject(class_task, judge, **SIZES)
    s.peers = {"base": s, "oracle-0": oracle}
    values = attack().values(attack().scores(s), s)
    assert values["excess"] == 0.0
    assert all(v == 0.0 for k, v in values.items() if k.startswith("excess@"))


def test_without_oracles_there_is_no_excess(class_task, judge):
    s = subject(class_task, judge, **SIZES)
    scores = Quantisation().scores(s)
    values = Quantisation().values(scores, s)
    rows = {m.name: m for m in Quantisation().rows(scores, s, {k: np.full(5, v) for k, v in values.items()})}
    assert rows["excess"].status == "skipped"
    assert "no oracle" in rows["excess"].reason


def test_rounding():
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in (4, 8):
        q = quantised(w, bits)
        scale = w.abs().flatten(1).amax(1) / (2 ** (bits - 1) - 1)
        assert ((q - w).abs().flatten(1) <= scale[:, None] / 2 + 1e-12).all()
        assert max(len(row.unique()) for row in q.flatten(1)) <= 2**bits - 1
        torch.testing.assert_close(quantised(q, bits), q)
    assert (quantised(w, 16) - w).abs().max() < 1e-3
    assert torch.equal(quantised(torch.zeros(2, 3), 8), torch.zeros(2, 3))


def test_changes_keep_biases_and_norms(class_task, judge):
    s = subject(class_task, judge)
    other = changed(s, lambda w: w + 1)
    for p, q in zip(s.model.net.parameters(), other.model.net.parameters(), strict=True):
        assert torch.equal(p + 1, q) if p.dim() > 1 else torch.equal(p, q)


def test_inversion_moves_one_embedding_only(class_task, judge):
    s = subject(class_task, judge, **SIZES)
    changed_model = inverted(s, s.sizes["inversion_steps"]).model
    for (name, p), q in zip(s.model.net.named_parameters(), changed_model.net.parameters(), strict=True):
        moved = (p != q).flatten(1).any(1) if name == "class_embedding.weight" else (p != q).any()
        if name == "class_embedding.weight":
            assert moved.tolist() == [c == class_task.forget_class for c in range(len(p))]
        else:
            assert not moved


def test_attacks_that_do_not_apply_give_the_reason(class_task, points_task, judge):
    with pytest.raises(Inapplicable, match="no base to move towards"):
        Interpolation().scores(subject(class_task, judge, **SIZES))
    with pytest.raises(Inapplicable, match="as its base is"):
        SamplerRemoval().scores(subject(class_task, judge, **SIZES))
    assert "points" not in Inversion.kinds


def test_a_model_that_refuses_by_its_sampler_is_exposed(class_task, judge, base):
    hiding = copy.copy(base)
    hiding.use_sampler(
        "safe", concept=2, mu="at_least_one", scale=1.0, threshold=0.01, momentum=0.3, beta=0.4, warmup=0.0
    )
    s = subject(class_task, judge, hiding, **SIZES)
    values = SamplerRemoval().values(SamplerRemoval().scores(s), s)
    assert values["presence@removed"] > 0.5
    assert values["presence@none"] < 0.2


def test_a_hidden_label_is_found_by_inversion_and_relearning(class_task, judge, base):
    """The network still knows the class; only the embedding of the forgotten label was replaced."""
    hiding = copy.copy(base)
    hiding.net = copy.deepcopy(base.net)
    with torch.no_grad():
        hiding.net.class_embedding.weight[2] = hiding.net.class_embedding.weight[4]
    oracle = trained(class_task, "retain", seed=1)
    sizes = SIZES | {"inversion_steps": 60, "relearn_steps": (20,)}
    s = subject(class_task, judge, hiding, **sizes)
    s.peers = {
        "base": subject(class_task, judge, base, **SIZES),
        "oracle-0": subject(class_task, judge, oracle, **sizes),
    }
    values = Inversion().values(Inversion().scores(s), s)
    assert values["presence@none"] < 0.2
    assert values["presence@embedding"] > 0.6
    back = Interpolation().values(Interpolation().scores(s), s)
    assert back["presence@0.5"] > back["presence@none"]


def test_fine_tuning_starts_from_the_model_and_has_an_effect(points_task, judge):
    s = subject(points_task, judge, overfitted(points_task, 100), **SIZES)
    taught = fine_tuned(s, points_task.splits["forget"].distinct(), (0, 40), "relearning")
    assert torch.equal(whole(taught[0].model), whole(s.model))
    assert plain(taught[40]).mean() > plain(s).mean()


def test_sampling_with_more_noise(class_task):
    model, seeds = tiny_model(class_task), torch.arange(4)
    cond = torch.tensor([1, 2, 3, 4])
    usual = model.sample(cond, seeds, 4)
    stochastic = model.sample(cond, seeds, 4, eta=1.0)
    assert not torch.equal(usual, stochastic)
    torch.testing.assert_close(model.sample(cond[2:], seeds[2:], 4, eta=1.0), stochastic[2:])
    assert torch.equal(model.sample(cond, seeds, 4, eta=0.0, noise_scale=1.0), usual)
    assert not torch.equal(model.sample(cond, seeds, 4, noise_scale=1.2), usual)
