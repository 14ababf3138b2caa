"""Trains candidates and prepares methods, one job after another, on a base model that stays in memory.

The same code runs in slots, in isolated groups, and without Ray. No job influences the next: weights are copied from the
base, the random state is set from the job's seed, and gradients, hooks and autocast are dropped with the copy.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from methods.base import Diverged, Method
from raysweep.dispatch.desk import Word
from raysweep.models import families, stored
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import Embeddings
from raysweep.models.folders import CARD
from raysweep.registry import resolve
from raysweep.settings import DISK
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.storage.files import checkpoint_path, digest_state, write_folder, write_json
from raysweep.storage.places import out_of_space
from raysweep.storage.recent import Recent
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task, encoded
from raysweep.train.jobs import Job, Outcome, file_digest, finished, trained
from raysweep.train.unlearning import Checkpoint, Stopped, apply, prepare, rank_and_world, trainable_copy

if TYPE_CHECKING:
    from raysweep.models.text_to_image import TextToImage
    from raysweep.models.tower import Clip

STOPPED = "stopped"  # status of a job that its worker gave up: another one does it


class Resident:
    """A worker's memory between jobs: the task, and the last job's base model with what was computed for it.

    The trials of a sweep share one base; shadow models have one each, of which only the last is kept.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._tasks: Recent[Task] = Recent(2)  # in pixels, and in latents
        self._models: Recent[tuple[Any, str]] = Recent(1)
        self._clips: Recent[Clip] = Recent(1)
        self._embeddings: Recent[Embeddings] = Recent(1)

    def task(self, folder: str) -> Task:
        """The task in a folder, its images in pixels."""
        return self._tasks.get(folder, lambda: Task.load(Path(folder)))

    def encoded(self, folder: str, model: Diffusion) -> Task:
        """The task in a folder as the model's network takes it: in latents for a latent model."""
        if not model.latent:
            return self.task(folder)
        task = self.task(folder)
        return self._tasks.get(
            (folder, model.encoder_digest), lambda: encoded(task, model, Path(folder).parent / "latents")
        )

    def model(self, job: Job, task: Task) -> Any:
        """A copy of the job's base model, which the job may change; freshly initialised for a job without a base."""
        if job.base is None:
            return families.build(task, derive_seed("init", job.seed), job.frozen).to(self.device)
        return trainable_copy(self._base(job.base, job)[0], job.seed, job.modules, job.lora)

    def save(self, folder: Path, job: Job, model: Any, digest: str) -> None:
        """Writes a job's result, whose hash is `digest`, into a new folder: whole, or as what differs from the job's base."""
        if job.base is None or not job.as_delta:
            model.save(folder)
        else:
            stored.save(folder, *self._base(job.base, job), model, digest, job.base)

    def _base(self, folder: str, job: Job) -> tuple[Any, str]:
        """(a job's base model, its hash); raises ValueError if it is not the model that the job was made for."""

        def read() -> tuple[Any, str]:
            model = families.load(folder).to(self.device)
            return model, model.digest

        model, digest = self._models.get(folder, read)
        expected = job.inputs.get("base", digest)
        if digest != expected:
            raise ValueError(
                f"{folder}: has the hash {digest}, but the base had {expected}: it has changed; put it back"
            )
        return model, digest

    def for_method(self, job: Job, method: type[Method], settings: Any) -> tuple[Any, Task]:
        """(a model that the method may change, the task in the form that the method takes: pixels or latents)."""
        task = self.task(job.task)
        model = self.model(job, task)
        if method.on_images(settings):
            if task.clip is not None:
                from raysweep.models.tower import Clip

                clip = task.clip
                families.with_tower(model, self._clips.get(clip, lambda: Clip.load(clip)))
            return model, task
        if job.base is not None and resolve("family", model.family).text_to_image:
            self._embed_prompts(f"{job.task} {job.base}", model, task)
        return model, self.encoded(job.task, model)

    def _embed_prompts(self, key: str, model: TextToImage, task: Task) -> None:
        """Gives the model the embeddings of the task's prompts, unless its text encoders train."""
        if any(p.requires_grad for encoder in model.encoders for p in encoder.parameters()):
            return

        def embeddings() -> Embeddings:
            conditions = [s.cond for s in task.splits.values() if s.cond is not None]
            return Embeddings.of(model, torch.cat([*conditions, model.unconditional(1).cpu()]))

        model.embeddings = self._embeddings.get(key, embeddings)


