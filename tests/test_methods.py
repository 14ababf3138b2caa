"""Every method goes through the same table of tests, on tiny real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT, batch_for, tiny_model, tiny_task

from methods.base import Diverged, Method
from methods.finetune import Finetune
from methods.graddiff import GradDiff
from methods.neggrad import NegGrad
from methods.rgd import RGD
from methods.salun import SalUn, saliency_mask
from raysweep.registry import METHODS, resolve

D = torch.float64
SETTINGS: dict[str, dict] = {
    "rgd": {"trunc_elem_sq": None},
    "retrain": {"split": "retain", "warmup": 2},
    "salun": {"alpha": 1.0},
    "siss": {"rho": 0.5},
    "siss_no_is": {"rho": 0.5},
}
ALL = sorted(METHODS)


def task_for(name: str):
    return tiny_task("class" if name == "salun" else "points")


def build(name: str, task=None, dtype=D, seed: int = 0, **settings) -> tuple[Method, object]:
    task = task or task_for(name)
    cls = resolve("method", name)
    model = tiny_model(task, seed, dtype)
    hp = cls.Hyperparameters(**{"lr": 1e-3, "steps": 4, "batch_size": 12, **SETTINGS.get(name, {}), **settings})
    return cls(model, hp, cls.prepare(model, task, 0)), task


def weights(method: Method) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in method.params])


def run(method: Method, task, start: int = 0, stop: int = 4) -> torch.Tensor:
    for step in range(start, stop):
        method.step(batch_for(method, task, step))
    return weights(method)


@pytest.mark.parametrize("name", ALL)
def test_describes_itself(name):
    cls = resolve("method", name)
    assert cls.name == name
    assert "arXiv" in (cls.__doc__ or "") + cls.source
    assert cls.needs <= {"forget", "retain", "train"}
    assert cls.forwards_per_step > 0
    for field, info in cls.Hyperparameters.model_fields.items():
        assert info.description, f"{name}.{field} has no description"


@pytest.mark.parametrize("name", ALL)
def test_steps_change_the_weights_and_repeat_exactly(name):
    method, task = build(name)
    before = weights(method)
    after = run(method, task)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(*build(name)))
    diagnostics = method.finish()
    assert diagnostics["distance"] > 0


@pytest.mark.parametrize("name", ALL)
def test_resume_is_bit_exact(name):  # T45, R2
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
    assert torch.equal(run(second, task, 2, 4), expected)


def through_a_file(state):
    """Through a file, as a checkpoint goes, loaded without running code."""
    import io

    out = io.BytesIO()
    torch.save(state, out)
    out.seek(0)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", ALL)
def test_nan_is_named(name):
    method, task = build(name)
    with torch.no_grad():
        method.params[0].fill_(float("nan"))
    with pytest.raises(Diverged, match="not finite"):
        method.step(batch_for(method, task))


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
import test_methods as t
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{meet}", rank=rank, world_size=2)
out = {{}}
for name in t.ALL:
    for dtype in (torch.float64, torch.float32):
        method, task = t.build(name, dtype=dtype, lr=1e-4)
        for step in range(4):
            method.step(t.batch_for(method, task, step, rank=rank, world=2))
        out[f"{{name}}-{{dtype}}"] = t.weights(method)
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_two_workers_equal_one(name, dtype, tolerance, two_workers):  # S9
    alone = run(*build(name, dtype=dtype, lr=1e-4))
    together = two_workers[f"{name}-{dtype}"]
    assert float((alone - together).norm() / alone.norm()) < tolerance


FRESH = """
import sys, json
sys.path[:0] = [{root!r}, {tests!r}]
import test_methods as t
print(json.dumps({{name: t.job_digest(name, {folder!r}, "fresh") for name in t.ALL}}))
"""


def job_digest(name: str, folder: str, tag: str, resident=None) -> str:
    """The hash of the candidate that a job makes, through the worker's own code."""
    from raysweep.train.jobs import Job
    from raysweep.train.loop import Resident
    from raysweep.train.loop import run as run_job

    path, resident = Path(folder), resident or Resident()
    task_dir, base = path / task_for(name).kind / "task", path / task_for(name).kind / "base"
    if not base.exists():
        task_dir.mkdir(parents=True)
        task_for(name).save(task_dir)
        tiny_model(task_for(name), seed=1).save(base)
    common = {"method": name, "seed": 7, "task": str(task_dir), "base": str(base)}
    prepared = path / tag / f"{name}.safetensors"
    outcome = run_job(Job(id="p", kind="prepare", hyperparameters={}, out=str(prepared), **common), resident)
    assert outcome.status == "ok", outcome.reason
    settings = {"lr": 1e-3, "steps": 3, "batch_size": 8, **SETTINGS.get(name, {})}
    job = Job(
        id="t", kind="train", hyperparameters=settings, out=str(path / tag / name), prepared=str(prepared), **common
    )
    outcome = run_job(job, resident)
    assert outcome.status == "ok", outcome.reason
    return outcome.digest


