"""Rectified-flow transformers: diffusers' pipeline, the identities that methods rest on, the sampler, and folders that do not fit."""

from __future__ import annotations

import copy
import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from method_table import build as build_method
from tiny import FLOW, batch_for, flow_model, flow_task
from torch.distributions import Normal
from torch.nn import functional as F

from evaluators.judge import Judge
from evaluators.tampering import inverted
from methods.esd import ESD, layer_names, target
from methods.layers import eligible, group, tower
from methods.losses import squared_errors
from methods.retrain import Retrain, RetrainSettings
from methods.rows import Rows
from methods.sfd import SFD
from methods.siss import log_ratio
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models import delta, families
from raysweep.models.contents import not_read
from raysweep.models.flow import CLIP_LENGTH, T5_LENGTH, Flow
from raysweep.models.noise import STEP_STREAMS, normal_rows
from raysweep.models.samplers import Run
from raysweep.models.validation import check_pass
from raysweep.tasks.task import Task, encoded

D = torch.float64
SEEDS, PROMPTS = torch.tensor([5, 6, 7]), ["a ring", "the small box", "a dot"]
T5 = "text_encoder_3"
SHIFTS = {"constant": FLOW["scheduler"], "by size": {"use_dynamic_shifting": True, "base_image_seq_len": 1}}
PARTS = {  # what a pipeline differs in, by the text encoders that it has
    "all": {},
    "without T5": {T5: None},
    "without CLIP-G": {"text_encoder_2": None},
    "without CLIP-L": {"text_encoder": None},
    "T5 alone": {"text_encoder": None, "text_encoder_2": None},
}


@pytest.fixture(scope="module")
def model() -> Flow:
    return made()


def made(**config) -> Flow:
    model = flow_model(**config)
    model.net.eval()
    return model


def rows(count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, eps, t) in float64, t from the first to the last step."""
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn((count, 2, 4, 4), generator=g, dtype=D) for _ in range(2))
    return x0, eps, torch.linspace(0, 999, count).long()


def embeddings(model: Flow, prompts: list[str]) -> dict[str, torch.Tensor]:
    """The pipeline's prompt embeddings, with zeros for each encoder that is missing."""
    hidden, pooled = [], []
    for name, width in (("text_encoder", 12), ("text_encoder_2", 8)):
        if name in model.net:
            out = model.net[name](model.tokens(prompts)[:, model.columns[name]], output_hidden_states=True)
            hidden, pooled = [*hidden, out.hidden_states[-2]], [*pooled, out.text_embeds]
        else:
            length = 6 if len(model.columns) > 1 else CLIP_LENGTH
            hidden, pooled = [*hidden, torch.zeros(3, length, width)], [*pooled, torch.zeros(3, width)]
    clip = torch.cat(hidden, -1)
    states = (
        model.net[T5](model.tokens(prompts)[:, model.columns[T5]])[0]
        if T5 in model.net
        else torch.zeros(3, T5_LENGTH, 32)
    )
    whole = torch.cat([F.pad(clip, (0, 32 - clip.shape[-1])), states], 1)
    return {"prompt_embeds": whole, "pooled_prompt_embeds": torch.cat(pooled, -1)}


