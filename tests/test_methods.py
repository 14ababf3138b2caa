"""Every method goes through the same table of tests, on tiny real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import (
    LATENT,
    PROMPTS,
    ROOT,
    Pairs,
    TinyClip,
    TinyText,
    batch_for,
    clip_model,
    clip_task,
    edm_model,
    latent_task,
    text_task,
    tiny_model,
    tiny_task,
    vlm_pairs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from methods import gradients
from methods.base import Diverged, Goal, Method
from methods.finetune import Finetune
from methods.graddiff import GradDiff
from methods.neggrad import NegGrad
from methods.rgd import RGD, restricted_direction
from methods.salun import SalUn, saliency_mask
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import FAMILIES as RECORDS
from raysweep.registry import METHODS, resolve, unserved
from raysweep.storage.files import digest_state
from raysweep.tasks.task import Task

D = torch.float64
SETTINGS: dict[str, dict] = {
    "bernoulli": {"rho": 0.5},
    "erasediff": {"inner_steps": 2, "inner_every": 2, "ema": 0.5, "label_drop": 0.3},
    "esd": {"sampler_steps": 4},
    "rg": {"retain_pass": "full"},
    "rgd": {"trunc_elem_sq": None},
    "retrain": {"split": "retain", "warmup": 2},
    "salun": {"alpha": 1.0, "label_drop": 0.3},
    "selective_amnesia": {
        "replay_per_class": 4,
        "fisher_per_class": 2,
        "fisher_timesteps": 4,
        "sampler_steps": 3,
        "ema": 0.0,
    },
    "sfd": {"lr_fake": 1e-3, "ema": 0.5, "forget": 0.5, "fake_forget": 0.5},
    "sfd_two_stage": {"lr_fake": 1e-3, "stage1_steps": 2, "stage1_batch_size": 8, "ema": 0.5},
    "siss": {"rho": 0.5},
    "siss_no_is": {"rho": 0.5},
    "slug": {"bisection": 3, "passes": 1},
}
ALL = sorted(METHODS)
TRAINED = [name for name in ALL if name != "sld"]  # SLD is a sampler: it has no steps and changes no weight
STEPPED = [name for name in TRAINED if name != "slug"]  # SLUG sets weights along gradients prepared beforehand


def task_for(name: str):
    return tiny_task("points" if "points" in resolve("method", name).kinds else "class")


def settings_for(name: str, **more) -> dict:
    common = {"lr": 1e-3, "steps": 3, "batch_size": 12}
    fields = resolve("method", name).Hyperparameters.model_fields
    return {k: v for k, v in common.items() if k in fields} | SETTINGS.get(name, {}) | more


def build(name: str, task=None, dtype=D, seed: int = 0, model=None, **settings) -> tuple[Method, object]:
    task = task or task_for(name)
    cls = resolve("method", name)
    hp = cls.Hyperparameters(**settings_for(name, **settings))
    model = model or tiny_model(task, seed, dtype)
    prepared = cls.prepare(model, task, 0, hp)
    return cls(model, hp, prepared, task.goal), task


def weights(method: Method) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in method.model.net.parameters()])


def run(method: Method, task, start: int = 0, stop: int = 3) -> torch.Tensor:
    for step in range(start, min(stop, method.steps)):
        method.step(batch_for(method, task, step))
    return weights(method)


@pytest.mark.parametrize("name", ALL)
def test_describes_itself(name):
    cls = resolve("method", name)
    assert cls.name == name
    assert "arXiv" in (cls.__doc__ or "") + cls.source
    assert cls.needs <= {"forget", "retain", "train"}
    assert cls.forwards_per_step >= 0
    assert set(cls.prepared_by) <= set(cls.Hyperparameters.model_fields)
    for field, info in cls.Hyperparameters.model_fields.items():
        assert info.description, f"{name}.{field} has no description"


@pytest.mark.parametrize("name", ALL)
def test_unused_settings_are_refused(name):
    with pytest.raises(ValidationError, match="Extra inputs"):
        resolve("method", name).Hyperparameters(**settings_for(name), no_such_knob=1)


@pytest.mark.parametrize("name", TRAINED)
def test_steps_change_the_weights_and_repeat_exactly(name):
    method, task = build(name)
    before = weights(method)
    after = run(method, task)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(*build(name)))
    diagnostics = method.finish()
    assert diagnostics["distance"] > 0


@pytest.mark.parametrize("name", TRAINED)
def test_resume_is_bit_exact(name):
    whole, task = build(name)
    expected = run(whole, task)
    first, _ = build(name)
    run(first, task, 0, 2)
    state = through_a_file(first.state_dict())
    second, _ = build(name)
    with torch.no_grad():
        for p in second.params:
            p.zero_()
    second.load_state_dict(state)
    assert torch.equal(run(second, task, 2, 3), expected)


def through_a_file(state):
    """Through a file, as a checkpoint goes, loaded without running code."""
    import io

    out = io.BytesIO()
    torch.save(state, out)
    out.seek(0)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", TRAINED)
def test_nan_is_named(name):
    method, task = build(name)
    with torch.no_grad():
        method.params[0].fill_(float("nan"))
        if name == "slug":
            method.before[method.chosen[0]].fill_(float("nan"))

    def go():
        method.step(batch_for(method, task))
        method.finish()

    with pytest.raises(Diverged, match="not finite"):
        go()


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_parameters_stay_bitwise(name):
    task = task_for(name)
    model = tiny_model(task, dtype=D)
    for part in (model.net.conv_in, model.net.up_blocks):
        part.requires_grad_(False)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    method, _ = build(name, task, model=model)
    run(method, task)
    method.finish()
    changed = {n for n, p in model.net.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert not any(n.startswith(("conv_in", "up_blocks")) for n in changed)


@pytest.mark.parametrize("name", ALL)
def test_preparing_leaves_the_model_alone_and_repeats(name):
    task, cls = task_for(name), resolve("method", name)
    model, hp = tiny_model(task), cls.Hyperparameters(**settings_for(name))
    before = model.digest
    prepared = cls.prepare(model, task, 0, hp)
    assert model.digest == before
    assert all(p.grad is None for p in model.net.parameters())
    assert digest_state(prepared) == digest_state(cls.prepare(model, task, 0, hp))


@pytest.mark.parametrize("name", ALL)
def test_candidates_survive_saving(name, tmp_path):
    method, task = build(name, dtype=torch.float32)
    run(method, task)
    method.finish()
    method.model.save(tmp_path / "model")
    again = PixelDDPM.load(tmp_path / "model")
    assert again.digest == method.model.digest
    cond = None if task.kind == "points" else torch.tensor([2, 0])
    seeds = torch.arange(2)
    assert torch.equal(again.sample(cond, seeds, 3, 1.5), method.model.sample(cond, seeds, 3, 1.5))


OTHERS = [family for family in sorted(RECORDS) if family != "pixel-ddpm"]
FAMILIES = [(name, family) for name in ALL for family in OTHERS if not unserved(resolve("method", name), family)]


def build_on(name: str, family: str, **settings) -> tuple[Method, object]:
    """A method on the tiny instance of a family, in float64."""
    if RECORDS[family].model_kind == "contrastive":
        task, model = (Pairs(), TinyClip(dtype=D)) if family == "clip" else vlm_pairs(D)
        if "trunc_elem_sq" in resolve("method", name).Hyperparameters.model_fields:
            settings["trunc_elem_sq"] = None
    elif family == "edm":
        task, model = tiny_task("class"), edm_model()
        model.net.to(D)
    else:
        task, model = text_task(), TinyText.tiny(dtype=D)
        task.__dict__["goal"] = Goal("concept", 2, 4, tuple(range(6)), PROMPTS[2], tuple(PROMPTS.items()))
    return build(name, task, model=model, **settings)


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_a_step_on_every_family(name, family):
    method, task = build_on(name, family)
    assert not type(method).unsuited(method.hp, method.model, task.goal)
    before = weights(method).clone()
    after = run(method, task, 0, 1)
    method.finish()
    assert bool(torch.isfinite(after).all())
    assert torch.equal(before, after) == (name not in TRAINED)


def slow(name: str) -> dict:
    """A small learning rate: Adam blows rounding up at large ones."""
    return {"lr": 1e-4} if "lr" in resolve("method", name).Hyperparameters.model_fields else {}


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import test_methods as t
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{meet}", rank=rank, world_size=2)
out = {{}}
for name in t.TRAINED:
    for dtype in (torch.float64, torch.float32):
        method, task = t.build(name, dtype=dtype, **t.slow(name))
        for step in range(3):
            method.step(t.batch_for(method, task, step, rank=rank, world=2))
        out[f"{{name}}-{{dtype}}"] = t.weights(method)
for name, family in t.FAMILIES:
    if name in t.TRAINED and family != "vlm":  # which is trained as "clip" is
        method, task = t.build_on(name, family, **t.slow(name))
        for step in range(min(2, method.steps)):
            method.step(t.batch_for(method, task, step, rank=rank, world=2))
        out[f"{{name}}-{{family}}"] = t.weights(method)
if rank == 0:
    torch.save(out, {file!r})
dist.barrier()
"""


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of all methods after four steps on two gloo workers."""
    folder = tmp_path_factory.mktemp("gloo")
    code = WORKER.format(
        root=str(ROOT), tests=str(Path(__file__).parent), meet=folder / "meet", file=str(folder / "w.pt")
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [w.wait(timeout=240) for w in workers] == [0, 0]
    return torch.load(folder / "w.pt", weights_only=True)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_two_workers_equal_one(name, dtype, tolerance, two_workers):
    alone = run(*build(name, dtype=dtype, **slow(name)))
    together = two_workers[f"{name}-{dtype}"]
    assert float((alone - together).norm() / alone.norm()) < tolerance


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in FAMILIES if n in TRAINED and f != "vlm"])
def test_two_workers_equal_one_on_every_family(name, family, two_workers):
    alone = run(*build_on(name, family, **slow(name)), 0, 2)
    together = two_workers[f"{name}-{family}"]
    assert float((alone - together).norm() / alone.norm()) < 1e-9


FRESH = """
import sys, json
sys.path[:0] = [{root!r}, {tests!r}]
import test_methods as t
print(json.dumps([t.job_digest(*job, {folder!r}, "fresh") for job in t.JOBS]))
"""
JOBS = [(name, "pixel-ddpm") for name in ALL] + [
    job for job in FAMILIES if job[1] != "vlm"
]  # which is trained as "clip" is


def instance(name: str, family: str) -> tuple[Task, Any]:
    """A task and the model to be unlearned, both of kinds that can be saved."""
    if family == "pixel-ddpm":
        return task_for(name), tiny_model(task_for(name), seed=1)
    if family == "edm":
        return tiny_task("class"), edm_model(1)
    return (clip_task(), clip_model(1)) if family == "clip" else (latent_task(), LatentText.build(LATENT, 1))


def job_digest(name: str, family: str, folder: str, tag: str, resident=None) -> str:
    """The hash of the candidate that a job makes, through the worker's own code."""
    from raysweep.train.jobs import Job
    from raysweep.train.loop import Resident
    from raysweep.train.loop import run as run_job

    kind = task_for(name).kind if family == "pixel-ddpm" else family
    path, resident = Path(folder), resident or Resident()
    task_dir, base = path / kind / "task", path / kind / "base"
    if not base.exists():
        task_dir.mkdir(parents=True)
        task, model = instance(name, family)
        task.save(task_dir)
        model.save(base)
    common = {"method": name, "seed": 7, "task": str(task_dir), "base": str(base)}
    out = path / tag / family / name
    prepared = out.with_suffix(".safetensors")
    settings = settings_for(name)
    if family == "clip" and "trunc_elem_sq" in resolve("method", name).Hyperparameters.model_fields:
        settings["trunc_elem_sq"] = None
    small = {k: v for k, v in settings.items() if k in resolve("method", name).prepared_by}
    outcome = run_job(Job(id="p", kind="prepare", hyperparameters=small, out=str(prepared), **common), resident)
    assert outcome.status == "ok", outcome.reason
    job = Job(id="t", kind="train", hyperparameters=settings, out=str(out), prepared=str(prepared), **common)
    outcome = run_job(job, resident)
    assert outcome.status == "ok", outcome.reason
    return outcome.digest


