"""Every method goes through the same table of tests, on tiny real models."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from method_table import ALL, PIXEL, STEPPED, TRAINED, D, build, model_for, run, settings_for, slow, task_for, weights
from pydantic import ValidationError
from tiny import (
    LATENT,
    ROOT,
    Pairs,
    TinyClip,
    TinyText,
    batch_for,
    clip_model,
    clip_task,
    concept_task,
    edm_model,
    flow_model,
    flow_task,
    latent_task,
    tiny_model,
    tiny_task,
    vlm_pairs,
)

from methods.base import Diverged, Method
from raysweep.models import families, stored
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM
from raysweep.planning.disk import checkpoint
from raysweep.registry import FAMILIES as RECORDS
from raysweep.registry import resolve, unserved
from raysweep.storage.files import digest_state
from raysweep.tasks.task import Task, encoded


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
        for p in (method.params[0], *method.start):  # edits begin at the latter
            p.fill_(float("nan"))

    def go():
        method.step(batch_for(method, task))
        method.finish()

    with pytest.raises(Diverged, match="not finite"):
        go()


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_parameters_stay_bitwise(name):
    task = task_for(name)
    model = model_for(name, task)
    unet = model.net if name in PIXEL else model.net["unet"]
    for part in (unet.conv_in, unet.up_blocks):
        part.requires_grad_(False)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    method, _ = build(name, task, model=model)
    run(method, task)
    method.finish()
    changed = {n for n, p in model.net.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert not any(n.removeprefix("unet.").startswith(("conv_in", "up_blocks")) for n in changed)


@pytest.mark.parametrize("name", ALL)
def test_preparing_leaves_the_model_alone_and_repeats(name):
    task, cls = task_for(name), resolve("method", name)
    model, hp = model_for(name, task, dtype=torch.float32), cls.Hyperparameters(**settings_for(name))
    before = model.digest
    prepared = cls.prepare(model, task, 0, hp)
    assert model.digest == before
    assert all(p.grad is None for p in model.net.parameters())
    assert digest_state(prepared) == digest_state(cls.prepare(model, task, 0, hp))


@pytest.mark.parametrize("name", PIXEL)
def test_candidates_survive_saving(name, tmp_path):
    method, task = build(name, dtype=torch.float32)
    run(method, task)
    method.finish()
    method.model.save(tmp_path / "model")
    again = PixelDDPM.load(tmp_path / "model")
    assert again.digest == method.model.digest
    base = tiny_model(task)
    base.save(tmp_path / "base")
    (tmp_path / "stored").mkdir()
    stored.save(tmp_path / "stored", base, base.digest, method.model, again.digest, str(tmp_path / "base"))
    assert families.load(tmp_path / "stored").digest == again.digest
    cond = None if task.kind == "points" else torch.tensor([2, 0])
    seeds = torch.arange(2)
    assert torch.equal(again.sample(cond, seeds, 3, 1.5), method.model.sample(cond, seeds, 3, 1.5))


@pytest.mark.parametrize("name", STEPPED)
def test_checkpoints_are_no_larger_than_planned(name):
    method, task = build(name, dtype=torch.float32)
    run(method, task, 0, 1)

    def size(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return sum(map(size, parts))

    whole = sum(p.nbytes for p in method.model.net.parameters())
    small = 1000  # counters and such
    assert size(method.state_dict()) <= checkpoint(type(method), whole, whole) + small


OTHERS = [family for family in sorted(RECORDS) if family != "pixel-ddpm"]
FAMILIES = [(name, family) for name in ALL for family in OTHERS if not unserved(resolve("method", name), family)]


@cache
def flow_latents() -> Task:
    return encoded(flow_task(), flow_model())


def build_on(name: str, family: str, **settings) -> tuple[Method, object]:
    """A method on the tiny instance of a family, in float64."""
    if RECORDS[family].model_kind == "contrastive":
        task, model = (Pairs(), TinyClip(dtype=D)) if family == "clip" else vlm_pairs(D)
        if "trunc_elem_sq" in resolve("method", name).Hyperparameters.model_fields:
            settings["trunc_elem_sq"] = None
    elif family == "edm":
        task, model = tiny_task("class"), edm_model()
        model.net.to(D)
    elif family == "flow":
        task, model = flow_latents(), flow_model()
        model.net.to(D)
    else:
        task, model = concept_task(), TinyText.tiny(dtype=D)
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
print(json.dumps([t.job_digest(*job, {folder!r}, "fresh") for job in t.GROUPS[{which!r}]]))
"""
GROUPS = {
    "every method": [(name, "pixel-ddpm" if name in PIXEL else "text-ddpm") for name in ALL],
    "every other family": [(n, f) for n, f in FAMILIES if f != "vlm" and n in PIXEL],  # trained as "clip" is
}
JOBS = [job for group in GROUPS.values() for job in group]


def instance(name: str, family: str) -> tuple[Task, Any]:
    """A task and the model to be unlearned, both of kinds that can be saved."""
    if family == "pixel-ddpm":
        return task_for(name), tiny_model(task_for(name), seed=1)
    if family == "edm":
        return tiny_task("class"), edm_model(1)
    if family == "flow":
        return flow_task(), flow_model(1)
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


@pytest.mark.parametrize("which", ["every method", pytest.param("every other family", marks=pytest.mark.slow)])
def test_a_second_trial_in_a_warm_worker_equals_a_fresh_process(tmp_path, which):
    from raysweep.train.loop import Resident

    resident, warm = Resident(), {}
    torch.manual_seed(12345)
    for job in reversed(
        GROUPS[which]
    ):  # so that every method finds a worker that others have used than in the fresh process
        warm[job] = job_digest(*job, str(tmp_path), "warm", resident)
    code = FRESH.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path), which=which)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert warm == dict(zip(GROUPS[which], json.loads(done.stdout.splitlines()[-1]), strict=True))
