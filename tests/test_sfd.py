"""Score forgetting distillation, in one stage and in two, in float64 on tiny real networks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batch_for, tiny_model

from methods.base import Goal
from methods.sfd import SFD, SFDSettings, generator_loss, nearest_timestep
from methods.sfd_two_stage import SFDTwoStage, SFDTwoStageSettings
from raysweep.models.pixel import PixelDDPM
from raysweep.models.samplers import OneStep
from raysweep.storage.files import digest_state

D = torch.float64
QUICK = {"batch_size": 6, "lr": 1e-3, "lr_fake": 1e-3, "steps": 3, "ema": 0.9}


def triple(seed: int, n: int = 4):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn((n, 1, 4, 4), generator=g, dtype=D) for _ in range(3))


def build(task, cls=SFD, goal=None, **more):
    model = tiny_model(task, dtype=D)
    hp = cls.Hyperparameters(**QUICK | more)
    return cls(model, hp, cls.prepare(model, task, 0, hp), goal or task.goal)


def flat(params):
    return torch.cat([p.detach().reshape(-1).clone() for p in params])


@given(st.integers(0, 10_000), st.floats(0.1, 2.0), st.floats(0.1, 10.0))
@settings(max_examples=50, deadline=None)
def test_both_forms_of_the_loss_agree_and_it_scales_with_its_inputs(seed, alpha, k):
    p, s, x = triple(seed)
    w = 1 / (p - x).abs().flatten(1).mean(1).clamp(min=1e-5)
    d = p - s
    other = (w * ((1 - alpha) * d.square() + d * (s - x)).flatten(1).sum(1)).mean()
    torch.testing.assert_close(generator_loss(p, s, x, alpha), other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(generator_loss(p, s, x, 1.0), (w * (d * (s - x)).flatten(1).sum(1)).mean())
    torch.testing.assert_close(generator_loss(k * p, k * s, k * x, alpha), k * generator_loss(p, s, x, alpha))


def test_weight_is_a_constant_with_a_floor():
    p, s, x = triple(0)
    p.requires_grad_(True)
    generator_loss(p, s, x, 1.2).backward()
    w = 1 / (p.detach() - x).abs().flatten(1).mean(1)
    expected = w.view(-1, 1, 1, 1) * ((p - x) - 1.2 * (p - s) + (p - s) - 1.2 * (p - s)).detach() / len(p)
    torch.testing.assert_close(p.grad, expected)
    assert torch.isfinite(generator_loss(x, s, x, 1.2))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_at_the_start_the_loss_vanishes_without_an_override_and_not_with_one(class_task, alpha):
    method = build(class_task, alpha=alpha)
    method.model.net.eval()
    rows = batch_for(method, class_task)["forget"]
    same, other = torch.full((6,), 2), torch.full((6,), 4)
    loss, gap = method.loss(rows, same, same)
    # frozen and trained layers may run through other kernels, so equal networks agree up to rounding
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(gap) == pytest.approx(0, abs=1e-12)
    assert all(
        float(g.abs().max()) < 1e-12
        for g in torch.autograd.grad(loss, method.params, allow_unused=True)
        if g is not None
    )
    loss, _ = method.loss(rows, same, other)
    assert abs(float(loss.detach())) > 1e-6
    assert any(
        float(g.abs().max()) > 1e-6
        for g in torch.autograd.grad(loss, method.params, allow_unused=True)
        if g is not None
    )


def test_without_forgetting_it_is_plain_distillation(class_task):
    plain = build(class_task, forget=0, fake_forget=0)
    alone = build(class_task, forget=0, fake_forget=0, forget_batch_size=1)
    for step in range(3):
        plain.step(batch_for(plain, class_task, step))
        alone.step(batch_for(alone, class_task, step))
    assert torch.equal(flat(plain.params), flat(alone.params))
    assert torch.equal(flat(plain.fake_params), flat(alone.fake_params))


def test_generator_starts_as_the_teachers_one_step_denoiser(class_task):
    method = build(class_task)
    rows, cond = batch_for(method, class_task)["forget"], torch.full((6,), 2)
    method.model.net.eval()
    t = torch.full((6,), method.t_init)
    gamma, sigma = method.model.gamma_sigma(t)
    z = method.model.noise(rows.seeds)
    with torch.no_grad():
        x_g, eps = method.generate(rows, cond), method.teacher.eps(sigma * z, t, cond)
    torch.testing.assert_close(x_g, (sigma / gamma) * (z - eps), rtol=1e-8, atol=1e-8)


def test_input_noise_level_of_the_published_schedules():
    linear = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear").alphas_cumprod.double()
    assert nearest_timestep(linear, 2.5) == 440
    assert abs(float(((1 - linear[440]) / linear[440]).sqrt()) - 2.5) < 0.003
    assert float((1 - linear[440]).sqrt()) == pytest.approx(0.9286, abs=1e-4)
    scaled = DDPMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    assert nearest_timestep(scaled, 2.5) == 625
    assert abs(float(((1 - scaled[625]) / scaled[625]).sqrt()) - 2.5) < 0.002


def test_teacher_is_constant_but_differentiated_through(class_task):
    method = build(class_task)
    before = digest_state(method.teacher.net.state_dict())
    for step in range(2):
        method.step(batch_for(method, class_task, step))
    assert digest_state(method.teacher.net.state_dict()) == before
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.net.parameters())
    rows = batch_for(method, class_task)["forget"]
    grads = []
    for diff_instruct in (False, True):
        method.hp = method.hp.model_copy(update={"diff_instruct": diff_instruct})
        loss, _ = method.loss(rows, torch.full((6,), 2), torch.full((6,), 4))
        grads.append(torch.autograd.grad(loss, method.params, allow_unused=True)[0])
    assert not torch.allclose(*grads)


def test_each_update_moves_its_own_network(class_task):
    method = build(class_task)
    rows, cond = batch_for(method, class_task)["remain"], torch.full((6,), 1)
    theta, psi = flat(method.params), flat(method.fake_params)
    method.update(0, [method.fake_loss(rows, cond)], shared=False)
    assert torch.equal(flat(method.params), theta)
    assert not torch.equal(flat(method.fake_params), psi)
    psi = flat(method.fake_params)
    method.update(1, [method.loss(rows, cond, cond)[0]], shared=False)
    assert torch.equal(flat(method.fake_params), psi)
    assert not torch.equal(flat(method.params), theta)


class Untouchable:
    """Images that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError("an image was asked for")


