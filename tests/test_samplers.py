"""Samplers: their registry, what folders save and refuse, and the arithmetic of safety guidance."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import TinyText, edm_model, tiny_model, tiny_task

from evaluators import batches
from raysweep.models import diffusion, families
from raysweep.models.samplers import DDIM, FILE, SAMPLERS, Heun, OneStep, Safe, parse, plain_data
from raysweep.models.samplers.ddim import scheduler_of
from raysweep.models.samplers.safe import SafetyGuidance, safety_scale

D = torch.float64
SAFE = {"concept": 2, "scale": 5.0, "threshold": 0.01, "momentum": 0.3, "beta": 0.4, "warmup": 0.2, "mu": "at_most_one"}
COND, SEEDS = torch.tensor([2, 0]), torch.tensor([5, 6])


def pixel_model():
    return tiny_model(tiny_task("class"))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_registered_sampler_states_its_kind_and_its_settings(kind):
    cls = SAMPLERS[kind]
    assert cls.kind == kind
    assert all(field.description and field.is_required() for field in cls.model_fields.values())


@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        (pixel_model, DDIM()),
        (pixel_model, OneStep(t=700)),
        (pixel_model, Safe(**SAFE)),
        (edm_model, Heun()),
        (edm_model, OneStep(t=700)),
    ],
)
def test_a_folder_keeps_the_sampler(make, sampler, tmp_path):
    model = make()
    model.sampler = sampler
    model.save(tmp_path / "m")
    again = families.load(tmp_path / "m")
    assert again.sampler == sampler
    assert (tmp_path / "m" / FILE).is_file() == (sampler != model.default_sampler)
    assert again.digest == model.digest
    assert torch.equal(again.sample(COND, SEEDS, 3, 1.5), model.sample(COND, SEEDS, 3, 1.5))


def test_files_of_earlier_runs_are_read(tmp_path):
    pixel_model().save(tmp_path)
    (tmp_path / FILE).write_text('{"kind": "one_step", "t": 700}')
    assert families.load(tmp_path).sampler == OneStep(t=700)
    (tmp_path / FILE).write_text(json.dumps({"kind": "safe"} | SAFE))
    assert families.load(tmp_path).sampler == Safe(**SAFE)
    (tmp_path / FILE).unlink()
    assert families.load(tmp_path).sampler == DDIM()


def test_tokens_of_a_concept_survive_a_file():
    model = TinyText.tiny()
    model.use_sampler("safe", **SAFE | {"concept": (0, 3, 8, 11)})
    assert parse(json.loads(json.dumps(plain_data(model))), model) == model.sampler


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "kind None is not a sampler; valid: ddim, euler, heun, one_step, safe"),
        ({"kind": "plms"}, "kind 'plms' is not a sampler; valid: ddim, euler, heun, one_step, safe"),
        ({"kind": ["safe"]}, r"kind \['safe'\] is not a sampler"),
        ({"kind": "one_step"}, "t: field required"),
        ({"kind": "one_step", "t": "7"}, "t: input should be a valid integer"),
        ({"kind": "one_step", "t": True}, "t: input should be a valid integer"),
        ({"kind": "one_step", "t": 7, "steps": 3}, "steps: extra inputs are not permitted"),
        ({"kind": "one_step", "t": 1000}, "t: 1000 is not a step of the model, 0 to 999"),
        ({"kind": "safe", **SAFE, "beta": 1.0}, "beta: input should be less than 1"),
        ({"kind": "safe", **SAFE, "scale": float("nan")}, "scale: "),
        ({"kind": "safe", **SAFE, "mu": "most"}, "mu: input should be 'at_most_one' or 'at_least_one'"),
        ({"kind": "safe", **SAFE, "concept": [0, 3]}, r"concept: must be a class label, not \(0, 3\)"),
        ({"kind": "safe", "concept": 2}, "scale: field required"),
        ({"kind": "heun"}, "sampler heun needs an EDM model; this is a model of family pixel-ddpm"),
        ({"kind": "euler"}, "sampler euler needs a flow model; this is a model of family pixel-ddpm"),
    ],
)
def test_a_sampler_that_is_not_valid_is_refused_by_file_and_key(tmp_path, data, message):
    pixel_model().save(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        families.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE}: ")


@pytest.mark.parametrize("kind", ["ddim", "safe"])
def test_ddim_and_its_guidance_need_a_noise_schedule(kind):
    with pytest.raises(ValueError, match=f"sampler {kind} needs a model that DDIM samples; .* family edm"):
        edm_model().use_sampler(kind, **SAFE if kind == "safe" else {})


def test_safety_guidance_needs_an_unconditional_branch():
    with pytest.raises(ValueError, match="safe needs a model with an unconditional branch"):
        tiny_model(tiny_task()).use_sampler("safe", **SAFE)


def test_images_of_methods_and_of_audits_go_through_a_network_alike():
    assert diffusion.ROWS == batches.ROWS


def test_safety_scale_under_both_bounds():
    d = torch.tensor([-1.0, -1e-4, 0.0, 0.005, 0.02, 1.0], dtype=D)
    assert safety_scale(d, 1000.0, 0.01, "at_most_one").tolist() == [1.0, pytest.approx(0.1), 0.0, 1.0, 0.0, 0.0]
    assert safety_scale(d, 1000.0, 0.01, "at_least_one").tolist() == [1000.0, 1.0, 1.0, 5.0, 0.0, 0.0]


def test_safety_guidance_follows_its_recursion():
    g = torch.Generator().manual_seed(0)
    settings = Safe(**SAFE | {"scale": 2.0, "threshold": 0.5, "warmup": 0.5})
    safe, nu = SafetyGuidance(settings, 4), torch.zeros(3, dtype=D)
    for i in range(4):
        p, u, s = torch.randn((3, 3), generator=g, dtype=D)
        mu = torch.where(p - s < 0.5, (2.0 * (p - s).abs()).clamp(max=1), 0)
        step = mu * (s - u) + 0.3 * nu
        nu = 0.4 * nu + 0.6 * step
        expected = u + 7.5 * (p - u - (step if i >= 2 else 0))
        torch.testing.assert_close(safe(p, u, s, 7.5), expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_any_number_of_steps_is_a_run_within_the_schedule(spacing):
    model = tiny_model(tiny_task())
    model.scheduler = DDIMScheduler.from_config({**model.scheduler.config, "timestep_spacing": spacing})
    for steps in range(1, 101):
        times = scheduler_of(model, steps).timesteps.tolist()
        assert len(times) == steps
        assert times == sorted(set(times), reverse=True)
        assert 0 <= times[-1] <= times[0] < 1000


def test_an_image_is_rebuilt_from_any_timestep():
    model, seeds = tiny_model(tiny_task()), torch.arange(1)
    x0 = torch.zeros(1, *model.image_shape)
    for t in (1, 7, 89, 90, 517, 999):
        for steps in (1, min(t, 15)):
            assert torch.isfinite(model.reconstruct(x0, seeds, t, steps, batch=1)).all()