def test_a_second_trial_in_a_warm_worker_equals_a_fresh_process(tmp_path):
    from raysweep.train.loop import Resident

    resident = Resident()
    for name in reversed(ALL):  # every method finds a worker that others have used
        job_digest(name, str(tmp_path), "first", resident)
    torch.manual_seed(12345)
    warm = {name: job_digest(name, str(tmp_path), "second", resident) for name in ALL}
    code = FRESH.format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert warm == json.loads(done.stdout.strip().splitlines()[-1])


def test_finetune_lowers_and_neggrad_raises_their_loss():
    for name, sign in (("finetune", -1), ("neggrad", 1)):
        method, task = build(name, lr=3e-3, clip_norm=None)
        batch = batch_for(method, task)
        (key,) = list(method.step(batch))
        losses = [method.step(batch)[key] for _ in range(8)]
        assert sign * (losses[-1] - losses[0]) > 0


def test_superfactor_cancels_under_clipping():  # S8
    one, task = build("neggrad", clip_norm=1e-2)
    three, _ = build("neggrad", clip_norm=1e-2, superfactor=3.0)
    torch.testing.assert_close(run(one, task), run(three, task), rtol=1e-5, atol=1e-7)


def test_rgd_equals_graddiff_without_conflict_and_differs_with_it():  # T24, T11
    task = task_for("rgd")
    rgd, _ = build("rgd", task, retain_pass="minibatch")
    plain, _ = build("graddiff", task, lam=5.0)
    f, r = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([2.0, 0.5], dtype=D)
    assert torch.equal(rgd.combine(f, r), plain.combine(f, r))
    assert not torch.equal(rgd.combine(f, -r), plain.combine(f, -r))
    per_tensor, _ = build("rgd", task, granularity="per_tensor")
    g_f, g_r = torch.randn(2, len(weights(rgd)), dtype=D)
    delta = per_tensor.combine(g_f, g_r)
    assert float(delta @ g_f) > -1e-9
    assert float(delta @ g_r) > -1e-9


def test_truncation_stops_the_ascent_alone():  # T16 to T18
    task = task_for("graddiff")
    batches = {}
    for name, settings in {
        "plain": {}, "alpha inf": {"trunc_elem_sq": 1e9}, "alpha 0": {"trunc_elem_sq": 0.0}, "m": {"trunc_batch_loss": 1e-9},
        "m high": {"trunc_batch_loss": 1e9},
    }.items():  # fmt: skip
        method, _ = build("graddiff", task, **settings)
        batch = batch_for(method, task)
        batches[name] = (method.forget_gradient(batch["forget"])[0], method.direction(batch)[1]["retain_loss"])
    for same in ("alpha inf", "m high"):
        assert torch.equal(batches["plain"][0], batches[same][0])
    for stopped in ("alpha 0", "m"):
        assert not batches[stopped][0].any()
    assert len({retain for _, retain in batches.values()}) == 1


def test_full_retain_pass_is_the_mean_over_the_set():  # T22
    task = task_for("rgd")
    method, _ = build("rgd", task, retain_pass="full", retain_per_group=3)
    rows = batch_for(method, task)["retain"]
    assert rows.total == len(rows.x) == 18
    halves = [task.batch(method.draws(), 3, 0, rank, 2)["retain"] for rank in range(2)]
    assert torch.equal(torch.cat([h.x for h in halves]), rows.x.float())
    assert torch.equal(torch.cat([h.seeds for h in halves]), rows.seeds)


def test_salun_moves_salient_weights_only():  # T30
    method, task = build("salun", fraction=0.3, weight_decay=0.0)
    before, mask = weights(method), method.mask.bool()
    after = run(method, task)
    assert torch.equal(before[~mask], after[~mask])
    assert bool((before[mask] != after[mask]).any())


def test_saliency_masks():  # T27 to T29, T31
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


def test_salun_stand_ins():
    for relabel, allowed in (("next", {3}), ("override", {4}), ("random", {0, 1, 3, 4, 5})):
        method, task = build("salun", relabel=relabel, batch_size=64)
        assert set(method.stand_in(batch_for(method, task)["forget"]).tolist()) <= allowed
    relabelled, task = build("salun")
    relabelled.stand_in = lambda rows: rows.cond  # T32: the same class asks for no change
    assert relabelled.direction(batch_for(relabelled, task))[1]["relabel_loss"] == pytest.approx(0.0, abs=1e-20)


def test_names_are_their_files():
    for cls in (Finetune, GradDiff, NegGrad, RGD, SalUn):
        assert cls.__module__ == f"methods.{cls.name}"
