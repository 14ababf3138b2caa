"""EDM: preconditioning and noise levels against the paper and diffusers, the sampler against an exact solution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from tiny import edm_model, tiny_task
from torch import nn

from evaluators.judge import Judge
from methods.losses import squared_errors
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models import families
from raysweep.models.edm import EDM, LEVELS, TRAINING
from raysweep.models.samplers import Run
from raysweep.models.samplers.heun import grid

D = torch.float64


class Ideal(nn.Module):
    """F for which D is the mean of data that is normal with standard deviation `spread` around 0."""

    def __init__(self, spread: float):
        super().__init__()
        self.spread, self.weight = spread, nn.Parameter(torch.ones(1, dtype=D))
        self.config = type("Config", (), {"sample_size": 2, "in_channels": 1, "num_class_embeds": None})()

    def forward(self, x, t, class_labels=None):
        s, d = (4 * t).exp().view(-1, 1, 1, 1), LEVELS["sigma_data"]
        skip, out, scale = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt(), 1 / (s**2 + d**2).sqrt()
        best = self.spread**2 / (self.spread**2 + s**2)
        return type("Out", (), {"sample": (best - skip) / out * (x / scale)})()


def batch(count: int = 6):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn((count, 1, 4, 4), generator=g, dtype=D) for _ in range(2))
    return x0, eps, torch.linspace(0, 999, count).long(), torch.arange(count) % 6


def test_scales_are_those_of_the_library():
    model, scheduler = edm_model(), EDMEulerScheduler(**LEVELS)
    x, out = torch.randn(3, 1, 4, 4, dtype=D), torch.randn(3, 1, 4, 4, dtype=D)
    for s in (0.01, 0.7, 30.0):
        level = torch.tensor(s, dtype=D)
        skip, scale, scale_in = model.scales(level)
        torch.testing.assert_close(scale_in * x, scheduler.precondition_inputs(x, level))
        torch.testing.assert_close(skip * x + scale * out, scheduler.precondition_outputs(x, out, level))


def test_a_uniform_step_has_the_papers_distribution_of_levels():
    logs = edm_model().levels().log()
    assert float(logs.mean()) == pytest.approx(TRAINING["p_mean"], abs=1e-6)
    assert float(logs.std()) == pytest.approx(TRAINING["p_std"], rel=0.01)
    assert bool((logs.diff() > 0).all())


def test_the_loss_is_the_papers():
    """Mean squared error in the network's own terms = lambda(s) |D(x0 + s eps; s) - x0|^2."""
    model = edm_model()
    model.net.to(D)
    x0, eps, t, cond = batch()
    x_t, s = model.add_noise(x0, eps, t), model.level(t)
    loss = (model.predict(x_t, t, cond) - model.target(x0, eps, t)) ** 2
    lam = (s**2 + 0.25) / (s * 0.5) ** 2
    clean = model.denoised(x0 + s * eps, s, cond)
    torch.testing.assert_close(loss, lam * (clean - x0) ** 2, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.x0_error_weight(t), lam)
    torch.testing.assert_close(model.x0(x_t, t, cond), clean)
    torch.testing.assert_close(model.eps(x_t, t, cond), (x0 + s * eps - clean) / s)
    at = model.eps_at((x0 + s * eps)[3:4], float(s[3]), cond[3:4])
    torch.testing.assert_close(at, model.eps(x_t[3:4], t[3:4], cond[3:4]))


def test_the_sampler_is_of_second_order_and_exact_in_the_limit():
    """For normal data the flow is linear: x(0) = x(s_max) spread / sqrt(spread^2 + s_max^2)."""
    model = EDM(Ideal(0.3))
    noise = torch.randn(4, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(1))
    exact = noise * 80 * 0.3 / (0.3**2 + 80**2) ** 0.5
    errors = [float((model.sampler.draw(model, noise, None, Run(n)) - exact).abs().max()) for n in (20, 40, 80)]
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_levels_of_the_sampler_are_the_papers():
    levels = grid(LEVELS, 18)
    assert (len(levels), float(levels[0]), float(levels[-2]), float(levels[-1])) == (
        19,
        pytest.approx(80),
        pytest.approx(0.002),
        0,
    )
    expected = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(levels[5]) == pytest.approx(expected)


