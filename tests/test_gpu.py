"""On a GPU: steps equal those of a CPU, trials repeat, images do not depend on their batch, checks run.

    pytest -n 0 -m gpu tests/test_gpu.py

TensorFloat-32, which rounds to ten bits, is off unless a test switches it on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_table import TRAINED, settings_for, slow
from test_evaluators import TIER
from test_methods import FAMILIES, JOBS, instance, through_a_file
from tiny import LATENT, flow_model, latent_task, vlm_pairs

from raysweep.auditing.measure import measure, subject_of
from raysweep.models import families
from raysweep.models.embeddings import Embeddings
from raysweep.models.latent import LatentText
from raysweep.models.noise import row_seeds
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import FAMILIES as RECORDS
from raysweep.registry import resolve
from raysweep.tasks.task import encoded
from raysweep.train.jobs import Job
from raysweep.train.loop import Resident
from raysweep.train.loop import run as run_job

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRAINS = [job for job in JOBS if job[0] in TRAINED]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def built(name: str, family: str, device: torch.device, dtype: torch.dtype = torch.float32, **more):
    """(method, task) on a device."""
    cls = resolve("method", name)
    settings = settings_for(name, **slow(name)) | more
    if RECORDS[family].model_kind == "contrastive" and "trunc_elem_sq" in cls.Hyperparameters.model_fields:
        settings["trunc_elem_sq"] = None
    hp = cls.Hyperparameters(**settings)
    task, model = vlm_pairs() if family == "vlm" else instance(name, family)
    model.net.to(dtype)
    if model.latent:
        model.frozen.vae.to(dtype)
    model.to(device)
    task = encoded(task, model)
    prepared = {k: v.cpu() for k, v in cls.prepare(model, task, 0, hp).items()}  # as read from a file
    return cls(model, hp, prepared, task.goal), task


def stepped(method, task, start: int = 0, stop: int = 2) -> torch.Tensor:
    """The weights after steps start to stop, as one float64 vector on the CPU."""
    weight = next(iter(method.model.net.parameters()))
    for step in range(start, min(stop, method.steps)):
        batch = task.batch(method.draws(), 3, step)
        method.step({k: rows.to(weight.device, weight.dtype) for k, rows in batch.items()})
    return torch.cat([p.detach().double().cpu().reshape(-1) for p in method.model.net.parameters()])


def trained(name: str, family: str, folder: Path, tag: str, device: torch.device = GPU, **more):
    """(outcome, folder of the candidate) of a train worker's job, after its preparation."""
    base, task_dir = folder / "base", folder / "task"
    task, model = instance(name, family)
    if not base.exists():
        task_dir.mkdir()
        task.save(task_dir)
        model.save(base)
    settings = settings_for(name)
    if family == "clip" and "trunc_elem_sq" in resolve("method", name).Hyperparameters.model_fields:
        settings["trunc_elem_sq"] = None
    small = {k: v for k, v in settings.items() if k in resolve("method", name).prepared_by}
    resident, out = Resident(device), folder / tag
    common = {"method": name, "seed": 7, "task": str(task_dir), "base": str(base)} | more
    prepared = out.with_suffix(".safetensors")
    outcome = run_job(Job(id="p", kind="prepare", hyperparameters=small, out=str(prepared), **common), resident)
    assert outcome.status == "ok", outcome.reason
    job = Job(id="t", kind="train", hyperparameters=settings, out=str(out), prepared=str(prepared), **common)
    outcome = run_job(job, resident)
    assert outcome.status == "ok", outcome.reason
    return outcome, out


def test_one_module_and_adapters_train(tmp_path):
    pytest.importorskip("peft")
    for family, module in (("text-ddpm", "unet"), ("flow", "transformer")):
        (tmp_path / family).mkdir()
        trained("finetune", family, tmp_path / family, "one", modules=(module,))
        trained("finetune", family, tmp_path / family, "two", lora={"rank": 2, "alpha": 2})


WIDE = {
    "unet": {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64, 128),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 7,
    },
    "scheduler": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    "null_label": 6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("kind", ["wide", "latent", "flow", "edm"])
def test_an_image_is_bit_identical_in_any_batch(kind, dtype, tf32):
    from evaluators.base import Subject

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    seeds, order = row_seeds(9, 0, 120), torch.randperm(120, generator=torch.Generator().manual_seed(0))
    if kind in ("latent", "flow"):
        model = flow_model(1) if kind == "flow" else LatentText.build(LATENT, 1)
        cond = latent_task(model=model).splits["prompts_probe"].cond[torch.arange(120) % 4]
        model.frozen.vae.to(dtype)
    else:
        model = PixelDDPM.build(WIDE, 1) if kind == "wide" else instance("rgd", "edm")[1]
        cond = torch.arange(120) % 6
    model.net.to(dtype)
    model.to(GPU)
    one = Subject(model, replace(latent_task(), sampling={"steps": 4, "guidance": 2.0}), None, {}, lambda *_: seeds)
    whole = one.generate(cond, seeds)
    assert whole.device.type == "cpu"
    assert torch.equal(one.generate(cond[order], seeds[order]), whole[order])
    for low, high in ((0, 1), (3, 50), (7, 118)):
        assert torch.equal(one.generate(cond[low:high], seeds[low:high]), whole[low:high])


