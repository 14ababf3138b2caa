"""The attack and both losses of AdvUnlearn against plain renderings in float64, and the weights that it changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_table import D, build
from tiny import TinyText, batch_for, concept_task, tiny_model, tiny_task

from methods.advunlearn import AdvUnlearn, AdvUnlearnSettings, behind, word_tables
from methods.losses import pick
from raysweep.registry import unserved

CPU = torch.device("cpu")
UNUSED = 9  # a word that no prompt has
NULL = [0, 11, 11, 11]


def by_a_word(model: TinyText, words: torch.Tensor, x_t, t, cond) -> torch.Tensor:
    """The predicted noise under prompts with one more word, whose embedding is in the encoder's table."""
    (table,) = word_tables(model.net)
    weight = table.weight.detach().clone()
    asked = torch.cat([cond[:, :1], torch.full_like(cond[:, :1], UNUSED), cond[:, 1:-1]], 1)
    name = next(n for n, p in model.net.named_parameters() if p is table.weight)
    row = torch.arange(len(weight)).view(-1, 1) == UNUSED
    replaced = {name: torch.where(row, words, weight)}

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model.net

        def forward(self):
            return model.eps(x_t, t, asked)

    return torch.func.functional_call(Called(), {f"net.{name}": replaced[name]}, ())


def mean_square(a, b):
    return (a - b).square().mean()


def moved(**settings):
    """A method whose encoder differs from the base's."""
    method, task = build("advunlearn", **settings)
    with torch.no_grad():
        for k, p in enumerate(method.params):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k), dtype=D))
    return method, task


def test_words_in_front_of_a_prompt_are_words_of_the_encoder():
    method, task = moved()
    rows = batch_for(method, task)["forget"]
    cond, words = method.goal.forgotten(len(rows.seeds), CPU), torch.randn(1, 8, dtype=D)
    x_t, t = method.partial_samples(rows.seeds, cond)
    given = behind(method.model, words, x_t, t, cond)
    torch.testing.assert_close(given, by_a_word(method.model, words, x_t, t, cond))
    assert not torch.allclose(given, behind(method.model, None, x_t, t, cond))
    assert not word_tables(method.model.net)[0]._forward_hooks


@pytest.mark.parametrize(
    ("follows", "summed"), [("gradient", "fresh"), ("gradient", "accumulated"), ("sign", "accumulated")]
)
def test_an_attack_is_adam_on_the_distance_to_the_bases_answer(follows, summed):
    settings = {"attack": follows, "attack_gradient": summed, "attack_steps": 3, "attack_lr": 0.05}
    method, task = moved(**settings)
    rows = batch_for(method, task)["forget"]
    words, m, v, kept = method.random_words(rows), 0.0, 0.0, 0.0
    found, last = method.attack(rows)
    for k in (1, 2, 3):
        cond = method.goal.forgotten(len(rows.seeds), CPU)
        x_t, t = method.partial_samples(rows.reseeded(k).seeds, cond)
        y = method.base.eps(x_t, t, cond)
        words = words.detach().requires_grad_()
        loss = mean_square(by_a_word(method.model, words, x_t, t, cond), y)
        (g,) = torch.autograd.grad(loss, words)
        g = g + kept if summed == "accumulated" else g
        kept = g = g.sign() if follows == "sign" else g
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        words = words.detach() - 0.05 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    torch.testing.assert_close(found, words, rtol=1e-7, atol=1e-9)
    assert float(last) == pytest.approx(float(loss.detach()))


def test_an_attack_recovers_some_of_what_was_erased():
    method, task = moved(attack_steps=15, attack_lr=0.2)
    rows = batch_for(method, task)["forget"]
    found, _ = method.attack(rows)
    cond = method.goal.forgotten(len(rows.seeds), CPU)
    x_t, t = method.partial_samples(rows.reseeded(1000).seeds, cond)
    with torch.no_grad():
        y = method.base.eps(x_t, t, cond)
        before, after = (
            float(mean_square(behind(method.model, w, x_t, t, cond), y)) for w in (method.random_words(rows), found)
        )
    assert after < 0.9 * before