class Supervisor(Protocol):
    """What a job's holder knows about it.

    word: "held", "leave" if the worker should end soon, "lost" if another worker has the job. progress: (steps done, steps in
    all, the method's first diagnostic), which the job sets.
    """

    word: Word
    progress: Any

    def owns(self) -> bool:
        """Whether the job is still the worker's."""


def run(job: Job, resident: Resident, supervisor: Supervisor | None = None) -> Outcome:
    """Runs a job and saves its result, unless that is there already. Errors of the method become a failed outcome.

    A job of one worker whose supervisor lets it leave, or has lost it, ends with the status `STOPPED`.
    """
    before = finished(job)
    if before is not None:
        return before
    started = time.monotonic()
    torch.manual_seed(job.seed)  # the process is a worker of jobs alone, so nothing restores it
    try:
        method_class: type[Method] = resolve("method", job.method)
        settings = method_class.Hyperparameters(**job.hyperparameters)
        model, task = resident.for_method(job, method_class, settings)
        work = _Work(job, method_class, settings, model, task, resident, supervisor, started)
        return work.prepare() if job.kind == "prepare" else work.train()
    except Stopped as stop:
        return Outcome(STOPPED, str(stop))
    except Diverged as error:
        return Outcome("failed", str(error), seconds=time.monotonic() - started)
    except Exception as error:  # any exception of a method must end as a recorded failure of its trial alone
        seconds, full = time.monotonic() - started, out_of_space(error)
        reason = full or f"{type(error).__name__}: {error}"
        return Outcome("failed", reason, seconds=seconds, limit=DISK if full else "")


@dataclass(frozen=True)
class _Work:
    """A job with all that it needs, loaded. started: when, by the monotonic clock."""

    job: Job
    method: type[Method]
    settings: Any
    model: Any
    task: Task
    resident: Resident
    supervisor: Supervisor | None
    started: float

    def prepare(self) -> Outcome:
        job = self.job
        tensors = prepare(self.method, self.settings, self.model, self.task, job.seed)
        outcome = Outcome("ok", digest=digest_state(tensors), seconds=time.monotonic() - self.started)
        if self.publishes():
            out = Path(job.out)
            save_tensors(out, tensors)
            write_json(out.with_suffix(".json"), self.card(outcome) | {"sha256": file_digest(out)})
        return outcome

    def train(self) -> Outcome:
        job, supervisor = self.job, self.supervisor
        prepared = {} if job.prepared is None else load_tensors(Path(job.prepared))
        checkpoint = Checkpoint(checkpoint_path(Path(job.out)), job.digest, job.checkpoint_s)
        result = apply(
            self.method,
            self.settings,
            self.model,
            self.task,
            prepared,
            job.seed,
            job.precision,
            checkpoint,
            None if supervisor is None else lambda *progress: setattr(supervisor, "progress", progress),
            None if supervisor is None or rank_and_world()[1] > 1 else lambda: supervisor.word,
        )
        if job.lora is not None:
            result.model.merge()
        seconds = time.monotonic() - self.started
        outcome = Outcome("ok", "", result.model.digest, seconds, result.step_seconds, result.diagnostics)
        if not self.publishes():
            return outcome

        def fill(folder: Path) -> None:
            self.resident.save(folder, job, result.model, outcome.digest)
            write_json(folder / CARD, job.card | self.card(outcome))

        write_folder(Path(job.out), fill, lambda folder: trained(job, folder) is not None)
        checkpoint.path.unlink(missing_ok=True)
        return finished(job) or outcome  # of another worker, if it was given the same job and ended first

    def publishes(self) -> bool:
        """Whether this rank writes the result; raises Stopped if the job is no longer the worker's."""
        if rank_and_world()[0] > 0:
            return False
        if self.supervisor is not None and not self.supervisor.owns():
            raise Stopped("lost")
        return True

    def card(self, outcome: Outcome) -> dict[str, Any]:
        """What the result's card says of the job."""
        return {"job": asdict(self.job), "job_digest": self.job.digest, "outcome": asdict(outcome)}