def test_a_second_trial_in_a_warm_worker_equals_a_fresh_process(tmp_path):
    from raysweep.train.loop import Resident

    resident, warm = Resident(), {}
    torch.manual_seed(12345)
    for job in reversed(JOBS):  # so that every method finds a worker that others have used than in the fresh process
        warm[job] = job_digest(*job, str(tmp_path), "warm", resident)
    code = FRESH.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert warm == dict(zip(JOBS, json.loads(done.stdout.splitlines()[-1]), strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses to bring a number to the host, which on a GPU waits for everything before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in STEPPED if n not in ("esd", "sfd", "sfd_two_stage")])
def test_directions_do_not_wait_for_the_device(name):
    method, task = build(name)
    batch = batch_for(method, task)
    method.model.net.train()
    with NoWaiting():
        method.direction(batch)


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [("finetune", 1, 1), ("siss", 1, 2), ("bernoulli", 1, 2), ("siss_no_is", 2, 2), ("graddiff", 2, 2), ("rgd", 2, 2)],
)
def test_steps_use_the_fewest_passes(name, forwards, backwards, monkeypatch):
    method, task = build(name)
    batch, seen, real = batch_for(method, task), {"forward": 0, "backward": 0}, torch.autograd.backward

    def counted(*args, **kwargs):
        seen["backward"] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", counted)
    method.model.net.register_forward_hook(lambda *_: seen.__setitem__("forward", seen["forward"] + 1))
    method.step(batch)
    assert seen == {"forward": forwards, "backward": backwards}


