"""Makes dropped candidates again, from their settings and seeds and the run's base: on a CPU bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raysweep.config.schema import ConfigError, Sweep
from raysweep.context import Context
from raysweep.dispatch.desk import Word
from raysweep.engine.cached_jobs import prepare_job, prepares
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.events import Events
from raysweep.models import families, stored
from raysweep.models.folders import CARD
from raysweep.registry import resolve, suggest
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import RunDir
from raysweep.storage.files import write_folder
from raysweep.tasks.task import Task
from raysweep.train.executors import Executor
from raysweep.train.jobs import Job, Outcome


@dataclass(frozen=True)
class Remade:
    """A candidate that was made again.

    folder: where it is; digest: its hash; expected: the hash that the run measured; changed: what its training depends on and has
    changed since the run, such as "code".
    """

    folder: Path
    digest: str
    expected: str
    changed: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether it is the candidate that the run measured, which is in its place again."""
        return self.digest == self.expected

    @property
    def difference(self) -> str:
        """A sentence on a candidate that is not the same."""
        why = (
            f"what it was made from has changed since: {', '.join(self.changed)}"
            if self.changed
            else "only a CPU, and with the same versions of all packages, gives the same bits"
        )
        return (
            f"{self.folder.name}: was made again and is another model, with the hash {self.digest}; the run measured {self.expected} "
            f"({why}). Nothing in the run was replaced; what was made is in {self.folder}"
        )


class Here:
    """Runs jobs in this process, as a slot does: on the GPU, or on one thread of the CPU. Nobody takes a job away from it."""

    word: Word = "held"

    def __init__(self, events: Events):
        self.events = events

    def owns(self) -> bool:
        """Always."""
        return True

    @property
    def progress(self) -> tuple[int, int, float]:
        """(steps done, steps in all, the method's first diagnostic) of the job at work; shown whenever the job sets it."""
        return self._progress

    @progress.setter
    def progress(self, value: tuple[int, int, float]) -> None:
        self._progress = value
        self.events.tick("steps", value[0], value[1])

    def run(self, job: Job) -> Outcome:
        import torch

        from raysweep.models.threads import one_thread
        from raysweep.train.loop import Resident, run

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with contextlib.nullcontext() if device.type == "cuda" else one_thread():
            return run(job, Resident(device), self)

    def stop(self) -> None:
        """Does nothing: no other process works for it."""


def remake_candidate(folder: RunDir, name: str, events: Events) -> Remade:
    """Makes the dropped candidate of a trial again.

    In this process, or on the cluster that RAY_ADDRESS names; trials of several workers always on Ray. Raises ConfigError if the
    trial has no candidate, or its weights are there, or its base is not; RunFailed if it cannot be trained.
    """
    sweep, trials = folder.sweep(), {t.trial: t for t in trial_table(folder, folder.run_id)}
    if name not in trials:
        raise ConfigError(f"{folder.path}: no trial {name!r}{suggest(name, sorted(trials))}")
    trial = trials[name]
    if not trial.is_complete:
        raise ConfigError(f"{folder.path}: {name} made no candidate: {trial.reason or 'it has not ended'}")
    context, manifest = Context.load(str(folder.path)), folder.read_manifest()
    if not Path(context.base).is_dir():
        raise ConfigError(
            f"{context.base}: the base of the run, the model with the hash {context.base_digest}, is not there; put it back"
        )
    if stored.is_kept(folder.candidates / name) and _is_whole(folder.candidates / name, trial):
        raise ConfigError(f"{folder.candidates / name}: is there, with the hash that the run measured: nothing to make")
    with folder.claim(sweep, manifest["digests"]):
        folder.update(state=manifest["state"])  # the run itself stays as it was
        with _executor(folder, sweep, events) as executor:
            return remake(executor, sweep, context, trial)


def _is_whole(candidate: Path, trial: Trial) -> bool:
    """Whether the weights of a trial's candidate are those that the run measured."""
    try:
        return bool(families.load(candidate).digest == trial.digest)
    except ValueError:
        return False


@contextlib.contextmanager
def _executor(folder: RunDir, sweep: Sweep, events: Events) -> Iterator[Executor]:
    if sweep.train.workers == 1 and not os.environ.get("RAY_ADDRESS"):
        yield Here(events)
        return
    with Engine.open(folder, folder.in_force(), Task.load(folder.task), events) as engine:
        yield engine.executor


def remake(executor: Executor, sweep: Sweep, context: Context, trial: Trial) -> Remade:
    """Trains the candidate of a trial again, in a folder of its own, and moves it to its place if it is the same model.

    Raises RunFailed if it cannot be trained.
    """
    folder = context.folder
    place, made = folder.candidates / trial.trial, folder.remade / trial.trial
    shutil.rmtree(made, ignore_errors=True)  # of an earlier time: it was another model
    job = context.job(sweep, vars(trial))
    if prepares(resolve("method", trial.method)):  # the cache may have lost it
        preparation = prepare_job(sweep, context, trial.method, trial.hyperparameters)
        _run(executor, preparation)
        job = replace(job, prepared=preparation.out)
    digest = _run(executor, replace(job, id=f"{job.id}-again", out=str(made))).digest
    if digest != trial.digest:
        return Remade(made, digest, trial.digest, _changed(place / CARD, job))

    def fill(temporary: Path) -> None:
        for path in made.iterdir():
            os.replace(path, temporary / path.name)
        if (place / CARD).is_file():
            shutil.copy(place / CARD, temporary / CARD)  # of the first time, with its times and paths

    write_folder(place, fill)
    made.rmdir()
    return Remade(place, digest, trial.digest)


def _run(executor: Executor, job: Job) -> Outcome:
    outcome = executor.run(job)
    if outcome.status != "ok":
        raise RunFailed(f"{job.id}: {outcome.reason}")
    return outcome


def _changed(card: Path, job: Job) -> tuple[str, ...]:
    """What a job depends on and has changed since the card of its first time."""
    before = json.loads(card.read_text())["job"]["inputs"] if card.is_file() else {}
    return tuple(sorted(name for name, digest in before.items() if job.inputs.get(name) != digest))
