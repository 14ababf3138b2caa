"""The closed forms of UCE and RECE against their objectives, and what their settings do, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_table import D, build, run, weights
from tiny import LATENT, PROMPTS, TinyText, concept_task, latent_task, tiny_model, tiny_task

from methods.base import Goal
from methods.rece import RECE, derived
from methods.uce import UCE, UCESettings, aligned, edit
from raysweep.models.latent import LatentText
from raysweep.registry import unserved

WIDTH = 6


def embeddings(count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=D)


def objective(w, old, erased, guides, kept, preserve, lam) -> torch.Tensor:
    """UCE's, as its module states it, for one projection."""
    sent = (erased @ w.T - guides @ old.T).square().sum()
    stay = (kept @ w.T - kept @ old.T).square().sum()
    return sent + preserve * stay + lam * (w - old).square().sum()


problems = st.tuples(
    st.integers(1, 8), st.integers(0, 8), st.floats(0, 10), st.floats(1e-3, 10), st.integers(0, 2**31 - 1)
)


@given(problems)
@settings(max_examples=60, deadline=None)
def test_the_edit_minimises_the_objective_of_every_projection(problem):
    m, k, preserve, lam, seed = problem
    erased, guides, kept = embeddings(m, seed), embeddings(m, seed + 1), embeddings(k, seed + 2)
    change = edit(erased, guides, kept, preserve, lam)
    for rows in (4, 9):
        old = embeddings(rows, seed + rows)
        terms = (old, erased, guides, kept, preserve, lam)
        w = (old @ change).requires_grad_()
        best = objective(w, *terms)
        (gradient,) = torch.autograd.grad(best, w)
        scale = (erased.T @ erased).norm() + preserve * (kept.T @ kept).norm() + lam
        assert float(gradient.norm()) < 1e-9 * float(scale) * float(old.norm() + w.detach().norm())
        for step in (1e-3, 1.0):
            assert objective(w + step * embeddings(rows, seed + 7), *terms) > best


@given(problems)
@settings(max_examples=30, deadline=None)
def test_the_edit_is_the_released_sum_of_outer_products(problem):
    m, k, preserve, lam, seed = problem
    erased, guides, kept = embeddings(m, seed), embeddings(m, seed + 1), embeddings(k, seed + 2)
    old = embeddings(5, seed + 3)
    left = lam * old + (guides @ old.T).T @ erased + preserve * (kept @ old.T).T @ kept
    right = lam * torch.eye(WIDTH, dtype=D) + erased.T @ erased + preserve * kept.T @ kept
    torch.testing.assert_close(old @ edit(erased, guides, kept, preserve, lam), left @ torch.inverse(right))


def test_what_is_its_own_guide_changes_nothing():
    erased, kept = embeddings(4, 0), embeddings(3, 1)
    assert torch.equal(edit(erased, erased, kept, 1.0, 0.5), torch.eye(WIDTH, dtype=D))
    model, task = TinyText.tiny(dtype=D), concept_task()
    null = tuple(model.unconditional(1)[0].tolist())
    task.__dict__["goal"] = Goal("concept", 2, 4, (2, 4), null, ((2, null), (4, (0, 5, 8, 11))))
    before = weights(build("uce", task, model=model)[0])
    assert torch.equal(run(*build("uce", task, model=model)), before)
    assert torch.equal(run(*build("rece", task, model=model, epochs=0)), before)