@pytest.mark.parametrize("attacked", [False, True])
def test_losses_and_their_gradient_are_those_of_the_definition(attacked):
    method, task = moved(plain_steps=0 if attacked else 1, gamma=0.7, eta=1.5)
    batch = batch_for(method, task)
    flat, scalars = method.direction(batch)
    model, base, words = method.model, method.base, method.words
    assert (words is not None) == attacked
    forget, retain = batch["forget"], batch["retain"]
    cond = method.goal.forgotten(len(forget.seeds), CPU)
    x_t, t = method.partial_samples(forget.seeds, cond)
    null = torch.tensor([NULL]).expand(len(t), -1)
    e_c, e_0 = base.eps(x_t, t, cond), base.eps(x_t, t, null)
    answer = by_a_word(model, words, x_t, t, cond) if attacked else model.eps(x_t, t, cond)
    erasing = mean_square(answer, e_0 - 1.5 * (e_c - e_0))
    kept = pick(model, retain, method.kept, 2)
    assert 1 + 2 not in kept[:, 1]  # the word of the forgotten class
    x_t, t = method.partial_samples(retain.seeds, kept)
    retaining = mean_square(model.eps(x_t, t, kept), base.eps(x_t, t, kept))
    assert float(scalars["erasing_loss"]) == pytest.approx(float(erasing.detach()))
    assert float(scalars["retain_loss"]) == pytest.approx(float(retaining.detach()))
    assert ("attack_loss" in scalars) == attacked
    expected = torch.autograd.grad(erasing + 0.7 * retaining, method.params)
    torch.testing.assert_close(flat, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-8, atol=1e-12)


def test_nothing_changes_if_the_concept_is_the_empty_prompt():
    task = concept_task()
    task.__dict__["goal"] = replace(task.goal, concept=tuple(NULL))
    method, _ = build("advunlearn", task, plain_steps=3)
    flat, scalars = method.direction(batch_for(method, task))
    assert float(scalars["erasing_loss"]) == float(scalars["retain_loss"]) == 0
    assert not flat.any()


@pytest.mark.parametrize(
    ("layers", "ends"), [(None, ("encoder.layers.0", "final_layer_norm")), (1, ("encoder.layers.0",))]
)
def test_only_layers_of_the_encoder_change(layers, ends):
    method, task = build("advunlearn", encoder_layers=layers, gamma=0.0)
    assert set(method.draws()) == {"forget"}
    before = {n: p.detach().clone() for n, p in method.model.net.named_parameters()}
    for k in range(2):
        method.step(batch_for(method, task, k))
    changed = {n for n, p in method.model.net.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith("text_encoder") and any(end in n for end in ends) for n in changed)
    assert all(any(end in n for n in changed) for end in ends)


def test_the_base_model_shares_what_does_not_change():
    method, task = build("advunlearn")
    before = [p.detach().clone() for p in method.base.net.parameters()]
    for k in range(2):
        method.step(batch_for(method, task, k))
    trained = {id(p) for p in method.params}
    for p, q, start in zip(method.model.net.parameters(), method.base.net.parameters(), before, strict=True):
        assert (p is q) == (id(p) not in trained)
        assert torch.equal(q, start)


def test_an_attack_starts_anew_or_where_the_last_one_ended():
    for start in ("random", "latest"):
        method, task = build("advunlearn", attack_from=start, plain_steps=0, attack_steps=1, attack_lr=1e-9)
        method.step(batch_for(method, task))
        first, rows = method.words, batch_for(method, task, 1)
        method.step(rows)
        begun = first if start == "latest" else method.random_words(rows["forget"])
        torch.testing.assert_close(method.words, begun, rtol=0, atol=1e-8)
        table = word_tables(method.model.net)[0].weight
        assert float((table.detach() - method.words).abs().amax(1).min()) < 1e-8  # both times a word of the encoder


def test_settings_and_models_that_cannot_work_are_named():
    hp, model, goal = AdvUnlearnSettings, TinyText.tiny(), concept_task().goal
    assert AdvUnlearn.unsuited(hp(), model, goal) == []
    (reason,) = AdvUnlearn.unsuited(hp(tokens=2), model, goal)
    assert reason == "tokens: the prompt leaves no room for 2 more"
    (reason,) = AdvUnlearn.unsuited(hp(sampler_steps=2000), model, goal)
    assert reason == "sampler_steps: 2000 is more than the 1000 steps of the schedule"
    alone = replace(goal, classes=(2,))
    (reason,) = AdvUnlearn.unsuited(hp(), model, alone)
    assert reason == "gamma: the task has no prompts of other concepts; set it to 0"
    assert AdvUnlearn.unsuited(hp(gamma=0.0), model, alone) == []
    model.net["text_encoder"].requires_grad_(False)
    (reason,) = AdvUnlearn.unsuited(hp(), model, goal)
    assert reason == "no layer of this model's text encoder may change (train.modules)"
    task = tiny_task("class")
    (reason,) = AdvUnlearn.unsuited(hp(), tiny_model(task), task.goal)
    assert reason == "it attacks the prompts of one text encoder, and this model has 0"
    (reason,) = unserved(AdvUnlearn, "pixel-ddpm")
    assert reason == "it needs a model that offers a trainable text encoder, and pixel-ddpm models do not"
