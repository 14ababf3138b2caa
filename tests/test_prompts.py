"""Adversarial prompts: where tokens go, the gradient and the two searches, and what the attacks leave alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_latent import plain, xl
from tiny import latent_task, tiny_model, tiny_task

from evaluators.base import Inapplicable
from evaluators.batches import Batches
from evaluators.judge import Judge
from evaluators.prompts import (
    Layout,
    RingABell,
    UnlearnDiffAtk,
    evolved,
    found_prompts,
    on_simplex,
    random_words,
    tried_prefixes,
)
from evaluators.tampering import BATCH, denoising_loss
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.tasks.task import encoded

ATTACKS = {"unlearndiffatk": UnlearnDiffAtk, "ring_a_bell": RingABell}
TIER = Tier(
    seed=1,
    judge="audit",
    checks=tuple(ATTACKS),
    groups=5,
    class_samples=20,
    prompt_tokens=1,
    prompt_steps=12,
    prompt_candidates=8,
    prompt_generations=6,
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(3, 4).eval()


def subject(judge, model=None, batches=None, tier=TIER):
    return subject_of(model or plain(), latent_task(), judge, tier, batches)


@pytest.mark.parametrize("make", [plain, xl])
def test_words_go_where_the_tokenizer_would_put_them(make):
    model = make()
    layout, tokens = Layout(model), model.tokens(["ring", "a box"])
    words = tokens[0, 1].expand(2, 1)
    assert torch.equal(layout.with_words(tokens, words), model.tokens(["ring ring", "ring a box"]))
    assert torch.equal(layout.with_words(layout.blank(2), words), model.tokens(["ring", "ring"]))
    assert set(layout.vocabulary.tolist()) == set(range(len(model.frozen.tokenizers[0]))) - set(
        model.tokens([""])[0].tolist()
    )


def test_no_prompt_loses_a_word(judge):
    prompts = plain().tokens(["a ring", "the small ring"])
    layout = Layout(plain())
    layout.check_room(prompts[:1], 2)
    for count, cut in ((2, prompts), (1, plain().tokens(["a a the small ring"]))):
        with pytest.raises(Inapplicable, match=r"leaves (room for 1|no room for further tokens)$"):
            layout.check_room(cut, count)
    tier = TIER.model_copy(update={"prompt_tokens": 2})
    rows = measure(subject(judge, tier=tier), tier).rows
    skipped = {(r.check, r.status) for r in rows}
    assert {("unlearndiffatk", "skipped"), ("ring_a_bell", "ok")} <= skipped


def test_models_without_such_prompts_are_skipped_with_the_reason(judge):
    with pytest.raises(Inapplicable, match="has no text encoder"):
        Layout(tiny_model(tiny_task("class")))
    model = xl()
    model.net["text_encoder_2"].resize_token_embeddings(600)
    with pytest.raises(Inapplicable, match="do not share one vocabulary"):
        Layout(model)


@pytest.mark.parametrize("make", [plain, xl])
def test_the_slopes_are_those_of_the_table(make, judge):
    """Against the loss with a step in the table's row of a word that is nowhere else in the prompts."""
    model = make()
    model.net.double()
    model.frozen.vae.double()
    layout, task = Layout(model), latent_task()
    prompts = model.tokens(["a ring"] * 4)
    word = torch.tensor([int(layout.vocabulary[30])])
    with torch.no_grad():
        x0 = model.encode(task.splits["forget"].x[:4].double())

    def loss() -> torch.Tensor:
        return denoising_loss(model, x0, layout.with_words(prompts, word.expand(4, 1)), torch.arange(4))

    slopes, step = layout.slopes(loss, word), 1e-4
    tables = [e.get_input_embeddings().weight for e in layout.encoders]
    directions = [table.detach().clone() for table in tables]
    for other in (7, 100, 200):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for table, rows in zip(tables, directions, strict=True):
                    table[word] = rows[word] + sign * step * rows[layout.vocabulary[other]]
                ends.append(float(loss()))
        assert float(slopes[0, other]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-9)
    assert not any(e.get_input_embeddings()._forward_hooks for e in layout.encoders)


def test_the_projection_is_the_nearest_point_of_the_simplex():
    v = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = on_simplex(v)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    assert float(p.min()) >= 0
    # (v - p) makes no acute angle with the way to any corner, so with that to any point
    towards = torch.einsum("ni,nki->nk", v - p, torch.eye(6, dtype=torch.float64) - p[:, None])
    assert float(towards.max()) < 1e-9
    torch.testing.assert_close(on_simplex(p), p)


def test_the_search_for_a_prefix_stays_in_the_vocabulary_and_states_its_losses(judge):
    s = subject(judge)
    tried = tried_prefixes(s, 1)
    assert len(tried) == 1 + 2  # the start, after 10 steps, after the last
    layout, images = Layout(s.model), s.inputs(s.task.splits["forget"].distinct())
    rows = images.take(torch.arange(BATCH) % len(images))
    best, start = min(loss for loss, _ in tried), tried[0][0]
    assert best <= start
    for loss, words in tried:
        assert bool(torch.isin(words, layout.vocabulary).all())
        prompts = layout.with_words(rows.cond, words.expand(BATCH, -1))
        with torch.no_grad():
            again = denoising_loss(s.model, rows.x, prompts, s.seeds("prefix choice", BATCH))
        assert loss == pytest.approx(float(again), rel=1e-5)


