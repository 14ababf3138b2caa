"""Updates of methods against their formulas, and the passes and the memory that they take."""

from __future__ import annotations

import pytest
import torch
from method_table import STEPPED, D, build, run, task_for, weights
from tiny import (
    batch_for,
    tiny_model,
    tiny_task,
)
from torch.utils._python_dispatch import TorchDispatchMode

from methods import gradients
from methods.finetune import Finetune
from methods.graddiff import GradDiff
from methods.neggrad import NegGrad
from methods.rgd import RGD, restricted_direction
from methods.salun import SalUn, saliency_mask
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import resolve


class NoWaiting(TorchDispatchMode):
    """Refuses to bring a number to the host, which on a GPU waits for everything before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in STEPPED if n not in ("advunlearn", "esd", "sfd", "sfd_two_stage")])
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