@pytest.mark.parametrize("kind", ["points", "class", "text-ddpm", "flow", "edm", "clip"])
def test_checks_run_and_agree_with_a_cpu(kind, points_task, class_task):
    from evaluators.judge import train_judge

    judge = None
    if kind in ("points", "class"):
        task = points_task if kind == "points" else class_task
        split = task.splits["judge_probe"]
        judge = train_judge(split.x, split.groups, seed=0, steps=60)
    else:
        task, _ = instance("finetune", kind)
        split = task.splits["judge_probe"]
        judge = None if kind == "clip" else train_judge(split.x, split.groups, seed=0, steps=60)
        task = replace(task, family=kind)
    tier = TIER.model_copy(update={"checks": tuple(c for c in TIER.checks if c != "quantile" or kind == "points")})

    def measured(device):
        def one(seed):
            if kind in ("points", "class"):
                model = PixelDDPM.build(task.model, seed)
            else:
                model = instance("finetune", kind)[1]
                model = model if seed == 0 else model.fresh(seed)
            return subject_of(model.to(device), task, judge, tier)

        subject = one(0)
        subject.peers = {"base": subject} | {f"oracle-{k}": one(k + 1) for k in range(2)}
        return measure(subject, tier)

    on_cpu, on_gpu = measured(CPU), measured(GPU)
    assert [(r.check, r.reason) for r in on_gpu.rows if r.status == "failed"] == []
    checks_cpu, checks_gpu = ([(r.check, r.name, r.status) for r in result.rows] for result in (on_cpu, on_gpu))
    assert checks_cpu == checks_gpu
    for metric in ("denoising.forget_loss", "denoising.retain_loss", "loss.auc", "contrast.retain_loss"):
        if metric in on_cpu.values:
            assert on_gpu.values[metric] == pytest.approx(on_cpu.values[metric], rel=1e-2), metric


def test_stored_embeddings_of_prompts_equal_new_ones():
    task, model = instance("finetune", "text-ddpm")
    model.to(GPU)
    model.train_only(("unet",))
    cond = task.splits["retain"].cond[:5].to(GPU)
    x, t = model.noise(row_seeds(1, 0, 5)), torch.full((5,), 300, device=GPU)
    with torch.no_grad():
        anew = model.predict(x, t, cond)
        model.embeddings = Embeddings.of(model, task.splits["retain"].cond)
        torch.testing.assert_close(model.predict(x, t, cond), anew, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "family"), JOBS)
def test_a_trial_repeats_bit_for_bit_and_its_candidate_loads(name, family, tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    one, out = trained(name, family, tmp_path, "one")
    assert families.load(out).to(GPU).digest == one.digest
    two, _ = trained(name, family, tmp_path, "two")
    assert one.digest == two.digest


@pytest.mark.parametrize(("name", "family"), JOBS)
def test_weights_stay_finite_and_single_in_mixed_precision(name, family, tmp_path):
    _, out = trained(name, family, tmp_path, "one", precision="bf16")
    for p in families.load(out).net.parameters():
        assert p.dtype == torch.float32
        assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize(("name", "family"), [job for job in TRAINS if job[1] in ("pixel-ddpm", "text-ddpm", "flow")])
def test_a_resumed_method_ends_with_the_same_weights(name, family):
    whole, task = built(name, family, GPU)
    expected = stepped(whole, task, 0, 3)
    first, _ = built(name, family, GPU)
    stepped(first, task, 0, 2)
    second, _ = built(name, family, GPU)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert torch.equal(stepped(second, task, 2, 3), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-5)])
@pytest.mark.parametrize(("name", "family"), [*TRAINS, *((n, f) for n, f in FAMILIES if f == "vlm")])
def test_steps_equal_those_of_a_cpu(name, family, dtype, tolerance):
    method, task = built(name, family, CPU, dtype)
    expected = stepped(method, task)
    on_gpu, _ = built(name, family, GPU, dtype)
    weights = stepped(on_gpu, task)
    on_gpu.finish()
    assert all(p.device.type == "cuda" for p in on_gpu.model.net.parameters())
    assert float((expected - weights).norm() / expected.norm()) < tolerance