def test_diffusers_reads_the_saved_parts(tmp_path):
    model, seeds, cond = edm_model(), torch.tensor([3, 4]), torch.tensor([1, 2])
    model.save(tmp_path / "m")
    again = families.load(tmp_path / "m")
    assert again.digest == model.digest
    assert torch.equal(again.sample(cond, seeds, 4, 1.5), model.sample(cond, seeds, 4, 1.5))
    net = UNet2DModel.from_pretrained(tmp_path / "m" / "unet")
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in model.net.parameters())
    assert EDMEulerScheduler.from_pretrained(tmp_path / "m" / "scheduler").config.sigma_max == 80
    assert model.fresh(1).digest == model.fresh(1).digest != model.fresh(2).digest


def test_a_picture_depends_on_its_seed_and_class_alone():
    model, seeds, cond = edm_model(), torch.arange(5), torch.arange(5)
    for eta in (0.0, 1.0):
        together = model.sample(cond, seeds, 4, 1.5, eta=eta)
        assert torch.equal(model.sample(cond[2:3], seeds[2:3], 4, 1.5, eta=eta), together[2:3])
    assert not torch.equal(together, model.sample(cond, seeds, 4, 1.5))
    rebuilt = model.reconstruct(together, seeds, 500, 6, cond)
    assert torch.equal(model.reconstruct(together[:1], seeds[:1], 500, 6, cond[:1]), rebuilt[:1])
    near = model.reconstruct(together, seeds, 2, 6, cond)
    assert float((near - together).abs().mean()) < float((rebuilt - together).abs().mean())


def test_training_and_every_check():
    task = replace(tiny_task("class"), family="edm")
    model = edm_model()
    method = Retrain(model, RetrainSettings(steps=60, batch_size=32, split="train"), {}, task.goal)
    losses = []
    for k in range(60):
        rows = task.batch(method.draws(), 0, k)
        losses.append(float(method.step(rows)["loss"]))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    rows = task.batch(method.draws(), 0, 0)["train"]
    assert (
        squared_errors(model, rows, torch.zeros(len(rows.x), dtype=torch.long), model.noise(rows.seeds)).shape
        == rows.x.shape
    )
    torch.manual_seed(0)
    tier = Tier(
        seed=1,
        judge="audit",
        groups=5,
        samples=20,
        class_samples=10,
        noises=5,
        loss_noises=5,
        loss_images=4,
        timesteps=3,
        membership_images=12,
        membership_t=(50, 150),
        membership_stride=10,
        membership_noises=2,
        relearn_steps=(1,),
        injection_steps=3,
        recall_noises=5,
        likelihood_steps=3,
        likelihood_probes=1,
        strips=2,
        checks=(
            "classifier",
            "denoising",
            "fidelity",
            "loss",
            "pia",
            "likelihood",
            "recall",
            "relearning",
            "latent_noise",
        ),
    )
    result = measure(subject_of(model, task, Judge(1, 6), tier), tier)
    assert {r.check for r in result.rows if r.status == "ok"} == set(tier.checks)


def test_without_a_null_class_nothing_leaks():
    task = replace(tiny_task("class"), family="edm", sampling={"steps": 3, "guidance": 1.0})
    model = EDM.build({"unet": edm_model().net.config | {"num_class_embeds": 6}}, 0)
    tier = Tier(seed=1, judge="audit", groups=5, samples=20, class_samples=10, checks=("classifier", "denoising"))
    values = measure(subject_of(model, task, Judge(1, 6), tier), tier).values
    assert "classifier.recognised" in values
    assert "classifier.leak" not in values
    assert "denoising.forget_log_loss" in values
    assert "denoising.unlabelled_log_loss" not in values