@pytest.mark.parametrize(("parts", "shift"), [("all", "by size"), *((parts, "constant") for parts in PARTS)])
def test_diffusers_draws_the_same_pictures(parts, shift, tmp_path):
    """The pipeline reads prompts itself where it has both CLIP models; it takes their embeddings where one is missing."""
    model = made(**PARTS[parts], scheduler=SHIFTS[shift])
    model.save(tmp_path / "m")
    again = families.load(tmp_path / "m")
    assert again.digest == model.digest
    assert list(again.net) == [
        "transformer",
        *(name for name in FLOW if name.startswith("text") and PARTS[parts].get(name, 1)),
    ]
    cond = again.tokens(PROMPTS)
    ours = again.sample(cond, SEEDS, 4, 3.0)
    assert torch.equal(ours, model.sample(cond, SEEDS, 4, 3.0))
    absent = dict.fromkeys(PARTS[parts])
    absent |= {name.replace("text_encoder", "tokenizer"): None for name in absent}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "m", **absent)  # diffusers asks to say what is absent
    pipe.set_progress_bar_config(disable=True)
    if {"text_encoder", "text_encoder_2"} <= set(model.net):
        asked = {"prompt": PROMPTS, "max_sequence_length": 8 if T5 in model.net else T5_LENGTH}
    else:
        with torch.no_grad():
            null = {f"negative_{k}": v for k, v in embeddings(model, [""] * 3).items()}
            asked = embeddings(model, PROMPTS) | null
    drawn = pipe(
        **asked,
        latents=model.noise(SEEDS),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
        height=8,
        width=8,
    ).images
    torch.testing.assert_close(ours, (drawn * 2 - 1).clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_picture_depends_on_its_seed_and_prompt_alone(model):
    cond = model.tokens(PROMPTS)
    for eta in (0.0, 1.0):
        together = model.sample(cond, SEEDS, 3, 2.0, eta=eta)
        for i in range(3):
            assert torch.equal(model.sample(cond[i : i + 1], SEEDS[i : i + 1], 3, 2.0, eta=eta), together[i : i + 1])
    assert not torch.equal(together, model.sample(cond, SEEDS, 3, 2.0))
    near, far = (model.reconstruct(together, SEEDS, t, 6, cond) for t in (2, 800))
    assert torch.equal(model.reconstruct(together[:1], SEEDS[:1], 800, 6, cond[:1]), far[:1])
    latents = model.encode(together)
    apart = [float((model.encode(x) - latents).abs().mean()) for x in (near, far)]
    assert apart[0] < apart[1]


def test_a_known_part_stays_and_decides_the_rest(model):
    cond, known = model.tokens(PROMPTS), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    known[..., :4] = True
    images = model.sample(cond, SEEDS + 9, 3, 2.0)
    drawn = model.complete(images, known, cond, SEEDS, 3, 2.0)
    torch.testing.assert_close(drawn[..., :4], images[..., :4])
    other = model.complete(-images, known, cond, SEEDS, 3, 2.0)
    assert not torch.equal(other[..., 4:], drawn[..., 4:])


@pytest.mark.parametrize("shift", SHIFTS)
def test_levels_are_the_schedulers_shift_of_the_middle_of_each_step(shift):
    model = made(scheduler=SHIFTS[shift])
    t = torch.arange(1000)
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTS[shift])
    scheduler.set_timesteps(sigmas=((t + 0.5) / 1000).tolist(), mu=model.mu)
    torch.testing.assert_close(model.level(t), scheduler.sigmas[:-1].double(), atol=1e-6, rtol=1e-5)
    gamma, sigma = model.gamma_sigma(t)
    torch.testing.assert_close(gamma + sigma, torch.ones_like(sigma))
    torch.testing.assert_close(model.levels(), (model.level(t) / (1 - model.level(t))))
    assert 0 < float(sigma.min()) < float(sigma.max()) < 1
    first = model.grid(5, 700)
    assert float(first[0]) == pytest.approx(float(model.level(torch.tensor(700))), abs=1e-6)
    assert bool((first.diff() < 0).all())
    assert model.grid(3, 0).tolist()[-1] == 0