def test_gradients_are_views_of_two_vectors_at_most():
    """One stored gradient and the live one: nothing else of the size of the weights survives a step."""
    for name in ("rgd", "siss"):
        method, task = build(name)
        method.step(batch_for(method, task))
        kept = {p.grad.untyped_storage().data_ptr() for p in method.params}
        assert len(kept) == 1
        assert len(method.buffers) == 2
        first = [v.data_ptr() for v in method.buffers.values()]
        method.step(batch_for(method, task, 1))
        assert [v.data_ptr() for v in method.buffers.values()] == first


def test_finetune_lowers_and_neggrad_raises_their_loss():
    for name, sign in (("finetune", -1), ("neggrad", 1)):
        method, task = build(name, lr=3e-3, clip_norm=None)
        batch = batch_for(method, task)
        (key,) = list(method.step(batch))
        losses = [float(method.step(batch)[key]) for _ in range(8)]
        assert sign * (losses[-1] - losses[0]) > 0


def test_superfactor_cancels_under_clipping():
    one, task = build("neggrad", clip_norm=1e-2)
    three, _ = build("neggrad", clip_norm=1e-2, superfactor=3.0)
    torch.testing.assert_close(run(one, task), run(three, task), rtol=1e-5, atol=1e-7)


def test_rgd_equals_graddiff_without_conflict_and_differs_with_it():
    task = task_for("rgd")
    rgd, _ = build("rgd", task, retain_pass="minibatch")
    plain, _ = build("graddiff", task, lam=5.0)
    f, r = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([2.0, 0.5], dtype=D)

    def combined(method, a, b):
        return method.combine(a.clone(), b.clone(), gradients.products(a, b))

    assert torch.equal(combined(rgd, f, r), combined(plain, f, r))
    assert not torch.equal(combined(rgd, f, -r), combined(plain, f, -r))
    assert torch.equal(combined(rgd, f, -r), restricted_direction(f, -r, 5.0))
    g_f, g_r = torch.randn((2, len(weights(rgd))), dtype=D, generator=torch.Generator().manual_seed(0))
    deltas = {}
    for granularity in ("global", "per_block", "per_tensor"):
        deltas[granularity] = combined(build("rgd", task, granularity=granularity)[0], g_f, g_r)
        assert float(deltas[granularity] @ g_f) > -1e-9
        assert float(deltas[granularity] @ g_r) > -1e-9
    assert len({d.sum().item() for d in deltas.values()}) == 3


