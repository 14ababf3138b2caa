"""SPEED's closed form against its objective and constraint, and the refinement of what must stay, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_table import D, build, run
from tiny import LATENT, latent_task

from methods.speed import SPEED, SPEEDSettings, above_mean, constrained_edit, fixed_points, null_space, refined
from methods.uce import NULL, edit
from raysweep.models.latent import LatentText

WIDTH = 8


def embeddings(count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=D)


problems = st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.floats(0.01, 10), st.integers(0, 2**31 - 1)
)


@given(problems)
@settings(max_examples=60, deadline=None)
def test_the_edit_minimises_its_objective_within_the_constraint(problem):
    m, k, held, lam, seed = problem
    erased, guides, fixed = embeddings(m, seed), embeddings(m, seed + 1), embeddings(held, seed + 2)
    projector = null_space(embeddings(k, seed + 3), 0.5)
    w = embeddings(5, seed + 4)
    change = w @ (constrained_edit(erased, guides, 2, projector, fixed, lam) - torch.eye(WIDTH, dtype=D))
    torch.testing.assert_close(change @ projector, change)
    torch.testing.assert_close(change @ fixed.T, torch.zeros(5, held, dtype=D), atol=1e-8, rtol=0)

    def objective(x):
        return (erased @ (w + x).T - guides @ w.T).square().sum() / 2 + lam * x.square().sum()

    x = change.clone().requires_grad_()
    best = objective(x)
    (gradient,) = torch.autograd.grad(best, x)
    inside = torch.linalg.svd(torch.cat([torch.eye(WIDTH, dtype=D) - projector, fixed])).Vh
    rank = int(torch.linalg.matrix_rank(torch.cat([torch.eye(WIDTH, dtype=D) - projector, fixed]), rtol=1e-9))
    allowed = inside[rank:].T @ inside[rank:]  # onto what P leaves and K spares
    assert float((gradient @ allowed).norm()) < 1e-7 * (1 + float(gradient.norm()))
    if rank < WIDTH:
        assert objective(change + 0.1 * embeddings(5, seed + 5) @ allowed) > best.detach()


@given(problems)
@settings(max_examples=30, deadline=None)
def test_the_edit_is_the_released_formula(problem):
    m, k, _, lam, seed = problem
    erased, guides, fixed = embeddings(m, seed), embeddings(m, seed + 1), embeddings(2, seed + 2)
    projector, identity = null_space(embeddings(k, seed + 3), 0.5), torch.eye(WIDTH, dtype=D)
    targets, anchors, k2, slack = erased.T @ erased / m, guides.T @ erased / m, fixed.T, 0.3
    inner = (targets @ projector + lam * identity).inverse()
    held = (k2.T @ projector @ inner @ k2 + slack * torch.eye(2, dtype=D)).inverse()
    spared = identity - inner @ k2 @ held @ k2.T @ projector
    expected = (anchors - targets) @ projector @ spared @ inner
    found = constrained_edit(erased, guides, m, projector, fixed, lam, slack) - identity
    torch.testing.assert_close(found, expected)


def test_without_constraints_it_is_uce():
    erased, guides = embeddings(3, 0), embeddings(3, 1)
    free = constrained_edit(erased, guides, 1, torch.eye(WIDTH, dtype=D), erased[:0], 0.7)
    torch.testing.assert_close(free, edit(erased, guides, erased[:0], 0.0, 0.7))


def test_what_must_stay_and_the_fixed_points_keep_their_outputs():
    kept, fixed = embeddings(3, 0), embeddings(2, 1)
    projector = null_space(kept, 1e-6)
    assert round(float(projector.trace())) == WIDTH - 3
    change = constrained_edit(embeddings(2, 2), embeddings(2, 3), 1, projector, fixed, 0.1)
    for points in (kept, fixed):
        torch.testing.assert_close(points @ change.T, points)
    assert not torch.allclose(change, torch.eye(WIDTH, dtype=D))
    everything = constrained_edit(embeddings(2, 2), embeddings(2, 3), 1, null_space(kept, 1e-6) * 0, fixed, 0.1)
    assert torch.equal(everything, torch.eye(WIDTH, dtype=D))


def test_a_lower_threshold_keeps_more():
    kept = embeddings(30, 0) * torch.logspace(-2, 1, WIDTH, dtype=D)
    drifts = []
    for threshold in (1e-5, 1e-2, 1.0, 1e4):
        change = constrained_edit(embeddings(2, 2), embeddings(2, 3), 1, null_space(kept, threshold), kept[:0], 0.1)
        drifts.append(float((kept @ change.T - kept).norm()))
    assert drifts == sorted(drifts)
    assert drifts[0] < 1e-6 < drifts[-1]


def test_the_fixed_points_are_the_beginning_and_the_centres_of_three_groups():
    groups = torch.tensor([[10.0, 0], [0, 10], [-10, -10]], dtype=D)
    offsets = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=D)
    points = (groups[:, None] + offsets).flatten(0, 1)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    null = torch.cat([torch.tensor([[5.0, 5.0]], dtype=D), points])
    found = fixed_points(null)
    torch.testing.assert_close(found[:1], null[:1])
    torch.testing.assert_close(found[1:].sort(0).values, groups.sort(0).values)
    assert torch.equal(fixed_points(null[:4]), null[:4])


def test_what_must_stay_is_filtered_and_augmented():
    kept, w = embeddings(6, 0), embeddings(12, 1)
    problem = embeddings(2, 2), embeddings(2, 3), 1
    assert torch.equal(refined(kept, w, problem, torch.empty(6, 0, dtype=D), False), kept)
    first = w @ (constrained_edit(*problem, torch.eye(WIDTH, dtype=D), kept[:0], 1.0) - torch.eye(WIDTH, dtype=D))
    chosen = kept[above_mean(kept, first)]
    assert 0 < len(chosen) < 6
    assert torch.equal(refined(kept, w, problem, torch.empty(6, 0, dtype=D), True), chosen)
    more = refined(kept, w, problem, embeddings(6, 4)[:, :3], True)
    assert torch.equal(more[: len(chosen)], chosen)
    shifts = more[len(chosen) :, None] - chosen  # each copy lies beside one of them, where W acts least
    weakest = torch.linalg.svd(w).Vh[WIDTH - 1]
    across = (shifts - (shifts @ weakest)[..., None] * weakest).norm(dim=-1).amin(1)
    assert 0 < len(across) < 3 * len(chosen)
    assert float(across.max()) < 1e-12
    assert above_mean(torch.ones(4, WIDTH, dtype=D), w).all()


@pytest.mark.parametrize("settings", [{}, {"rows": "all", "preserved": "unconditional", "slack": 0.5}])
def test_a_candidate_keeps_the_beginning_of_every_prompt(settings):
    method, task = build("speed", threshold=0.5, **settings)
    run(method, task)
    beginning = method.embeddings[NULL, :1]
    changes = [p.detach() - w for p, w in zip(method.params, method.start, strict=True)]
    assert max(float(change.norm()) for change in changes) > 1e-3
    assert (max(float((beginning @ change.T).norm()) for change in changes) < 1e-9) == (not settings)


def test_diagnostics_and_the_noise_of_copies():
    scalars = {}
    for threshold in (1e-4, 0.5, 1e6):
        method, _ = build("speed", threshold=threshold, filter=False)
        scalars[threshold] = method.step({})
    free = [float(s["free"]) for s in scalars.values()]
    assert free == sorted(free)
    assert free[-1] == pytest.approx(1)
    task, model = latent_task(), LatentText.build(LATENT, 0)
    noise = [SPEED.prepare(model, task, seed, SPEEDSettings(augment=2))["noise"] for seed in (1, 1, 2)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
