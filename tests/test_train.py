"""Train workers without Ray's processes: budgets, checkpoints, and what a worker keeps between jobs."""

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
from raysweep.dispatch.holder import ended_after
from raysweep.engine import trial
from raysweep.models.pixel import PixelDDPM
from raysweep.settings import DISK
from raysweep.storage.files import checkpoint_path
from raysweep.train import executors, loop, worker
from raysweep.train.broker import actor_name
from raysweep.train.jobs import Job


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a task and a base model."""
    folder = tmp_path_factory.mktemp("train")
    task = tiny_task()
    (folder / "task").mkdir()
    task.save(folder / "task")
    tiny_model(task).save(folder / "base")
    return folder


def job(home, name: str, **settings) -> Job:
    return Job(
        id=name,
        kind="train",
        method="finetune",
        hyperparameters={"lr": 1e-3, "steps": 3, "batch_size": 8},
        seed=1,
        task=str(home / "task"),
        out=str(home / "out" / name),
        **{"base": str(home / "base")} | settings,
    )


class Trainer:
    """Replaces Ray's TorchTrainer: its worker runs out of time `slow` times and is started again each time."""

    slow = 0

    def __init__(self, loop, *, train_loop_config, run_config, **_):
        self.loop, self.config, self.name = loop, train_loop_config, run_config.name

    def fit(self):
        for _ in range(Trainer.slow):
            with pytest.raises(TimeoutError):
                self.loop(self.config)
        Trainer.slow = 0
        return SimpleNamespace(return_value=self.loop(self.config))


class Interrupting:
    """A supervisor in whose process the user presses Ctrl-C at the first report."""

    word = "held"

    def __setattr__(self, name, value):
        raise KeyboardInterrupt

    def owns(self):
        return True


class Supervisor:
    """A supervisor that says `word` after so many looks, and whether the job is still the worker's."""

    def __init__(self, word="held", after=0, owned=True):
        self.says, self.after, self.owned, self.progress = word, after, owned, None

    @property
    def word(self):
        self.after -= 1
        return self.says if self.after < 0 else "held"

    def owns(self):
        return self.owned


def test_a_job_that_ran_out_of_time_can_be_submitted_again(home, tmp_path, monkeypatch):
    """In an isolated group: the mark of one attempt says nothing about later ones, which may have a longer budget."""
    budgets = []

    def budget(seconds, report):
        budgets.append(seconds)
        if seconds < 10:
            report()  # as the timer does before it ends the process
            raise TimeoutError
        return contextlib.nullcontext()

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(worker, "ended_after", budget)
    monkeypatch.setattr(worker, "set_up", lambda: (loop.Resident(), 0))
    storage = tmp_path / "train"
    Trainer.slow = 1
    first = executors.fit(job(home, "slow", budget_s=3), None, str(storage))
    assert (first.status, first.reason) == ("failed", "exceeded its budget of 3 s")
    assert budgets == [3]  # the worker that was started again did not try for another 3 s
    again = executors.fit(job(home, "slow", budget_s=30), None, str(storage))
    assert again.status == "ok", again.reason
    assert not [p for p in (*home.rglob("*"), *tmp_path.rglob("*")) if "overdue" in p.name]


