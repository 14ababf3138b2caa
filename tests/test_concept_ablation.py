"""The losses of Concept Ablation against plain renderings in float64, the weights that it changes, and settings that cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_table import D, build
from tiny import PROMPTS, TinyText, batch_for, text_task, tiny_model, tiny_task

from methods import gradients
from methods.base import Goal
from methods.concept_ablation import (
    ConceptAblation,
    ConceptAblationSettings,
    first_token_constant,
    layer_names,
    named_rows,
    prompt_projections,
)
from methods.pairing import pairs

CPU = torch.device("cpu")
FORGOTTEN, ANCHOR = 2, 4  # of the tiny tasks
GOAL = Goal("concept", FORGOTTEN, ANCHOR, tuple(range(6)), PROMPTS[FORGOTTEN], tuple(PROMPTS.items()))


def text(**settings):
    task = text_task()
    task.__dict__["goal"] = GOAL
    return build("concept_ablation", task, model=TinyText.tiny(dtype=D), **settings)


def of(family: str, **settings):
    return text(**settings) if family == "text" else build("concept_ablation", tiny_task("class"), **settings)


def plain_loss(method, rows, name, of_model):
    """The mean over rows and elements, row by row, from the definition; of_model: the target is the network's own."""
    model, total = method.model, torch.zeros((), dtype=D)
    asked, anchor = pairs(method.goal, CPU)
    for i in range(len(rows.seeds)):
        seed = rows.seeds[i : i + 1]
        u = model.uniform(seed, 2)[0]
        t = (u[0] * len(model.alphas)).long().view(1)
        image = int(u[1] * len(method.x))
        c = image % len(anchor)
        x, eps = method.x[image : image + 1], model.noise(seed).to(D)
        gamma, sigma = model.gamma_sigma(t)
        x_t = gamma.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1) * eps
        cond = asked[c : c + 1] if name == "concept" else anchor[c : c + 1]
        output = model.predict(x_t, t, cond)
        y = model.predict(x_t, t, anchor[c : c + 1]).detach() if of_model else model.target(x, eps, t)
        total = total + (output - y).square().mean() / len(rows.seeds)
    return total