def test_truncation_stops_the_ascent_alone():
    task = task_for("graddiff")
    batches = {}
    variants = {
        "plain": {},
        "alpha inf": {"trunc_elem_sq": 1e9},
        "alpha 0": {"trunc_elem_sq": 0.0},
        "m": {"trunc_batch_loss": 1e-9},
        "m high": {"trunc_batch_loss": 1e9},
    }
    for name, settings in variants.items():
        method, _ = build("graddiff", task, **settings)
        batch = batch_for(method, task)
        batches[name] = (
            method.forget_gradient(batch["forget"])[0].clone(),
            float(method.direction(batch)[1]["retain_loss"]),
        )
    for same in ("alpha inf", "m high"):
        assert torch.equal(batches["plain"][0], batches[same][0])
    for stopped in ("alpha 0", "m"):
        assert not batches[stopped][0].any()
    assert len({retain for _, retain in batches.values()}) == 1


def test_full_retain_pass_is_the_mean_over_the_set():
    task = task_for("rgd")
    method, _ = build("rgd", task, retain_pass="full", retain_per_group=3)
    rows = batch_for(method, task)["retain"]
    assert rows.total == len(rows.x) == 18
    halves = [task.batch(method.draws(), 3, 0, rank, 2)["retain"] for rank in range(2)]
    assert torch.equal(torch.cat([h.x for h in halves]), rows.x.float())
    assert torch.equal(torch.cat([h.seeds for h in halves]), rows.seeds)


