"""The restricted gradient and the truncation of elements, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.graddiff import truncate_elements
from methods.rgd import restricted_direction


@st.composite
def pairs(draw):
    """Two vectors of one length with norms over four decades, and lam in [0, 10]."""
    n = draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    f, r = rng.standard_normal((2, n)) * 10.0 ** rng.uniform(-2, 2, (2, 1))
    return torch.tensor(f), torch.tensor(r), draw(st.floats(0, 10))


def conflicting(f, r):
    return float(torch.dot(f, r)) < 0


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_neither_loss_rises_to_first_order(case):
    f, r, lam = case
    delta = restricted_direction(f, r, lam)
    scale = float(delta.norm() * max(f.norm(), r.norm()))
    assert float(torch.dot(delta, r)) >= -1e-9 * scale
    assert float(torch.dot(delta, f)) >= -1e-9 * scale


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_direction_is_the_sum_of_the_normal_parts_under_conflict_and_plain_otherwise(case):
    f, r, lam = case
    delta = restricted_direction(f, r, lam)
    if not conflicting(f, r):
        assert torch.equal(delta, f + lam * r)
        return
    s = torch.dot(f, r)
    sin2 = 1 - s**2 / (f.dot(f) * r.dot(r))
    delta_f, delta_r = f - s / r.dot(r) * r, r - s / f.dot(f) * f
    scale = float(f.norm() * r.norm())
    assert abs(float(delta_f.dot(r))) <= 1e-9 * scale
    assert abs(float(delta_r.dot(f))) <= 1e-9 * scale
    torch.testing.assert_close(
        delta, delta_f + lam * delta_r, rtol=1e-9, atol=1e-9 * float(delta_f.norm() + delta_r.norm())
    )
    torch.testing.assert_close(delta.dot(r), lam * r.dot(r) * sin2, rtol=1e-6, atol=1e-8 * float(r.dot(r) * (1 + lam)))
    torch.testing.assert_close(delta.dot(f), f.dot(f) * sin2, rtol=1e-6, atol=1e-8 * float(f.dot(f) * (1 + lam)))


@given(pairs(), st.floats(0.1, 10), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_direction_scales_and_rotates_with_its_gradients_and_is_symmetric(case, a, b):
    f, r, lam = case
    if abs(float(torch.nn.functional.cosine_similarity(f, r, dim=0))) < 1e-6:
        return  # the sign of the product may flip by rounding
    parts_f = restricted_direction(f, r, 0.0)
    parts_r = restricted_direction(f, r, 1.0) - parts_f
    scaled = restricted_direction(a * f, b * r, lam)
    scale = float(scaled.norm() + (a * f).norm() + (b * r).norm() * (1 + lam))
    torch.testing.assert_close(scaled, a * parts_f + b * lam * parts_r, rtol=1e-7, atol=1e-9 * scale)
    q, _ = torch.linalg.qr(torch.randn(len(f), len(f), dtype=torch.float64))
    rotated = restricted_direction(q @ f, q @ r, lam)
    torch.testing.assert_close(rotated, q @ restricted_direction(f, r, lam), rtol=1e-7, atol=1e-9 * scale)
    torch.testing.assert_close(
        restricted_direction(r, f, 1.0), restricted_direction(f, r, 1.0), rtol=1e-9, atol=1e-9 * scale
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_inputs_stay_finite(dtype):
    f, zero = torch.tensor([1.0, -2.0, 3.0], dtype=dtype), torch.zeros(3, dtype=dtype)
    assert torch.equal(restricted_direction(f, zero, 2.0), f)
    assert torch.equal(restricted_direction(zero, f, 2.0), 2 * f)
    assert torch.equal(restricted_direction(zero, zero, 2.0), zero)
    torch.testing.assert_close(restricted_direction(f, -2 * f, 3.0), zero, atol=1e-5, rtol=0)


def test_continuous_where_the_conflict_begins():
    f = torch.tensor([1.0, 0.0], dtype=torch.float64)
    values = [restricted_direction(f, torch.tensor([e, 1.0], dtype=torch.float64), 2.0) for e in (-1e-9, 0.0, 1e-9)]
    torch.testing.assert_close(values[0], values[1], atol=1e-7, rtol=0)
    torch.testing.assert_close(values[2], values[1], atol=1e-7, rtol=0)


def test_both_losses_fall_where_graddiff_raises_one():
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([-0.9, 0.3], dtype=torch.float64)
    losses = (lambda x: 0.5 * (x - 3 * a).square().sum() * 4, lambda x: 0.5 * (x - 3 * b).square().sum())
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    g_f, g_r = (torch.autograd.grad(loss(x), x)[0] for loss in losses)
    for direction, both in ((restricted_direction(g_f, g_r, 1.0), True), (g_f + g_r, False)):
        after = x.detach() - 1e-4 * direction
        falls = [bool(loss(after) <= loss(x)) for loss in losses]
        assert all(falls) == both


def test_truncated_elements_have_a_bounded_loss_and_no_gradient():
    error = torch.tensor([[[[0.1, 0.5], [1.0, -2.0]]]], dtype=torch.float64, requires_grad=True)
    weight = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    cut, mask = truncate_elements(weight * error.square(), weight, 0.3)
    assert mask.tolist() == [[[[False, False], [True, True]]]]
    assert bool((cut <= weight * 0.3 + 1e-12).all())
    (gradient,) = torch.autograd.grad(cut.sum(), error)
    torch.testing.assert_close(gradient, torch.where(mask, 0.0, 6 * error.detach()))
    plain, none = truncate_elements(weight * error.square(), weight, None)
    assert torch.equal(plain, weight * error.square())
    assert not none.any()
    (zero,) = torch.autograd.grad(truncate_elements(weight * error.square(), weight, 0.0)[0].sum(), error)
    assert not zero.any()