@pytest.mark.parametrize("family", ["class", "text"])
@pytest.mark.parametrize("target", ["model", "noise"])
def test_losses_and_their_gradient_are_those_of_the_definition(family, target):
    method, task = of(family, target=target, lam=0.3)
    with torch.no_grad():  # away from the base, where the answers for two names differ
        for k, p in enumerate(method.params):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=D))
    batch = batch_for(method, task)
    flat, scalars = method.direction(batch)
    ablation = plain_loss(method, batch["ablation"], "concept", target == "model")
    anchor = plain_loss(method, batch["anchor"], "anchor", False)
    assert float(scalars["ablation_loss"]) == pytest.approx(float(ablation.detach()))
    assert float(scalars["anchor_loss"]) == pytest.approx(float(anchor.detach()))
    expected = torch.autograd.grad(ablation + 0.3 * anchor, method.params, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(flat, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_a_constant_teacher():
    """By finite differences, where the answer for the anchor is that of the weights before the step."""
    method, task = of("class", lam=0.0)
    batch = batch_for(method, task)
    rows, concept, anchor = method.of_anchor(batch["ablation"])
    flat = method.direction(batch)[0].clone()
    model, step = method.model, 1e-5
    t = (model.uniform(rows.seeds, 1)[:, 0] * len(model.alphas)).long()
    x_t = model.add_noise(rows.x, model.noise(rows.seeds).to(D), t)
    with torch.no_grad():
        teacher = model.predict(x_t, t, anchor)
        losses = []
        along = gradients.split(method.params, flat / flat.norm())
        for sign in (1, -1):
            for p, d, p0 in zip(method.params, along, method.start, strict=True):
                p.copy_(p0 + sign * step * d)
            losses.append(float((model.predict(x_t, t, concept) - teacher).square().mean()))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(flat.norm()), rel=1e-6)


@pytest.mark.parametrize("family", ["class", "text"])
def test_nothing_changes_if_the_anchor_is_the_concept(family):
    method, task = of(family, lam=0.0, weight_decay=0.0)
    method.goal = replace(method.goal, override_class=FORGOTTEN)
    method.concept, method.anchor = pairs(method.goal, CPU)
    flat, scalars = method.direction(batch_for(method, task))
    assert float(scalars["ablation_loss"]) == 0
    assert not flat.any()
    method.step(batch_for(method, task))
    assert all(torch.equal(p, p0) for p, p0 in zip(method.params, method.start, strict=True))


def test_the_concept_is_answered_as_the_anchor():
    method, task = of("class", lam=0.2, steps=20, lr=1e-2, weight_decay=0.0)
    with torch.no_grad():  # classes that the tiny base tells apart
        method.model.net.class_embedding.weight.mul_(5)
    distances = []
    for k in range(20):
        if k in (0, 19):
            rows, concept, anchor = method.of_anchor(batch_for(method, task, 1000)["ablation"])
            t = torch.full((len(rows.x),), 500)
            with torch.no_grad():
                answers = [method.model.predict(rows.x, t, c) for c in (concept, anchor)]
            distances.append(float((answers[0] - answers[1]).square().mean()))
        method.step(batch_for(method, task, k))
    assert distances[1] < 0.2 * distances[0]


@pytest.mark.parametrize("family", ["class", "text"])
def test_images_are_the_base_models_own_for_the_anchor(family):
    method, task = of(family)
    hp, base = method.hp, TinyText.tiny(dtype=D) if family == "text" else tiny_model(task, dtype=D)
    assert len(method.x) == hp.images
    _, anchor = pairs(method.goal, CPU)
    seeds = task.batch({"images": replace(method.draws()["ablation"], size=hp.images)}, 0, 0)["images"].seeds
    again = base.sample(anchor[torch.zeros(hp.images, dtype=torch.long)], seeds, hp.sampler_steps, hp.guidance, eta=1.0)
    torch.testing.assert_close(method.x, again.to(D))


def test_prompts_of_the_two_classes_are_paired_in_their_order():
    prompts = ((1, (0, 5, 7)), (2, (0, 6, 7)), (2, (0, 6, 8)), (1, (0, 5, 8)))
    concept, anchor = pairs(Goal("concept", 2, 1, (1, 2), (0, 6, 7), prompts), CPU)
    assert concept.tolist() == [[0, 6, 7], [0, 6, 8]]
    assert anchor.tolist() == [[0, 5, 7], [0, 5, 8]]
    assert named_rows(concept, anchor).tolist() == [6]


EXPECTED = {
    ("class", "embedding"): {"class_embedding.weight"},
    ("class", "cross_attention"): {"class_embedding.weight"},
    ("text", "embedding"): {"text_encoder.embeddings.token_embedding.weight"},
}


@pytest.mark.parametrize("family", ["class", "text"])
@pytest.mark.parametrize("layers", ["embedding", "cross_attention", "attention", "full"])
def test_only_the_layers_of_the_setting_change(family, layers):
    method, task = of(family, layers=layers, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in method.model.net.named_parameters()}
    method.step(batch_for(method, task))
    changed = {n for n, p in method.model.net.named_parameters() if not torch.equal(p, before[n])}
    expected = EXPECTED.get((family, layers)) or layer_names(method.model.net, layers)
    assert changed <= expected
    assert not any(n.startswith("text_encoder") for n in changed) or layers == "embedding"
    if layers == "cross_attention" and family == "text":
        assert expected == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    if (
        layers != "full"
    ):  # where not every weight has a gradient; a softmax does not see the bias of its keys, up to rounding
        assert changed | {n for n in expected if n.endswith("to_k.bias")} == expected
    if layers == "embedding":
        (name,) = changed
        rows = (dict(method.model.net.named_parameters())[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert rows == [FORGOTTEN if family == "class" else 1 + FORGOTTEN]


def test_no_gradient_passes_through_the_keys_and_values_of_the_first_token():
    """The gradient of the projections is the sum over all tokens but the first one of (output's gradient) (input)^T."""
    method, task = text(lam=0.0, layers="cross_attention", first_token="constant")
    seen, projections = [], prompt_projections(method.model.net)

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            seen.append((module, inputs[0].detach(), output))

    batch = batch_for(method, task)
    hooks = [m.register_forward_hook(keep) for m in projections]
    constant, scalars = method.direction(batch)
    for hook in hooks:
        hook.remove()
    constant = constant.clone()
    by_weight = {id(m.weight): torch.einsum("bto,bti->oi", o.grad[:, 1:], x[:, 1:]) for m, x, o in seen}
    expected = torch.cat([by_weight[id(p)].reshape(-1) for p in method.params])
    torch.testing.assert_close(constant, expected, rtol=1e-9, atol=1e-14)
    other, _ = text(lam=0.0, layers="cross_attention")
    trained, same = other.direction(batch)
    assert not torch.allclose(constant, trained, rtol=1e-3)
    assert float(same["ablation_loss"]) == float(scalars["ablation_loss"])
    assert all(not m._forward_hooks for m in projections)


def test_hooks_end_with_an_error():
    net = TinyText.tiny().net

    def stop_within():
        with first_token_constant(net):
            assert all(m._forward_hooks for m in prompt_projections(net))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_within()
    assert all(not m._forward_hooks for m in prompt_projections(net))


def test_settings_that_cannot_work_are_named():
    hp = ConceptAblationSettings
    model, goal = tiny_model(tiny_task("class")), tiny_task("class").goal
    assert ConceptAblation.unsuited(hp(), model, goal) == []
    assert ConceptAblation.unsuited(hp(layers="cross_attention", first_token="constant"), TinyText.tiny(), GOAL) == []
    (reason,) = ConceptAblation.unsuited(hp(), model, replace(goal, override_class=None))
    assert reason == "the task names no class or concept that is to stand in for the forgotten one"
    (reason,) = ConceptAblation.unsuited(hp(first_token="constant"), model, goal)
    assert reason == "first_token: constant needs a network with cross-attention; use trained"
    (reason,) = ConceptAblation.unsuited(hp(sampler_steps=2000), model, goal)
    assert reason == "sampler_steps: 2000 is more than the 1000 steps of the schedule"
    model.net.class_embedding.requires_grad_(False)
    (reason,) = ConceptAblation.unsuited(hp(layers="embedding"), model, goal)
    assert reason.startswith("layers: embedding names no weight of this model that may change; valid: attention, full")
    more = replace(GOAL, prompts=(*GOAL.prompts, (ANCHOR, (0, 1, 5, 11))))
    (reason,) = ConceptAblation.unsuited(hp(), TinyText.tiny(), more)
    assert reason.endswith("pairs the prompts of the forgotten class with those of its stand-in, and there are 1 and 2")
    shorter = replace(GOAL, prompts=((FORGOTTEN, (0, 8, 11, 11)), (ANCHOR, (0, 5, 8, 11))))
    (reason,) = ConceptAblation.unsuited(hp(layers="embedding"), TinyText.tiny(), shorter)
    assert reason.endswith("the prompts of the forgotten class have no token that those of its stand-in lack")