def test_steps_of_graddiff_and_alpha_of_salun_follow_the_releases():
    assert resolve("method", "graddiff").Hyperparameters().steps == -(-50_000 // 64) == 782
    errors = torch.rand((5, 3, 32, 32), dtype=D, generator=torch.Generator().manual_seed(0))
    summed, mean = errors.flatten(1).sum(1).mean(), errors.mean()
    assert float(1e-3 * summed) == pytest.approx(float(3.072 * mean))
    assert resolve("method", "salun").Hyperparameters().alpha == pytest.approx(3.072, rel=1e-3)


def test_salun_moves_salient_weights_only():
    method, task = build("salun", fraction=0.3, weight_decay=0.0)
    before, mask = weights(method), method.mask.bool()
    after = run(method, task)
    assert torch.equal(before[~mask], after[~mask])
    assert bool((before[mask] != after[mask]).any())


def test_saliency_mask_holds_the_largest_gradients_and_grows_with_the_fraction():
    g = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn((7, 3), generator=g), "b": torch.randn(11, generator=g)}
    last = None
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        mask = saliency_mask(grads, fraction)
        flat, size = (
            torch.cat([m.reshape(-1) for m in mask.values()]),
            torch.cat([v.reshape(-1).abs() for v in grads.values()]),
        )
        assert int(flat.sum()) == int(fraction * 32)
        assert set(flat.tolist()) <= {0.0, 1.0}
        if 0 < fraction < 1:
            assert size[flat == 1].min() >= size[flat == 0].max()
        if last is not None:
            assert bool((flat >= last).all())
        last = flat
    signed = torch.tensor([3.0, 1.0]) + torch.tensor([-3.0, 1.0])
    assert saliency_mask({"w": signed}, 0.5)["w"].tolist() == [0.0, 1.0]


def test_salun_imitates_the_class_of_its_setting():
    for relabel, allowed in (("next", {3}), ("override", {4}), ("random", {0, 1, 3, 4, 5})):
        method, task = build("salun", task_for("salun"), relabel=relabel, batch_size=64)
        assert set(method.stand_in(batch_for(method, task)["forget"]).tolist()) <= allowed
    relabelled, task = build("salun", label_drop=0.0)
    relabelled.stand_in = lambda rows: rows.cond  # the same class asks for no change
    assert float(relabelled.direction(batch_for(relabelled, task))[1]["relabel_loss"]) == pytest.approx(0.0, abs=1e-20)


def test_names_are_their_files():
    for cls in (Finetune, GradDiff, NegGrad, RGD, SalUn):
        assert cls.__module__ == f"methods.{cls.name}"


def test_half_precision_passes_lose_no_update(tmp_path):
    """A learning rate of 1e-6 moves nearly every weight of single precision, and next to none of bfloat16."""
    from raysweep.train.jobs import Job
    from raysweep.train.loop import Resident
    from raysweep.train.loop import run as do

    task = tiny_task("points")
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    base = tiny_model(task)
    base.save(tmp_path / "base")
    weights_of = {}
    for precision in ("fp32", "bf16"):
        job = Job(
            id="j",
            kind="train",
            method="finetune",
            hyperparameters={"lr": 1e-6, "steps": 3, "batch_size": 12},
            seed=1,
            task=str(tmp_path / "task"),
            base=str(tmp_path / "base"),
            out=str(tmp_path / precision),
            precision=precision,
        )
        outcome = do(job, Resident())
        assert outcome.status == "ok", outcome.reason
        weights_of[precision] = PixelDDPM.load(tmp_path / precision).net.state_dict()
    before = base.net.state_dict()
    assert any(not torch.equal(weights_of["fp32"][n], weights_of["bf16"][n]) for n in before)
    for n, w in before.items():
        moved = (weights_of["bf16"][n] - w).abs()
        assert weights_of["bf16"][n].dtype == torch.float32
        assert float((moved > 0).double().mean()) > 0.5
        if w.dim() > 1:
            lost = (w.bfloat16() + moved.bfloat16()) == w.bfloat16()
            assert float(lost.double().mean()) > 0.9