@pytest.mark.parametrize("cls", [SFD, SFDTwoStage])
def test_no_image_is_read(class_task, cls):
    goal = class_task.goal
    blind = dataclasses.replace(class_task)
    object.__setattr__(blind, "splits", dict.fromkeys(class_task.splits, Untouchable()))
    blind.__dict__["goal"] = goal
    model = tiny_model(class_task, dtype=D)
    more = {"stage1_steps": 2, "stage1_batch_size": 4} if cls is SFDTwoStage else {}
    hp = cls.Hyperparameters(**QUICK | more)
    method = cls(model, hp, cls.prepare(model, blind, 0, hp), goal)
    rows = blind.batch(method.draws(), 0, 0)
    assert all(r.x.numel() == 0 and r.cond is None for r in rows.values())
    method.step(rows)
    with pytest.raises(AssertionError, match="an image"):
        blind.all_rows("forget", 0)


def test_only_the_teacher_sees_the_override(class_task, monkeypatch):
    method = build(class_task)
    seen: dict[str, list] = {"generator": [], "fake": [], "teacher": []}
    for name, net in (("generator", method.model), ("fake", method.fake), ("teacher", method.teacher)):
        real = net.predict
        monkeypatch.setattr(net, "predict", lambda x, t, c, n=name, f=real: (seen[n].append(c.clone()), f(x, t, c))[1])
    method.step(batch_for(method, class_task))
    remain, forgotten, override = seen["teacher"][0], torch.full((6,), 2), torch.full((6,), 4)
    assert 2 not in remain
    for name, expected in (
        ("generator", [remain, forgotten, remain, forgotten]),  # fake score's step, then its own
        ("fake", [remain, forgotten, remain, forgotten]),
        ("teacher", [remain, override]),
    ):
        assert len(seen[name]) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(seen[name], expected, strict=True))


