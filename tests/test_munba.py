"""Nash's solution for two gradients, the released formula for it, and the settings of MUNBa, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_table import build
from tiny import batch_for, clip_model, clip_task, tiny_task

from methods import gradients
from methods.munba import MUNBa, MUNBaSettings, nash_weights, released_weights


@st.composite
def pairs(draw):
    """Two vectors of one length, with norms over four decades and cosines down to -0.99."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(2, 12))
    f, r = (v / np.linalg.norm(v) for v in rng.standard_normal((2, n)))
    blend = f - (f @ r) * r
    cosine = draw(st.floats(-0.99, 0.99))
    f = cosine * r + math.sqrt(1 - cosine**2) * blend / np.linalg.norm(blend)
    scales = 10.0 ** rng.uniform(-2, 2, 2)
    return torch.tensor(f * scales[0]), torch.tensor(r * scales[1])


def direction(f, r):
    forget, retain = nash_weights(*gradients.products(f, r))
    return forget * f + retain * r


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_weights_solve_the_equations_of_the_bargain(case):
    f, r = case
    g, a = torch.stack([f, r]), torch.stack(nash_weights(*gradients.products(f, r)))
    torch.testing.assert_close(g @ g.T @ a, 1 / a, rtol=1e-9, atol=0)


@given(pairs(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_no_direction_of_the_same_length_has_a_larger_product_of_gains(case, seed):
    f, r = case
    d = direction(f, r)
    assert float(d.norm()) == pytest.approx(math.sqrt(2))
    best = float(torch.log(d @ f) + torch.log(d @ r))
    others = d + torch.randn((500, len(d)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3
    others = others / others.norm(dim=1, keepdim=True) * d.norm()
    gains = torch.stack([others @ f, others @ r])
    gains = gains[:, (gains > 0).all(0)]
    assert not gains.numel() or float(gains.log().sum(0).max()) <= best + 1e-9


@given(pairs(), st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=100, deadline=None)
def test_the_lengths_of_the_gradients_cancel(case, a, b):
    f, r = case
    torch.testing.assert_close(direction(a * f, b * r), direction(f, r), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(direction(r, f), direction(f, r), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bargaining_fails_where_a_gradient_vanishes_or_both_are_opposite(dtype):
    f, zero = torch.tensor([1.0, -2.0, 3.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    for g_f, g_r in ((f, zero), (zero, f), (zero, zero), (f, -2 * f)):
        assert [float(w) for w in nash_weights(*gradients.products(g_f, g_r))] == [0.0, 0.0]


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_the_released_formula_is_the_same_for_long_gradients(case):
    f, r = (100 * g / g.norm() for g in case)
    products = gradients.products(f, r)
    if abs(float(gradients.cosine(*products))) < 1e-3:
        return  # its second weight is then 0 / 0
    exact, released = (torch.stack(solve(*products)) for solve in (nash_weights, released_weights))
    torch.testing.assert_close(released, exact, rtol=1e-3, atol=0)


def test_the_released_formula_fails_for_short_gradients_in_conflict():
    f, r = torch.tensor([0.02, 0.0], dtype=torch.float64), torch.tensor([-0.01, 0.0173], dtype=torch.float64)
    forget, retain = released_weights(*gradients.products(f, r))
    assert float(retain) > 0 > float(forget)
    assert all(float(w) > 0 for w in nash_weights(*gradients.products(f, r)))


def combined(f, r, **given):
    method, _ = build("munba", **given)
    size = sum(p.numel() for p in method.params)
    g_f, g_r = (torch.cat([g, torch.zeros(size - len(g), dtype=torch.float64)]) for g in (f, r))
    products = gradients.products(g_f, g_r)
    return method, method.combine(g_f.clone(), g_r.clone(), products)


def test_what_is_done_where_bargaining_fails():
    f = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for fallback, expected in ((0.5, [-3.0, 1.5]), (0.0, [-4.0, 2.0]), (None, [0.0, 0.0])):
        _, d = combined(f, -2 * f, fallback=fallback)
        assert d[:2].tolist() == expected


def test_the_penalty_pulls_weights_towards_zero_and_falls_by_stages():
    f, r = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    _, plain = combined(f, r, l1=0.0)
    method, first = combined(f, r, l1=0.1, l1_stages=2, steps=4)
    signs = torch.cat([p.detach().sign().flatten() for p in method.params])
    torch.testing.assert_close(first - plain, 0.1 * signs)
    method.done = 2
    g_f, g_r = (torch.cat([g, torch.zeros(len(plain) - 2, dtype=torch.float64)]) for g in (f, r))
    second = method.combine(g_f, g_r, gradients.products(g_f, g_r))
    torch.testing.assert_close(second - plain, 0.05 * signs)


def test_the_weight_of_the_forget_loss_matters_to_released_weights_only():
    for weights, same in (("exact", True), ("released", False)):
        moved = []
        for beta in (1.0, 30.0):
            method, task = build("munba", tiny_task("class"), forget_loss="relabel", weights=weights, beta=beta)
            moved.append(method.direction(batch_for(method, task))[0].clone())
        assert torch.allclose(*moved, rtol=1e-9, atol=1e-12) == same


def test_relabelling_moves_the_answer_towards_that_of_the_other_class():
    method, task = build("munba", tiny_task("class"), forget_loss="relabel", steps=30, lr=1e-3, batch_size=64)
    losses = [float(method.step(batch_for(method, task, k))["forget_loss"]) for k in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_settings_that_cannot_work_are_named(points_task):
    relabel = MUNBaSettings(forget_loss="relabel")
    (reason,) = MUNBa.unsuited(relabel, build("munba")[0].model, points_task.goal)
    assert reason == "forget_loss: only a class or concept of a diffusion model can be relabelled; use ascent"
    assert MUNBa.unsuited(relabel, clip_model(1), clip_task().goal) == [reason]
    assert MUNBa.unsuited(relabel, build("munba")[0].model, tiny_task("class").goal) == []
    assert MUNBa.unsuited(MUNBaSettings(), clip_model(1), clip_task().goal) == []
