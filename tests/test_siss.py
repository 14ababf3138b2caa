"""SISS: importance weights, unbiasedness, the combination of gradients, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batch_for, tiny_model

from methods.siss import SISS, SISSSettings, importance_weights, log_ratio
from methods.siss_no_is import SISSNoIS

D = torch.float64


def case(seed: int, n: int = 8, dtype=D):
    g = torch.Generator().manual_seed(seed)
    x, a, eps = (torch.randn((n, 1, 4, 4), generator=g, dtype=D) for _ in range(3))
    alphas = torch.rand(n, generator=g, dtype=D) * 0.98 + 0.01
    return (v.to(dtype) for v in (x, a, eps, alphas.sqrt(), (1 - alphas).sqrt()))


@given(st.integers(0, 10_000), st.floats(1e-3, 1 - 1e-3))
@settings(max_examples=100, deadline=None)
def test_weights_sum_to_one_and_are_bounded(seed, lam):
    delta = 30 * torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=D)
    w_x, w_a = importance_weights(delta, lam)
    torch.testing.assert_close((1 - lam) * w_x + lam * w_a, torch.ones_like(delta), rtol=0, atol=1e-12)
    assert bool((w_x >= 0).all() & (w_x <= 1 / (1 - lam) + 1e-9).all())
    assert bool((w_a >= 0).all() & (w_a <= 1 / lam + 1e-9).all())
    small = delta.abs() < 20
    torch.testing.assert_close((w_a / w_x)[small], delta.exp()[small], rtol=1e-6, atol=0)


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_log_ratio_agrees_with_densities_and_their_law(seed):
    x, a, eps, gamma, sigma = case(seed)
    g, s = gamma.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    r = (gamma / sigma) ** 2 * (x - a).square().flatten(1).sum(1)
    inner = (gamma / sigma) * (eps * (a - x)).flatten(1).sum(1)
    for mean, sign in ((x, -1), (a, 1)):
        m = g * mean + s * eps
        direct = ((m - g * x).square() - (m - g * a).square()).flatten(1).sum(1) / (2 * sigma**2)
        ratio = log_ratio(x, a, m, gamma, sigma)
        torch.testing.assert_close(ratio, direct, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ratio, sign * r / 2 + inner, rtol=1e-8, atol=1e-8)


def test_equal_images_weigh_one_and_swapping_the_images_swaps_the_weights():
    x, a, eps, gamma, sigma = case(1)
    w_x, w_a = importance_weights(log_ratio(x, x, gamma.view(-1, 1, 1, 1) * x + eps, gamma, sigma), 0.3)
    torch.testing.assert_close(w_x, torch.ones_like(w_x))
    torch.testing.assert_close(w_a, torch.ones_like(w_a))
    m = gamma.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1) * eps
    one = importance_weights(log_ratio(x, a, m, gamma, sigma), 0.3)
    other = importance_weights(log_ratio(a, x, m, gamma, sigma), 0.7)
    torch.testing.assert_close(one[0], other[1])
    torch.testing.assert_close(one[1], other[0])


@pytest.mark.parametrize("lam", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_weights_are_finite_for_any_input(lam, dtype):
    w_x, w_a = importance_weights(torch.tensor([-1e6, -50.0, 0.0, 50.0, 1e6], dtype=dtype), lam)
    assert bool(torch.isfinite(w_x).all() & torch.isfinite(w_a).all())
    if lam in (0.0, 1.0):
        assert bool(((w_x if lam == 0 else w_a) == 1).all())


def test_lam_outside_is_refused():
    with pytest.raises(ValueError, match="lam"):
        importance_weights(torch.zeros(2), 1.5)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_unbiased_for_the_two_plain_losses(lam):
    """With a linear prediction theta m the expected gradients are known: those of the two unweighted losses."""
    g = torch.Generator().manual_seed(0)
    x, a = torch.tensor([0.8, -0.4], dtype=D), torch.tensor([-0.3, 0.9], dtype=D)
    n, gamma, sigma, theta = 400_000, 0.6, 0.8, 0.7
    eps = torch.randn((n, 2), generator=g, dtype=D)
    rows = torch.rand(n, generator=g, dtype=D) < lam
    m = gamma * torch.where(rows[:, None], a, x) + sigma * eps
    scale = torch.full((n,), 1.0, dtype=D)
    ratio = log_ratio(x.expand(n, 2), a.expand(n, 2), m, gamma * scale, sigma * scale)
    for mean, weight in zip((x, a), importance_weights(ratio, lam), strict=True):
        assert abs(float(weight.mean()) - 1) < 0.02
        weighted = (weight[:, None] * 2 * (theta * m - (m - gamma * mean) / sigma) * m).sum(1)
        plain = gamma * mean + sigma * torch.randn((n, 2), generator=g, dtype=D)
        direct = (2 * (theta * plain - (plain - gamma * mean) / sigma) * plain).sum(1)
        se = math.sqrt(float(weighted.var() + direct.var()) / n)
        assert abs(float(weighted.mean() - direct.mean())) < 5 * se


def build(task, cls=SISS, **settings_):
    model = tiny_model(task, dtype=D)
    return cls(model, cls.Hyperparameters(**{"lr": 1e-3, "steps": 3, "batch_size": 12, **settings_}))


def test_scale_of_the_forget_gradient_under_each_scaling(points_task):
    method = build(points_task, rho=None, tau=5.0)
    g_x, g_a = torch.tensor([3.0, 4.0], dtype=D), torch.tensor([0.0, 0.2], dtype=D)

    def combine(method, x, a):
        direction, scalars = method.combine(x.clone(), a.clone())
        return direction, {name: float(v) for name, v in scalars.items()}

    g, scalars = combine(method, g_x, g_a)
    assert scalars["c"] * float(g_a.norm()) == pytest.approx(5.0)
    torch.testing.assert_close(g + scalars["c"] * g_a, g_x)
    torch.testing.assert_close(combine(method, g_x, 7 * g_a)[0], g)
    assert combine(method, g_x, 0 * g_a)[1]["c"] == 0.0
    assert torch.equal(combine(method, g_x, 0 * g_a)[0], g_x)
    assert combine(build(points_task, rho=0.1), g_x, g_a)[1]["c"] == pytest.approx(0.1 * 5 / 0.2)
    assert combine(build(points_task, scaling="clip", rho=None, tau=5.0), g_x, g_a)[1]["c"] == 1.0
    assert combine(build(points_task, scaling="fixed", superfactor=0.3), g_x, g_a)[1]["c"] == pytest.approx(0.3)


def test_settings_name_what_is_missing():
    with pytest.raises(ValueError, match="superfactor"):
        SISSSettings(scaling="fixed")
    with pytest.raises(ValueError, match="exactly one of rho and tau"):
        SISSSettings(rho=0.1, tau=5.0)
    with pytest.raises(ValueError, match="t_high"):
        SISSSettings(t_sampler="window", t_low=500, t_high=400)
    for unused in (
        {"superfactor": 1.0},
        {"t_low": 5},
        {"t_sampler": "fixed", "t_high": 7},
        {"scaling": "fixed", "superfactor": 1.0, "rho": 0.2},
    ):
        with pytest.raises(ValueError, match="has no effect"):
            SISSSettings(**unused)


@pytest.mark.parametrize(("sampler", "low", "high"), [("uniform", 0, 1000), ("window", 250, 750), ("fixed", 999, 1000)])
def test_timesteps_lie_in_the_range_of_the_sampler(points_task, sampler, low, high):
    bounds = {"uniform": {}, "window": {"t_low": low, "t_high": high}, "fixed": {"t_low": low}}[sampler]
    t = build(points_task, t_sampler=sampler, **bounds).draw_t(torch.linspace(0, 1 - 1e-9, 4001, dtype=D))
    assert (int(t.min()), int(t.max())) == (low, high - 1)


def test_one_forward_pass_where_the_released_code_has_one(points_task, class_task):
    for task, cls, passes in ((points_task, SISS, 1), (points_task, SISSNoIS, 2), (class_task, SISS, 2)):
        method = build(task, cls)
        calls = []
        handle = method.model.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method.direction(batch_for(method, task))
        handle.remove()
        assert len(calls) == passes


def test_at_lam_zero_the_retain_term_is_that_of_naive_deletion(points_task):
    siss, plain = build(points_task, lam=0.0), build(points_task, SISSNoIS)
    batch = batch_for(siss, points_task)
    _, one = siss.direction(batch)
    _, two = plain.direction(batch)
    assert float(one["loss_x"]) == pytest.approx(float(two["loss_x"]), rel=1e-9)
    assert float(one["weight_x"]) == pytest.approx(1.0)