def test_timesteps_cover_their_window_and_the_input_has_its_noise_level(class_task):
    method = build(class_task, t_min=38, t_max=712, batch_size=4000)
    rows = batch_for(method, class_task)["remain"]
    _, t, _ = method.noised(rows, torch.zeros((4000, 1, 4, 4), dtype=D))
    assert (int(t.min()), int(t.max())) == (38, 711)
    _, sigma = method.model.gamma_sigma(torch.full((1,), method.t_init))
    assert float((sigma * method.model.noise(rows.seeds)).std()) == pytest.approx(float(sigma), rel=0.01)


def test_generator_of_a_gaussian_moves_towards_the_data():
    m, theta0, tau, sigma = 1.5, -0.5, 0.7, 1.1
    k = tau**2 / (tau**2 + sigma**2)
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn((2, 400_000), generator=g, dtype=D)
    for alpha in (0.5, 1.0, 1.2):
        theta = torch.tensor(theta0, dtype=D, requires_grad=True)
        x_g = theta + tau * z
        x_t = x_g + sigma * eps
        p, s = k * x_t + (1 - k) * m, k * x_t + (1 - k) * theta0
        loss = ((p - s) * ((p - x_g) - alpha * (p - s))).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        assert float(gradient) == pytest.approx(-((1 - k) ** 2) * (m - theta0), rel=1e-6)


def test_loss_says_nothing_about_progress():
    m, theta0, tau, sigma, n = 1.5, -0.5, 0.7, 1.1, 400_000
    k = tau**2 / (tau**2 + sigma**2)
    z, eps = torch.randn((2, n), generator=torch.Generator().manual_seed(0), dtype=D)
    x_g = theta0 + tau * z
    x_t = x_g + sigma * eps
    p, s = k * x_t + (1 - k) * m, k * x_t + (1 - k) * theta0
    for alpha in (1.0, 1.2):
        loss = ((p - s) * ((p - x_g) - alpha * (p - s))).mean()
        assert float(loss) == pytest.approx((1 - alpha) * float((p - s).square().mean()), abs=0.01)


def test_fake_loss_is_the_weighted_prediction_error(class_task):
    method = build(class_task)
    rows, cond = batch_for(method, class_task)["remain"], torch.full((6,), 1)
    method.model.net.eval(), method.fake.net.eval()
    with torch.no_grad():
        x_g = method.generate(rows, cond)
        x_t, t, _ = method.noised(rows, x_g)
        gamma, sigma = method.model.gamma_sigma(t)
        expected = ((gamma / sigma) ** 2 * (method.fake.x0(x_t, t, cond) - x_g).square()).sum() / rows.total
        torch.testing.assert_close(method.fake_loss(rows, cond), expected, rtol=1e-7, atol=1e-9)


def test_gradients_are_clipped_by_value_after_both_terms(class_task, monkeypatch):
    method, seen = build(class_task, clip_value=1e-3), []
    monkeypatch.setattr(
        method.optimizers[1], "step", lambda: seen.append(torch.cat([p.grad.reshape(-1) for p in method.params]))
    )
    method.step(batch_for(method, class_task))
    assert float(seen[0].abs().max()) == pytest.approx(1e-3)


def test_guidance_costs_a_pass_and_extrapolates_from_the_unconditional_prediction(class_task):
    passes = {}
    for w in (0.0, 2.0):
        method = build(class_task, cond_scale=w)
        calls: list[int] = []
        for net in (method.teacher.net, method.fake.net):
            net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method.step(batch_for(method, class_task))
        passes[w] = len(calls)
    assert passes == {0.0: 2 + 4, 2.0: 2 * (2 + 4)}
    rows, cond = batch_for(method, class_task)["remain"], torch.full((6,), 4)
    x, t = method.model.noise(rows.seeds), torch.full((6,), 300)
    with torch.no_grad():
        guided = method.guided(method.teacher, x, t, cond)
        e_c, e_null = (method.teacher.eps(x, t, c) for c in (cond, torch.full((6,), 6)))
    torch.testing.assert_close(guided, 3 * e_c - 2 * e_null)
    torch.testing.assert_close(guided, e_null + 3 * (e_c - e_null))