def test_score_noise_and_image_follow_from_the_velocity(monkeypatch):
    """For a few points as data the best velocity is known, and so are, by brute force, the score and the posterior mean."""
    model = made()
    model.net.to(D)
    points = torch.randn(4, 2, 4, 4, dtype=D, generator=torch.Generator().manual_seed(1))

    def log_density(x_t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """log of the mean of N((1 - s) x0, s^2) over the points, up to a constant."""
        gaps = (x_t[:, None] - (1 - s)[:, None] * points).square().flatten(2).sum(-1)
        return torch.logsumexp(-gaps / (2 * s.flatten()[:, None] ** 2), 1)

    def mean(x_t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        gaps = (x_t[:, None] - (1 - s)[:, None] * points).square().flatten(2).sum(-1)
        weight = torch.softmax(-gaps / (2 * s.flatten()[:, None] ** 2), 1)
        return (weight[..., None, None, None] * points).sum(1)

    monkeypatch.setattr(
        model, "predict", lambda x, t, c: (x - mean(x, model.gamma_sigma(t)[1])) / model.gamma_sigma(t)[1]
    )
    x0, eps, t = rows()
    x0, t = points[torch.arange(5) % 4], t.clamp(min=300)
    gamma, s = model.gamma_sigma(t)
    x_t = model.add_noise(x0, eps, t).requires_grad_(True)
    (score,) = torch.autograd.grad(log_density(x_t, s).sum(), x_t)
    x_t = x_t.detach()
    torch.testing.assert_close(model.eps(x_t, t, None), -s * score)
    torch.testing.assert_close(model.x0(x_t, t, None), (x_t + s**2 * score) / gamma, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.x0(x_t, t, None), mean(x_t, s))
    v = model.predict(x_t, t, None)
    torch.testing.assert_close(gamma * model.x0(x_t, t, None) + s * model.eps(x_t, t, None), x_t)
    torch.testing.assert_close(model.eps(x_t, t, None) - model.x0(x_t, t, None), v)
    errors = (v - model.target(x0, eps, t)).square()
    torch.testing.assert_close(errors, model.x0_error_weight(t) * (model.x0(x_t, t, None) - x0).square())
    torch.testing.assert_close(squared_errors(model, Rows(x0, None, SEEDS, 5), t, eps), errors)


def test_the_network_is_asked_alike_by_step_and_by_level(model):
    model = model.with_net(copy.deepcopy(model.net).to(D))
    x0, eps, t = rows()
    cond = model.tokens([*PROMPTS, "a ring", ""])
    for i in (1, 3):
        level = float(model.levels()[t[i]])
        x = (x0 + level * eps)[i : i + 1]
        by_step = model.eps(model.add_noise(x0, eps, t)[i : i + 1], t[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(model.eps_at(x, level, cond[i : i + 1]), by_step, rtol=1e-6, atol=1e-6)


def test_the_log_ratio_of_siss_is_that_of_two_gaussians(model):
    x, eps, _ = rows(8)
    a = x.roll(1, 0)
    t = torch.tensor([0, 1, 10, 200, 500, 900, 998, 999])
    s = model.level(t)
    for origin in (x, a):
        m = (1 - s).view(-1, 1, 1, 1) * origin + s.view(-1, 1, 1, 1) * eps
        logs = [
            Normal((1 - s).view(-1, 1, 1, 1) * y, s.view(-1, 1, 1, 1)).log_prob(m).flatten(1).sum(1) for y in (a, x)
        ]
        torch.testing.assert_close(log_ratio(x, a, m, 1 - s, s), logs[0] - logs[1], rtol=1e-9, atol=1e-6)
        gamma, sigma = (1 - s).view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
        # the target of each term is the velocity of the path from its image through m
        torch.testing.assert_close(model.target(x, (m - gamma * x) / sigma, t), (m - x) / sigma)


@cache
def rows_of_latents() -> Task:
    return encoded(flow_task(), made())


def flow_method(name: str, **settings):
    """(method, task) on the tiny model in float64."""
    model = made()
    model.net.to(D)
    return build_method(name, rows_of_latents(), model=model, **settings)


def test_esd_steers_velocities(model):
    method, task = flow_method("esd", eta=1.5, sampler_steps=4)
    batch = batch_for(method, task)
    x_t, t = method.partial_samples(batch["forget"].seeds)
    net, cond, null = method.base, task.goal.forgotten(len(t), t.device), method.model.unconditional(len(t))
    with torch.no_grad():
        v_c, v_u, e_c, e_u = (f(x_t, t, c) for f in (net.predict, net.eps) for c in (cond, null))
    gamma = net.gamma_sigma(t)[0]
    torch.testing.assert_close(target(e_c, e_u, 1.5), x_t + gamma * target(v_c, v_u, 1.5))
    _, scalars = method.direction(batch)
    assert float(scalars["loss"]) == pytest.approx(2.5**2 * float((v_c - v_u).square().mean()), rel=1e-6)


@pytest.mark.parametrize("steps", [10, 50])
def test_the_level_of_a_trajectory_is_that_of_the_noise_in_the_image(monkeypatch, steps):
    """A network that takes every image for noise leaves nothing but noise: x_t is sigma_t times that of the start."""
    method, task = flow_method("esd", sampler_steps=steps, batch_size=24)
    model = method.model
    monkeypatch.setattr(model, "velocity", lambda x, s, c: x / s.view(-1, 1, 1, 1))
    seeds = batch_for(method, task)["forget"].seeds
    x_t, t = method.partial_samples(seeds)
    torch.testing.assert_close(x_t, model.gamma_sigma(t)[1] * model.noise(seeds), rtol=1e-6, atol=1e-9)
    assert len(t.unique()) > 5


def test_esd_layers_of_a_joint_attention(model):
    names = [n for n, _ in model.net.named_parameters()]
    x, keys = layer_names(names, "x"), layer_names(names, "x_strict")
    assert {n.split(".")[4] for n in x} == {
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "norm_added_q",
        "norm_added_k",
    }
    assert {n.split(".")[4] for n in keys} == {"add_k_proj", "add_v_proj"}
    assert any("attn2" in n for n in names)
    assert not any("attn2" in n for n in x)
    assert layer_names(names, "u") == set(names) - x
    assert not ESD.unsuited(ESD.Hyperparameters(layers="x_strict"), model, flow_task().goal)


def test_layers_for_slug(model):
    names = eligible(model)
    assert {tower(n) for n in names} == {"unet", "language"}
    assert all((tower(n) == "unet") == n.startswith("transformer.") for n in names)
    assert not any("timestep_embedder" in n for n in names)
    query = next(n for n in names if ".add_q_proj." in n)
    assert {n.split(".")[-2] for n in group(query, names, "block")} == {"add_q_proj", "add_k_proj", "add_v_proj"}


def test_a_guided_mean_of_sfd_is_that_of_the_guided_velocity():
    method, _ = flow_method("sfd", cond_scale=1.5)
    assert isinstance(method, SFD)
    x0, eps, t = rows(4)
    net, (_, sigma) = method.teacher, method.model.gamma_sigma(t)
    x_t, cond = net.add_noise(x0, eps, t), method.forgotten[:1].expand(4, -1)
    v = 2.5 * net.predict(x_t, t, cond) - 1.5 * net.predict(x_t, t, net.unconditional(4))
    torch.testing.assert_close(method.mean(net, x_t, t, cond), x_t - sigma * v, rtol=1e-6, atol=1e-6)
    # the generator's input has the level nearest to sigma_init
    s = float(net.level(torch.tensor(method.t_init)))
    assert s / (1 - s) == pytest.approx(method.hp.sigma_init, rel=0.01)


def test_the_sampler_is_exact_in_the_limit(model, monkeypatch):
    """For normal data the flow is linear: a point keeps its quantile, so x(0) = c x(1)."""
    c = 0.3
    monkeypatch.setattr(
        model,
        "velocity",
        lambda x, s, cond: (s - (1 - s) * c**2).view(-1, 1, 1, 1) / ((1 - s) ** 2 * c**2 + s**2).view(-1, 1, 1, 1) * x,
    )
    noise = torch.randn(4, 2, 4, 4, dtype=D, generator=torch.Generator().manual_seed(1))
    errors = [float((model.sampler.draw(model, noise, None, Run(n)) - c * noise).abs().max()) for n in (50, 100, 200)]
    assert errors[2] < 0.03
    assert errors[0] / errors[1] > 1.7
    assert errors[1] / errors[2] > 1.7


def test_added_noise_is_that_of_the_process_itself(model, monkeypatch):
    """With eta = 1 a step's noise has the variance of x_r given x_s and x0, by the rule for two correlated normals."""
    monkeypatch.setattr(model, "velocity", lambda x, s, cond: torch.zeros_like(x))
    start = torch.zeros(2, 2, 4, 4, dtype=D)
    levels = torch.tensor([0.8, 0.3, 0.0], dtype=D)
    seeds = torch.tensor([1, 2])
    (_, _, moved), *_ = model.sampler.steps(model, start, levels, None, Run(2, eta=1.0, seeds=seeds))
    (_, _, half), *_ = model.sampler.steps(model, start, levels, None, Run(2, eta=0.5, seeds=seeds))
    s, r = 0.8, 0.3
    covariance = (1 - s) / (1 - r) * r**2  # of x_s and x_r, for x_s = (1 - s)/(1 - r) x_r + independent noise
    expected = math.sqrt(r**2 - covariance**2 / s**2)
    torch.testing.assert_close(moved, expected * normal_rows(seeds, (2, 4, 4), STEP_STREAMS))
    torch.testing.assert_close(half, moved / 2)


def test_a_trajectory_has_distinct_steps(model):
    cond = model.tokens(PROMPTS)
    times = [t for t, _ in model.trajectory(cond, SEEDS, 5, 2.0)]
    assert times == sorted(set(times), reverse=True)
    assert times[0] == 999
    with pytest.raises(ValueError, match="1001 sampler steps are more than the 1000 noise levels"):
        next(model.trajectory(cond, SEEDS, 1001, 2.0))


def test_tied_weights_are_stored_once(model):
    other = model.with_net(copy.deepcopy(model.net))
    with torch.no_grad():
        other.net[T5].shared.weight.add_(1)
    header, tensors = delta.between(model, other, model.digest, other.digest, revertible=True)
    assert {n.removeprefix(delta.AFTER).removeprefix(delta.BEFORE) for n in tensors} == {f"{T5}.shared.weight"}
    third = model.with_net(copy.deepcopy(model.net))
    assert delta.apply(third, header, tensors, "d") == other.digest
    assert delta.apply(third, header, tensors, "d", revert=True) == model.digest


def test_each_encoder_is_searched_by_its_own_tokens(model):
    """The inversion attack moves the rows of the forgotten word in each vocabulary, and no other."""
    tier = Tier(seed=1, judge="audit", inversion_steps=1)
    attacked = inverted(subject_of(model, flow_task(), Judge(3, 4), tier), 1).model
    for name, tokenizer in zip(model.columns, model.frozen.tokenizers, strict=True):
        before, after = (m.net[name].get_input_embeddings().weight for m in (model, attacked))
        moved = (before != after).any(1).nonzero()[:, 0].tolist()
        word = tokenizer("ring", add_special_tokens=False).input_ids
        assert moved == word, name


def test_prompts_that_are_cut_are_said(model):
    long = "a ring the small dot"
    assert model.too_long(["a ring", long]) == {
        f"longer than the 6 tokens that {name} reads, which sees only the beginning": [long]
        for name in ("text_encoder", "text_encoder_2")
    }
    longer = f"{long} the small box"
    assert len(model.too_long([longer])) == 3


def test_reduced_prompts_of_a_model_with_t5_alone():
    model = made(**PARTS["T5 alone"])
    *masked, null = model.reduced(model.tokens(["the small ring"]))
    assert torch.equal(null, model.unconditional(1))
    said = [model.frozen.tokenizers[0].batch_decode(cond, skip_special_tokens=True)[0] for cond in masked]
    assert [len(text.split()) for text in said] == [2, 1, 1]


def test_a_folder_is_read_whole(copy):
    assert not_read(copy("flow")) == ()


def test_one_pass_on_shapes_alone(model):
    check_pass(model, model.tokens(["a ring"]), "here")
    check_pass(model, None, "here")


def test_training_lowers_the_loss_and_keeps_the_autoencoder():
    latents, model = rows_of_latents(), made()
    before = model.encoder_digest
    method = Retrain(model, RetrainSettings(steps=40, batch_size=24, split="train", label_drop=0.2), {}, latents.goal)
    losses = [float(method.step(latents.batch(method.draws(), 0, k))["loss"]) for k in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert model.encoder_digest == before


def test_scores_and_likelihoods_are_finite_up_to_the_last_step(model):
    tier = Tier(
        seed=1,
        judge="audit",
        membership_images=4,
        membership_t=(0, 999),
        membership_stride=333,
        membership_noises=1,
        likelihood_steps=2,
        likelihood_probes=1,
        loss_images=2,
        checks=("loss", "pia", "secmi", "sima", "likelihood"),
    )
    torch.manual_seed(0)
    result = measure(subject_of(model, flow_task(), Judge(3, 4), tier), tier)
    assert {r.check for r in result.rows if r.status == "ok"} == set(tier.checks)
    assert all(math.isfinite(value) for value in result.values.values())


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            "model_index.json",
            dict.fromkeys(("text_encoder", "text_encoder_2", T5)),
            "names no text encoder; it needs one or more",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "CLIPTextModel"]},
            "text_encoder: is CLIPTextModel; supported",
        ),
        ("vae/config.json", {"shift_factor": None}, "shift_factor is None; it must be a number"),
        ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean is set"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "holds a DDIMScheduler; a flow model has",
        ),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is True; supported are"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "shift is 0; it must be a positive number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True, "max_image_seq_len": 256},
            "two lengths that differ",
        ),
        ("scheduler/scheduler_config.json", {"shift": 1e300}, "levels of noise that do not rise"),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": -9},
            "levels of noise that do not rise",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True, "base_shift": 1e9},
            "cannot be read: math range",
        ),
        ("transformer/config.json", {"sample_size": 5}, "sample_size is 5; it must be a multiple of patch_size, 2"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 5}, "tokenizer reads 5 tokens and tokenizer_2 6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(copy, file, entries, message):
    folder = copy("flow")
    edit(folder / file, **entries)
    refused(folder, message)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            T5,
            f"{T5}: is missing: model_index.json names {T5}, a T5EncoderModel; add the folder, or set {T5} and tokenizer_3",
        ),
        ("tokenizer_3", f"tokenizer_3: is missing: model_index.json names {T5}"),
        ("tokenizer_3/tokenizer.json", "tokenizer_3: tokenizer.json or spiece.model is missing"),
        (f"{T5}/model.safetensors", f"{T5}: weights are missing"),
    ],
)
def test_a_part_that_is_named_and_missing_is_refused(copy, part, message):
    folder = copy("flow")
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(folder, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"joint_attention_dim": 48},
            "text_encoder_3 gives embeddings of width 32, .* those of 48 .joint_attention_dim",
        ),
        ({"joint_attention_dim": 16}, "text_encoder and text_encoder_2 give embeddings of width 24"),
        ({"pooled_projection_dim": 24}, "give pooled states of width 20, and the transformer takes 24"),
        ({"in_channels": 4, "out_channels": 4}, "latents of 2 channels, and the transformer takes 4"),
    ],
)
def test_parts_of_other_models_are_refused(tmp_path, config, message):
    flow_model(transformer=FLOW["transformer"] | config).save(tmp_path / "m")
    refused(tmp_path / "m", message)


def test_a_lone_clip_model_that_is_too_wide_is_refused(tmp_path):
    flow_model(text_encoder_2=None, transformer=FLOW["transformer"] | {"pooled_projection_dim": 12}).save(
        tmp_path / "m"
    )
    refused(
        tmp_path / "m",
        "text_encoder give pooled states of width 12, .* part of them from the CLIP model that is missing",
    )


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        families.load(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
