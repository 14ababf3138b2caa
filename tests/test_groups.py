"""Worker groups without Ray's processes: what one attempt leaves for the next, and what a worker keeps between jobs."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_task

from raysweep.config.reader import load
from raysweep.engine import trial
from raysweep.models.pixel import PixelDDPM
from raysweep.storage.files import checkpoint_path
from raysweep.train import groups, loop
from raysweep.train.jobs import Job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    task = tiny_task()
    (folder / "task").mkdir()
    task.save(folder / "task")
    tiny_model(task).save(folder / "base")
    return folder


def job(place, name: str, **more) -> Job:
    given = {"base": str(place / "base")} | more
    return Job(
        id=name, kind="train", method="finetune", hyperparameters={"lr": 1e-3, "steps": 3, "batch_size": 8}, seed=1,
        task=str(place / "task"), out=str(place / "out" / name), **given,
    )  # fmt: skip


class Trainer:
    """Stands in for Ray's TorchTrainer: its worker runs out of time `slow` times and is brought back each time."""

    slow = 0

    def __init__(self, worker, *, train_loop_config, run_config, **_):
        self.worker, self.config, self.name = worker, train_loop_config, run_config.name

    def fit(self):
        for _ in range(Trainer.slow):
            with pytest.raises(TimeoutError):
                self.worker(self.config)
        Trainer.slow = 0
        return SimpleNamespace(return_value=self.worker(self.config))


def test_a_job_that_ran_out_of_time_can_be_asked_for_again(place, tmp_path, monkeypatch):
    """Under `isolated`: the mark of one attempt says nothing about later ones, which may have a longer budget."""
    budgets = []

    def budgeted(job, report):
        budgets.append(job.budget_s)
        if job.budget_s < 10:
            report(None)  # what the timer does before it ends the process
            raise TimeoutError
        return contextlib.nullcontext()

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(groups, "_budget", budgeted)
    monkeypatch.setattr(groups, "_worker_setup", lambda: (loop.Resident(), 0, True))
    storage = tmp_path / "train"
    Trainer.slow = 1
    first = groups._fit._function(job(place, "slow", budget_s=3), None, str(storage))
    assert (first.status, first.reason) == ("failed", "exceeded its budget of 3 s")
    assert budgets == [3]  # the worker that came back did not try for another 3 s
    again = groups._fit._function(job(place, "slow", budget_s=30), None, str(storage))
    assert again.status == "ok", again.reason
    assert not [p for p in (*place.rglob("*"), *tmp_path.rglob("*")) if "overdue" in p.name]


def test_whatever_becomes_of_its_report_an_overdue_worker_ends(monkeypatch, place):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def refused(_):
        raise OSError(28, "No space left on device")

    with groups._budget(job(place, "late", budget_s=0.01), refused):
        for _ in range(500):
            if ended:
                break
            time.sleep(0.01)
    assert ended == [70]


def test_a_job_goes_on_from_its_checkpoint_and_past_one_that_cannot_be_read(place):
    whole = loop.run(job(place, "whole"), loop.Resident())
    cut = job(place, "cut", checkpoint_s=0.0)

    def killed(name, done, steps, value):
        raise KeyboardInterrupt

    path = checkpoint_path(place / "out" / "cut")
    with pytest.raises(KeyboardInterrupt):
        loop.run(cut, loop.Resident(), killed)
    assert torch.load(path, weights_only=True)["job_digest"] == cut.digest
    path.write_bytes(path.read_bytes()[:200])
    outcome = loop.run(cut, loop.Resident())
    assert (outcome.status, outcome.digest) == ("ok", whole.digest), outcome.reason
    assert not path.exists()


def test_a_worker_keeps_the_last_base_only(place, monkeypatch):
    """As under `raysweep shadows`, where each job has a base of its own."""
    kept, load = [], loop.families.load

    def loaded(folder):
        kept.append(weakref.ref(model := load(folder)))
        return model

    monkeypatch.setattr(loop.families, "load", loaded)
    worker, digests = loop.Resident(), []
    for turn in range(2):
        for seed in range(3):
            base = place / f"base-{seed}"
            if not turn:
                tiny_model(tiny_task(), seed).save(base)
            digests.append(loop.run(job(place, f"of-{seed}-{turn}", base=str(base)), worker).digest)
    gc.collect()
    assert sum(r() is not None for r in kept) == 1
    assert digests[:3] == digests[3:]
    assert len(set(digests)) == 3
    assert loop.run(job(place, "fresh", base=str(place / "base-1")), loop.Resident()).digest == digests[1]


def test_dropout_after_a_checkpoint_is_that_of_a_run_without_one(place):
    config = tiny_task().model
    PixelDDPM.build(config | {"unet": config["unet"] | {"dropout": 0.5}}, 1).save(place / "dropping")
    base = {"base": str(place / "dropping")}
    whole = loop.run(job(place, "whole-dropping", **base), loop.Resident())
    torch.rand(7)  # what else the process draws
    cut = job(place, "cut-dropping", checkpoint_s=0.0, **base)

    def killed(name, done, steps, value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(cut, loop.Resident(), killed)
    assert torch.load(checkpoint_path(place / "out" / "cut-dropping"), weights_only=True)["done"] == 2
    outcome = loop.run(cut, loop.Resident())
    assert (outcome.status, outcome.digest) == ("ok", whole.digest), outcome.reason


def test_two_runs_of_one_config_share_a_cluster(tmp_path, monkeypatch):
    """Each trial asks the actors of its own run: names of actors hold for the whole cluster."""
    asked = []
    monkeypatch.setattr(trial.ray, "get_actor", lambda name, namespace: asked.append(name) or name)
    sweep = load(None, ())
    for folder in ("mine", "yours", "mine"):
        trial.make_executor(str(tmp_path / folder), "digits-0123", sweep, plan=None)
    assert asked[0] == asked[2] != asked[1]
    assert asked[0] == groups.actor_name("broker", tmp_path / "mine", "digits-0123")