def test_candidate_is_the_moving_average_and_samples_in_one_step(class_task, tmp_path):
    method = build(class_task, ema=0.9)
    start = flat(method.params)
    assert torch.equal(flat(method.ema), start)
    method.step(batch_for(method, class_task))
    live = flat(method.params)
    torch.testing.assert_close(flat(method.ema), 0.9 * start + 0.1 * live)
    average = flat(method.ema)
    method.finish()
    assert torch.equal(flat(method.params), average)
    method.model.save(tmp_path / "candidate")
    files = sorted(
        str(p.relative_to(tmp_path / "candidate")) for p in (tmp_path / "candidate").rglob("*") if p.is_file()
    )
    assert [f for f in files if f.endswith(".safetensors")] == ["unet/diffusion_pytorch_model.safetensors"]
    again = PixelDDPM.load(tmp_path / "candidate")
    assert again.sampler == OneStep(t=method.t_init)
    calls = []
    again.net.register_forward_hook(lambda *_: calls.append(1))
    again.sample(torch.full((3,), 2), torch.arange(3), 10, 2.0)
    assert len(calls) == 1


@pytest.mark.parametrize("forget", [0, 2, 5])
def test_random_override_is_any_class_but_the_forgotten_one(class_task, forget):
    goal = Goal("class", forget, None, tuple(range(6)))
    method = build(class_task, goal=goal, override="random", batch_size=3000)
    c_o = method.branches(batch_for(method, class_task))[1].c2
    counts = torch.bincount(c_o, minlength=6)
    assert counts[forget] == 0
    assert float(counts[counts > 0].min()) > 3000 / 5 * 0.85
    two = build(class_task, goal=Goal("class", 0, None, (0, 1)), override="random")
    assert set(two.branches(batch_for(two, class_task))[1].c2.tolist()) == {1}


def test_prompts_are_replaced_within_their_template(class_task):
    """Class c in template k has the tokens (c, k): the substitute keeps the template of the forgotten prompt."""
    prompts = tuple((c, (c, k)) for k in range(3) for c in range(4))
    goal = Goal("concept", 2, 0, (0, 1, 2, 3), (2, 0), prompts)
    method = build(class_task, goal=goal, batch_size=400)
    kept, forgotten = method.branches(batch_for(method, class_task))
    assert forgotten.diagnostic == "forget_gap"
    assert {tuple(c) for c in forgotten.c1.tolist()} == {(2, 0), (2, 1), (2, 2)}
    assert torch.equal(forgotten.c2, torch.stack([torch.zeros_like(forgotten.c1[:, 0]), forgotten.c1[:, 1]], 1))
    assert {c for c, _ in kept.c1.tolist()} == {0, 1, 3}
    assert torch.equal(kept.c1, kept.c2)


def test_override_must_differ(class_task):
    reasons = SFD.unsuited(SFDSettings(), tiny_model(class_task), Goal("class", 2, 2, tuple(range(6))))
    assert any("must differ from the forgotten class 2" in r for r in reasons)
    with pytest.raises(ValueError, match="greater than 0"):
        SFDSettings(alpha=0)


def test_second_stage_keeps_the_first_teacher(class_task):
    more = {"stage1_steps": 3, "stage1_batch_size": 6, "stage1_lr": 1e-3, "stage1_lr_fake": 1e-3, "stage1_ema": 0.5}
    model = tiny_model(class_task, dtype=D)
    base = digest_state(model.net.state_dict())
    method = build(class_task, SFDTwoStage, **more)
    assert digest_state(method.teacher.net.state_dict()) == base
    assert digest_state(method.model.net.state_dict()) != base
    assert digest_state(method.fake.net.state_dict()) != digest_state(method.model.net.state_dict())
    for step in range(2):
        method.step(batch_for(method, class_task, step))
    assert digest_state(method.teacher.net.state_dict()) == base
    assert SFDTwoStageSettings().ema == 0


def test_losses_are_means_over_the_whole_batch(class_task):
    method = build(class_task)
    method.model.net.eval()
    c = torch.full((6,), 1)
    whole = batch_for(method, class_task)["remain"]
    halves = [batch_for(method, class_task, rank=r, world=2)["remain"] for r in range(2)]
    total = torch.autograd.grad(
        method.loss(whole, c, c)[0] + method.fake_loss(whole, c), method.params, allow_unused=True
    )
    parts = [torch.autograd.grad(method.loss(h, c[:3], c[:3])[0], method.params, allow_unused=True) for h in halves]
    for w, a, b in zip(total, *parts, strict=True):
        if w is not None:
            torch.testing.assert_close(w, a + b, rtol=1e-8, atol=1e-10)
