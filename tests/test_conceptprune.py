"""Wanda's scores, the activations that they are made of, and the pruned weights, against their definitions in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_table import D, build
from tiny import TinyText, concept_task, tiny_model, tiny_task

from methods.conceptprune import ConceptPrune, ConceptPruneSettings, pruned_weights, second_layers, skilled_weights
from methods.pairing import pairs
from methods.rows import SEEDS, Draw
from raysweep.registry import unserved

CPU = torch.device("cpu")


@st.composite
def layers(draw):
    """W (d, m), A of concept and reference (steps, m), without ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d, m, steps = draw(st.integers(1, 5)), draw(st.integers(2, 12)), draw(st.integers(1, 4))
    norms = (torch.tensor(rng.uniform(0.1, 2, (steps, m))) for _ in range(2))
    return torch.tensor(rng.standard_normal((d, m))), *norms


@given(layers(), st.floats(0.05, 1), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_pruned_weights_are_those_of_the_definition(layer, ratio, select):
    weight, concept, reference = layer
    mask = pruned_weights(weight, concept, reference, ratio, select)
    d, m = weight.shape
    for i in range(d):
        for j in range(m):
            votes = 0
            for a, b in zip(concept, reference, strict=True):
                scores = [abs(float(weight[i, k])) * float(a[k]) for k in range(m)]
                rank = sum(s > scores[j] for s in scores)
                votes += rank < int(ratio * m) and scores[j] > abs(float(weight[i, j])) * float(b[j])
            assert bool(mask[i, j]) == (votes > select * len(concept))


@given(layers(), st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_shares_are_exact_and_grow_with_the_ratio_and_the_steps(layer, ratio):
    weight, concept, reference = layer
    alone = skilled_weights(weight, concept[0], torch.zeros_like(concept[0]), ratio)
    assert alone.sum(1).tolist() == [int(ratio * weight.shape[1])] * len(weight)
    mask = pruned_weights(weight, concept, reference, ratio, 0.0)
    assert bool((mask | ~pruned_weights(weight, concept, reference, ratio / 2, 0.0)).all())
    assert bool((mask | ~pruned_weights(weight, concept[:1], reference[:1], ratio, 0.0)).all())
    assert bool((mask | ~pruned_weights(weight, concept, reference, ratio, 0.5)).all())
    assert not pruned_weights(weight, concept, concept, ratio, 0.0).any()


@pytest.mark.parametrize(
    ("tokens", "branches", "reference"), [("unit", "both", "override"), ("raw", "conditional", "unconditional")]
)
def test_activations_are_those_of_the_first_steps_of_the_sampler(tokens, branches, reference):
    task, model = concept_task(), TinyText.tiny(dtype=D)
    hp = ConceptPruneSettings(
        timesteps=2, sampler_steps=4, guidance=3.0, noises=3, tokens=tokens, branches=branches, reference=reference
    )
    prepared = ConceptPrune.prepare(model, task, 5, hp)
    seeds = task.batch({"noise": Draw(3, split=SEEDS)}, 5, 0)["noise"].seeds
    asked, other = pairs(task.goal, CPU)
    conditions = {"concept": asked, "reference": other if reference == "override" else model.unconditional(1)}
    name, layer = next(iter(second_layers(model.net).items()))
    for which, cond in conditions.items():
        total = torch.zeros(2, layer.in_features, dtype=D)
        for seed in seeds:
            with torch.no_grad():
                run = list(model.trajectory(cond, seed.view(1), 4, 3.0))
                for step, (t, x) in enumerate(run[:2]):
                    for condition in (cond, model.unconditional(1))[: 2 if branches == "both" else 1]:
                        (z,) = inputs_of(model, layer, x, t, condition)
                        for token in z.reshape(-1, z.shape[-1]):
                            total[step] += (token / token.norm() if tokens == "unit" else token).square()
        torch.testing.assert_close(prepared[f"{which}/{name}"], total.sqrt(), rtol=1e-9, atol=1e-12)
    assert all(not m._forward_pre_hooks for m in model.net.modules())


def inputs_of(model, layer, x, t, condition) -> list[torch.Tensor]:
    """The inputs of a layer in one pass of the network."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.predict(x, torch.tensor([t]), condition)
    hook.remove()
    return seen


def test_pruned_weights_become_zero_and_no_other_weight_changes():
    method, _ = build("conceptprune", ratio=0.2)
    before = {n: p.detach().clone() for n, p in method.model.net.named_parameters()}
    share = float(method.step({})["pruned"])
    pruned = total = 0
    for name, p in method.model.net.named_parameters():
        if name in second_layers(method.model.net):
            zero = p == 0
            assert torch.equal(p[~zero], before[name][~zero])
            pruned, total = pruned + int(zero.sum()), total + p.numel()
        else:
            assert torch.equal(p, before[name])
    assert share == pruned / total > 0
    once = {n: p.clone() for n, p in method.model.net.state_dict().items()}
    method.step({})
    assert all(torch.equal(p, once[n]) for n, p in method.model.net.state_dict().items())


def test_nothing_is_pruned_if_the_stand_in_is_the_concept():
    task = concept_task()
    task.__dict__["goal"] = replace(task.goal, override_class=task.goal.forget_class)
    method, _ = build("conceptprune", task, ratio=0.5)
    assert float(method.step({})["pruned"]) == 0
    assert method.finish()["distance"] == 0


def test_settings_and_models_that_cannot_work_are_named():
    hp, model, goal = ConceptPruneSettings, TinyText.tiny(), concept_task().goal
    assert ConceptPrune.unsuited(hp(ratio=0.1), model, goal) == []
    (reason,) = ConceptPrune.unsuited(hp(ratio=0.01), model, goal)
    assert reason == "ratio: 0.01 of the 32 weights of a row is less than one"
    (reason,) = ConceptPrune.unsuited(hp(ratio=0.1, timesteps=9, sampler_steps=8), model, goal)
    assert reason == "timesteps: 9 is more than the 8 of sampler_steps"
    alone = replace(goal, override_class=None)
    (reason,) = ConceptPrune.unsuited(hp(ratio=0.1), model, alone)
    assert reason == "the task names no class or concept that is to stand in for the forgotten one"
    assert ConceptPrune.unsuited(hp(ratio=0.1, reference="unconditional"), model, alone) == []
    model.net["unet"].requires_grad_(False)
    (reason,) = ConceptPrune.unsuited(hp(ratio=0.1), model, goal)
    assert reason == "no second layer of a feed-forward network of this model may change (train.modules)"
    task = tiny_task("class")
    assert reason in ConceptPrune.unsuited(hp(ratio=0.1), tiny_model(task), task.goal)
    (reason,) = unserved(ConceptPrune, "pixel-ddpm")
    assert reason == "it needs a model that offers feed-forward layers, and pixel-ddpm models do not"