def test_the_order_and_the_scale_of_the_problem_do_not_matter():
    erased, guides, kept = embeddings(4, 0), embeddings(4, 1), embeddings(5, 2)
    change = edit(erased, guides, kept, 0.3, 0.5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(edit(erased[order], guides[order], kept.flip(0), 0.3, 0.5), change)
    twice = (torch.cat([part, part]) for part in (erased, guides, kept))
    torch.testing.assert_close(edit(*twice, 0.3, 1.0), change)
    rotation = torch.linalg.qr(embeddings(WIDTH, 3))[0]
    rotated = edit(erased @ rotation.T, guides @ rotation.T, kept @ rotation.T, 0.3, 0.5)
    torch.testing.assert_close(rotated, rotation @ change @ rotation.T)


def test_larger_weights_keep_more_and_a_small_lam_erases_more():
    erased, guides, kept = embeddings(2, 0), embeddings(2, 1), embeddings(3, 2)

    def distances(preserve, lam):
        change = edit(erased, guides, kept, preserve, lam)
        return float((kept @ change.T - kept).norm()), float((erased @ change.T - guides).norm())

    drifts = [distances(preserve, 0.5)[0] for preserve in (0.0, 0.1, 1.0, 10.0, 1e4)]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < 1e-3 * drifts[0]
    residuals = [distances(0.0, lam)[1] for lam in (100.0, 1.0, 0.01, 1e-8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-6


def test_rows_are_paired_from_the_last_tokens():
    concept = torch.arange(10.0).view(2, 5, 1)
    guides = torch.arange(100.0, 110.0).view(2, 5, 1)
    last, of_guides = torch.tensor([2, 0]), torch.tensor([1, 3])

    def paired(rows):
        return [part.flatten().tolist() for part in aligned(concept, last, guides, of_guides, rows)]

    assert paired("last") == [[2, 5], [101, 108]]
    assert paired("from_last") == [[2, 3, 4, 5, 6], [101, 102, 103, 108, 109]]
    assert paired("all") == [list(range(10)), list(range(100, 110))]


@given(st.floats(1e-4, 10), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_derived_embeddings_minimise_their_objective(reg, seed):
    old = [embeddings(rows, seed + rows) for rows in (3, 5, 7)]
    concept = embeddings(2, seed)
    change = torch.eye(WIDTH, dtype=D) + 0.5 * embeddings(WIDTH, seed + 1)
    found = derived(concept, change, sum(w.T @ w for w in old), reg).requires_grad_()

    def distance(c):
        return sum((c @ (w @ change).T - concept @ w.T).square().sum() for w in old) + reg * c.square().sum()

    best = distance(found)
    (gradient,) = torch.autograd.grad(best, found)
    scale = sum((w @ change).norm() ** 2 for w in old) + reg
    assert gradient.norm() < 1e-8 * scale * (1 + found.detach().norm())
    assert distance(found + 0.1 * embeddings(2, seed + 2)) > best


def test_without_an_edit_the_derived_embedding_is_the_concept():
    w, concept = embeddings(9, 0), embeddings(3, 1)
    torch.testing.assert_close(derived(concept, torch.eye(WIDTH, dtype=D), w.T @ w, 1e-12), concept)


@pytest.mark.parametrize("reg", [1e-3, 0.1])
def test_every_epoch_leaves_an_attacker_less(reg):
    method, _ = build("rece", epochs=4, reg=reg)
    restored = [float(method.step({})["restored"]) for _ in range(method.steps)]
    assert restored == sorted(restored, reverse=True)
    assert restored[-1] < restored[0] - 0.1


def test_an_epoch_sends_the_derived_embeddings_towards_the_guide():
    method, _ = build("rece", epochs=3)
    method.step({})
    for _ in range(3):
        before = method.change
        concept, guides = method.paired("all")
        found = derived(concept, before, method.gram, method.hp.reg)
        method.step({})
        targets = guides @ before.T
        was, now = (method.size(found @ t.T - targets) for t in (before, method.change))
        assert float(now) < 0.5 * float(was)


def test_an_epoch_is_the_released_one_for_every_projection():
    method, _ = build("rece", epochs=2, preserved="both", reg=0.02, lam_epochs=0.3, preserve_epochs=0.2)
    method.step({})
    now = [p.detach().clone() for p in method.params]
    (concept, guides), kept = method.paired("all"), method.stay("all")
    identity = torch.eye(concept.shape[1], dtype=D)
    for _ in range(2):
        left = 0.02 * identity + sum(w.T @ w for w in now)
        right = sum(w.T @ old for w, old in zip(now, method.start, strict=True))
        found = concept @ (torch.inverse(left) @ right).T
        system = torch.inverse(0.3 * identity + found.T @ found + 0.2 * kept.T @ kept)
        now = [(0.3 * w + w @ guides.T @ found + 0.2 * w @ kept.T @ kept) @ system for w in now]
        method.step({})
        for w, projection in zip(now, method.params, strict=True):
            torch.testing.assert_close(projection.detach(), w)


def test_no_epochs_are_uce():
    same = {"erased": "prompts", "guide": "override", "rows": "last", "preserve": 0.3, "lam": 0.2}
    assert torch.equal(run(*build("rece", epochs=0, **same)), run(*build("uce", **same)))


@pytest.mark.parametrize(("rows", "limit"), [("from_last", 0.5), ("all", 0.01)])
def test_the_network_answers_for_the_concept_as_for_its_guide(rows, limit):
    """The whole way: prompts, embeddings, edit, network. The text encoder stays."""
    model = TinyText.tiny(dtype=D)
    x, t = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D), torch.tensor([500])
    concept, guide = (torch.tensor([PROMPTS[c]]) for c in (2, 4))
    with torch.no_grad():
        before = [model.predict(x, t, prompt) for prompt in (concept, guide)]
    encoder = {n: p.clone() for n, p in model.net["text_encoder"].named_parameters()}
    run(*build("uce", model=model, guide="override", rows=rows, lam=1e-8, preserve=1e-3))
    assert all(torch.equal(p, encoder[n]) for n, p in model.net["text_encoder"].named_parameters())
    with torch.no_grad():
        after = model.predict(x, t, concept)
    left = float((after - before[1]).norm() / (before[0] - before[1]).norm())
    assert left < limit


def test_values_alone_leave_the_keys():
    method, task = build("uce", projections="values")
    before = {n: p.clone() for n, p in method.model.net.named_parameters()}
    run(method, task)
    changed = {n for n, p in method.model.net.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.endswith(".attn2.to_v.weight") for n in changed)


def test_diagnostics_are_what_the_projections_do():
    method, _ = build("uce", guide="override", rows="all", preserved="prompts", lam=0.1, preserve=0.1)
    (erased, guides), kept = method.paired("all"), method.stay("all")
    scalars = method.step({})

    def total(points):
        return sum((points @ w.T).square().sum() for w in method.start)

    moved = sum((erased @ p.T - guides @ w.T).square().sum() for p, w in zip(method.params, method.start, strict=True))
    drift = sum((kept @ (p - w).T).square().sum() for p, w in zip(method.params, method.start, strict=True))
    torch.testing.assert_close(scalars["residual"], (moved / total(erased - guides)).detach())
    torch.testing.assert_close(scalars["drift"], (drift / total(kept)).detach())


def test_models_and_settings_that_cannot_work_are_named():
    for method in (UCE, RECE):
        for family in ("pixel-ddpm", "edm"):
            assert unserved(method, family) == [
                f"it needs a model that offers cross-attention to prompts, and {family} models do not"
            ]
        assert unserved(method, "text-ddpm") == []
    model, goal = LatentText.build(LATENT, 0), latent_task().goal
    assert UCE.unsuited(UCESettings(guide="override", erased="prompts"), model, goal) == []
    no_override = Goal("concept", 2, None, goal.classes, goal.concept, goal.prompts)
    assert UCE.unsuited(UCESettings(guide="override"), model, no_override) == [
        "guide: the task names no concept that is to stand in for the forgotten one"
    ]
    more = Goal("concept", 2, 0, goal.classes, goal.concept, (*goal.prompts, goal.prompts[2]))
    (reason,) = UCE.unsuited(UCESettings(guide="override", erased="prompts"), model, more)
    assert "equally many search prompts" in reason
    assert UCE.unsuited(UCESettings(guide="override"), model, more) == []
    model.train_only(("text_encoder",))
    assert UCE.unsuited(UCESettings(), model, goal) == [
        "none of the cross-attention's keys and values may change (train.modules)"
    ]
    pixel = tiny_model(tiny_task("class"))
    assert UCE.unsuited(UCESettings(), pixel, tiny_task("class").goal) != []