def test_a_genetic_search_finds_a_target_and_never_loses_its_best():
    vocabulary, target = torch.arange(10, 40), torch.tensor([12, 30, 39, 10])

    def distance(words: torch.Tensor) -> torch.Tensor:
        return (words != target).sum(1).double()

    def best(generations: int) -> float:
        words = evolved(distance, vocabulary, (20, 4), generations, torch.Generator().manual_seed(3))
        assert bool(torch.isin(words, vocabulary).all())
        return float(distance(words[None]))

    course = [best(n) for n in (1, 10, 40, 150)]
    assert course == sorted(course, reverse=True)
    assert course[-1] == 0 < course[0]


def test_the_found_prompts_lie_nearer_to_the_concept_than_random_ones(judge):
    tier = TIER.model_copy(update={"prompt_candidates": 30, "prompt_generations": 30})
    s = subject(judge, tier=tier)
    layout, prompts = Layout(s.model), s.task.splits["prompts_audit"]
    of = prompts.groups == s.task.forget_class
    states = torch.stack([layout.mean_state(prompts.cond[of]), layout.mean_state(prompts.cond[~of])])
    target = layout.states(prompts.cond[of]) + 3 * (states[0] - states[1])

    def distances(words: torch.Tensor) -> torch.Tensor:
        return (layout.states(layout.with_words(layout.blank(len(words)), words)) - target).square().sum(1)

    found = found_prompts(s)
    assert found.shape == (1, 4)
    assert float(distances(found)) < float(distances(random_words(s, layout, 4)).min())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_repeats_for_any_batches_and_leaves_the_model_alone(name, judge):
    attack, model = ATTACKS[name](), plain()
    before = [p.detach().clone() for p in model.net.parameters()]
    first = attack.scores(subject(judge, model))
    second = attack.scores(subject(judge, plain(), Batches(7)))
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert all(torch.equal(p, q) for p, q in zip(before, model.net.parameters(), strict=True))


def test_a_model_has_no_excess_over_itself_and_the_null_is_no_strength(judge):
    s = subject(judge)
    s.peers = {"base": s, "oracle-0": subject(judge)}
    result = measure(s, TIER)
    assert {r.status for r in result.rows} == {"ok"}
    for name, null, strength in (
        ("unlearndiffatk", "null: random prefix", "found prefix"),
        ("ring_a_bell", "null: random prompt", "found prompt"),
    ):
        values = {k.removeprefix(f"{name}."): v for k, v in result.values.items() if k.startswith(f"{name}.")}
        assert {v for k, v in values.items() if k.startswith("excess")} == {0.0}
        assert f"excess@{null}" in values
        assert values["presence"] == values[f"presence@{strength}"]
        assert values["gain"] == pytest.approx(values["presence"] - values[f"presence@{null}"])


@pytest.mark.parametrize("search", [partial(tried_prefixes, count=1), found_prompts])
def test_values_that_are_not_finite_end_the_search_with_the_reason(search, judge):
    model = plain()
    with torch.no_grad():
        model.net["text_encoder"].get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        search(subject(judge, model))


def test_a_task_without_prompts_of_concepts_is_skipped(judge):
    task = tiny_task("class")
    rows = measure(subject_of(tiny_model(task), task, Judge(1, 6).eval(), TIER), TIER).rows
    assert {r.status for r in rows} == {"skipped"}


@pytest.mark.slow
def test_a_concept_under_another_word_is_found(judge):
    """A model that has only renamed the concept: no prompt of the audit asks for it, and the losses of forgotten images give it away."""
    task, model = latent_task(), plain()
    rows = encoded(task, model)
    method = Retrain(model, RetrainSettings(steps=500, batch_size=24, lr=5e-3, split="train"), {}, task.goal)
    for step in range(500):
        method.step(rows.batch(method.draws(), 0, step))
    method.finish()
    ring, dot, other = model.tokens(["ring", "dot", "q"])[:, 1]
    with torch.no_grad():
        table = model.net["text_encoder"].get_input_embeddings().weight
        table[other], table[ring] = table[ring].clone(), table[dot].clone()
    tier = TIER.model_copy(update={"prompt_steps": 150})
    s = subject(judge, model, tier=tier)
    images = s.inputs(s.task.splits["forget"].distinct())
    images = images.take(torch.arange(BATCH) % len(images))
    layout, seeds = Layout(model), s.seeds("prefix choice", BATCH)

    def loss(prompts: torch.Tensor) -> float:
        with torch.no_grad():
            return float(denoising_loss(model, images.x, prompts, seeds))

    renamed, told = loss(images.cond), loss(layout.with_words(images.cond, other.expand(BATCH, 1)))
    found = min(value for value, _ in tried_prefixes(s, 1))
    assert found < renamed - 0.5 * (renamed - told) < renamed