def test_an_overdue_worker_ends_even_if_its_report_fails(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def refuse():
        raise OSError(28, "No space left on device")

    with ended_after(0.01, refuse):
        for _ in range(500):
            if codes:
                break
            time.sleep(0.01)
    assert codes == [70]


def test_a_job_resumes_from_its_checkpoint_and_restarts_if_that_cannot_be_read(home):
    whole = loop.run(job(home, "whole"), loop.Resident())
    cut = job(home, "cut", checkpoint_s=0.0)
    path = checkpoint_path(home / "out" / "cut")
    with pytest.raises(KeyboardInterrupt):
        loop.run(cut, loop.Resident(), Interrupting())
    assert torch.load(path, weights_only=True)["job_digest"] == cut.digest
    path.write_bytes(path.read_bytes()[:200])
    outcome = loop.run(cut, loop.Resident())
    assert (outcome.status, outcome.digest) == ("ok", whole.digest), outcome.reason
    assert not path.exists()


def test_a_worker_that_leaves_writes_a_checkpoint_from_which_another_goes_on(home):
    whole = loop.run(job(home, "stays", checkpoint_s=600.0), loop.Resident())
    given = job(home, "leaves", checkpoint_s=600.0)
    assert loop.run(given, loop.Resident(), Supervisor("leave", after=1)).status == loop.STOPPED
    assert torch.load(checkpoint_path(home / "out" / "leaves"), weights_only=True)["done"] == 2
    outcome = loop.run(given, loop.Resident(), Supervisor())
    assert (outcome.status, outcome.digest) == ("ok", whole.digest), outcome.reason


def test_a_worker_that_lost_its_job_writes_nothing(home):
    """Neither between two steps nor at the end."""
    for name, supervisor in (("lost", Supervisor("lost", after=1)), ("late", Supervisor(owned=False))):
        given = job(home, name, checkpoint_s=600.0)
        assert loop.run(given, loop.Resident(), supervisor).status == loop.STOPPED
        assert not checkpoint_path(home / "out" / name).exists()
        assert not (home / "out" / name).exists()


def test_a_full_disk_is_named_and_the_trial_can_be_tried_again(home, monkeypatch):
    def full(self, folder, *_):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(loop.Resident, "save", full)
    outcome = loop.run(job(home, "full"), loop.Resident())
    assert (outcome.status, outcome.limit) == ("failed", DISK)
    assert "No space left on device" in outcome.reason
    assert not (home / "out" / "full").exists()


def test_a_worker_keeps_only_its_last_base(home, monkeypatch):
    """As `raysweep shadows` needs it, where each job has another base."""
    models, load = [], loop.families.load

    def record(folder):
        models.append(weakref.ref(model := load(folder)))
        return model

    monkeypatch.setattr(loop.families, "load", record)
    resident, digests = loop.Resident(), []
    for turn in range(2):
        for seed in range(3):
            base = home / f"base-{seed}"
            if not turn:
                tiny_model(tiny_task(), seed).save(base)
            digests.append(loop.run(job(home, f"of-{seed}-{turn}", base=str(base)), resident).digest)
    gc.collect()
    assert sum(reference() is not None for reference in models) == 1
    assert digests[:3] == digests[3:]
    assert len(set(digests)) == 3
    assert loop.run(job(home, "fresh", base=str(home / "base-1")), loop.Resident()).digest == digests[1]


def test_dropout_after_a_checkpoint_is_that_of_an_uninterrupted_run(home):
    config = tiny_task().model
    PixelDDPM.build(config | {"unet": config["unet"] | {"dropout": 0.5}}, 1).save(home / "dropping")
    base = {"base": str(home / "dropping")}
    whole = loop.run(job(home, "whole-dropping", **base), loop.Resident())
    torch.rand(7)  # the process draws other random numbers in between
    cut = job(home, "cut-dropping", checkpoint_s=0.0, **base)
    with pytest.raises(KeyboardInterrupt):
        loop.run(cut, loop.Resident(), Interrupting())
    assert torch.load(checkpoint_path(home / "out" / "cut-dropping"), weights_only=True)["done"] == 2
    outcome = loop.run(cut, loop.Resident())
    assert (outcome.status, outcome.digest) == ("ok", whole.digest), outcome.reason


def test_two_runs_of_one_config_share_a_cluster(tmp_path, monkeypatch):
    """Each trial calls the actors of its own run: names of actors are shared by the whole cluster."""
    asked = []
    monkeypatch.setattr(trial.ray, "get_actor", lambda name, namespace: asked.append(name) or name)
    sweep = load(None, ())
    for folder in ("mine", "yours", "mine"):
        trial.make_executor(str(tmp_path / folder), "digits-0123", sweep, plan=None)
    assert asked[0] == asked[2] != asked[1]
    assert asked[0] == actor_name("broker", tmp_path / "mine", "digits-0123")
