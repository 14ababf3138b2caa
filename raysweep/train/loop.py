"""What a train worker does: one job after another, on a model that it keeps in memory.

A job names a method, its hyperparameters, a seed, the folder of the task and of the base model, and where the candidate
goes. The same code runs in a warm group, in a group made for one trial, and without Ray. Nothing of one job reaches the
next: weights are copied from the base, the random state is set from the job's seed, gradients, hooks and autocast die
with the copy.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from methods.base import Diverged, Method
from raysweep.models import families
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import Embeddings
from raysweep.registry import resolve
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.storage.files import checkpoint_path, digest_state, write_file, write_folder, write_json
from raysweep.storage.recent import Recent
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task, encoded
from raysweep.train.jobs import CARD, Job, Outcome, file_digest, finished

if TYPE_CHECKING:
    from raysweep.models.latent import LatentText
    from raysweep.models.tower import Clip

Progress = Callable[[str, int, int, float], None]
TELL_EVERY = 25  # steps between two reports of progress; each one waits for the device


class Resident:
    """What a worker keeps between jobs: the task, and the base model of the last job with what was computed for it.

    The trials of a sweep share one base; shadow models have a base each, of which only the last stays.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._tasks: Recent[Task] = Recent(2)  # as images, and as latents
        self._models: Recent[Any] = Recent(1)
        self._clips: Recent[Clip] = Recent(1)
        self._embeddings: Recent[Embeddings] = Recent(1)

    def task(self, folder: str) -> Task:
        return self._tasks.get(folder, lambda: Task.load(Path(folder)))

    def encoded(self, folder: str, model: Diffusion) -> Task:
        """The task as the model's network takes it."""
        if not model.latent:
            return self.task(folder)
        task = self.task(folder)
        return self._tasks.get(
            (folder, model.encoder_digest), lambda: encoded(task, model, Path(folder).parent / "latents")
        )

    def model(self, job: Job, task: Task) -> Any:
        """A copy of the job's base model that the job may change."""
        if job.base is None:
            return families.build(task, derive_seed("init", job.seed), job.frozen).to(self.device)
        base = job.base
        kept = self._models.get(base, lambda: families.load(base).to(self.device))
        model = kept.with_net(copy.deepcopy(kept.net))
        if job.modules:
            model.train_only(job.modules)
        if job.lora is not None:
            model.adapt(job.lora["rank"], job.lora["alpha"], derive_seed("adapter", job.seed))
        return model

    def for_method(self, job: Job, method: type[Method], settings: Any) -> tuple[Any, Task]:
        """What a method works on: a model that it may change, and the rows as it wants them."""
        task = self.task(job.task)
        model = self.model(job, task)
        if method.on_images(settings):
            if task.clip is not None:
                from raysweep.models.tower import Clip

                clip = task.clip
                families.with_tower(model, self._clips.get(clip, lambda: Clip.load(clip)))
            return model, task
        if job.base is not None and resolve("family", model.family).text_to_image:
            self._remember(f"{job.task} {job.base}", model, task)
        return model, self.encoded(job.task, model)

    def _remember(self, key: str, model: LatentText, task: Task) -> None:
        """Lets a model whose text encoders do not change look up the task's prompts."""
        if any(p.requires_grad for encoder in model.encoders for p in encoder.parameters()):
            return

        def embeddings() -> Embeddings:
            conditions = [s.cond for s in task.splits.values() if s.cond is not None]
            return Embeddings.of(model, torch.cat([*conditions, model.unconditional(1).cpu()]))

        model.embeddings = self._embeddings.get(key, embeddings)


def run(job: Job, resident: Resident, progress: Progress | None = None) -> Outcome:
    """Does a job, unless its result is there already. Faults of the method become an outcome with a reason."""
    rank, world = _place()
    before = finished(job)
    if before is not None:
        return before
    started = time.monotonic()
    torch.manual_seed(job.seed)
    try:
        method_class: type[Method] = resolve("method", job.method)
        settings = method_class.Hyperparameters(**job.hyperparameters)
        model, task = resident.for_method(job, method_class, settings)
        if job.kind == "prepare":
            return _prepare(job, method_class, settings, model, task, rank, started)
        prepared = {} if job.prepared is None else load_tensors(Path(job.prepared))
        method = method_class(model, settings, prepared, task.goal)
        step_seconds, diagnostics = _train(job, method, task, rank, world, progress)
        diagnostics |= method.finish()
        if job.lora is not None:
            method.model.merge()  # type: ignore[attr-defined]
    except Diverged as error:
        return Outcome("failed", str(error), seconds=time.monotonic() - started)
    except Exception as error:  # whatever a method raises must end as a recorded failure of its trial alone
        return Outcome("failed", f"{type(error).__name__}: {error}", seconds=time.monotonic() - started)
    digest = method.model.digest  # type: ignore[attr-defined]
    outcome = Outcome("ok", "", digest, time.monotonic() - started, step_seconds, diagnostics)
    if rank == 0:
        card = job.card | {"job": asdict(job), "job_digest": job.digest, "outcome": asdict(outcome)}

        def fill(folder: Path) -> None:
            method.model.save(folder)  # type: ignore[attr-defined]
            write_json(folder / CARD, card)

        write_folder(Path(job.out), fill)
        checkpoint_path(Path(job.out)).unlink(missing_ok=True)
    return outcome


def _train(
    job: Job, method: Method, task: Task, rank: int, world: int, progress: Progress | None
) -> tuple[float, dict[str, float]]:
    """Steps the method to its end, from its last checkpoint if there is one."""
    path = checkpoint_path(Path(job.out))
    state = _last_checkpoint(path, job, next(iter(method.model.net.parameters())).device)
    if state is not None:
        method.load_state_dict(state)
    seed, saved, scalars = derive_seed("trial", job.seed), time.monotonic(), dict[str, torch.Tensor]()
    steps, began, first = method.steps, time.monotonic(), method.done
    weight = next(iter(method.model.net.parameters()))
    while method.done < steps:
        batch = task.batch(method.draws(), seed, method.done, rank, world)
        torch.manual_seed(derive_seed("dropout", job.seed, method.done, rank))  # the one draw of the network's own
        # weights and optimiser stay in single precision; nothing is cached, since a step may change weights more than once
        with torch.autocast(weight.device.type, torch.bfloat16, job.precision == "bf16", cache_enabled=False):
            scalars = method.step({name: rows.to(weight.device, weight.dtype) for name, rows in batch.items()})
        if progress is not None and rank == 0 and (method.done % TELL_EVERY == 0 or method.done == steps):
            progress(job.id, method.done, steps, float(next(iter(scalars.values()), 0.0)))
        if rank == 0 and time.monotonic() - saved > job.checkpoint_s:
            left = method.state_dict() | {"job_digest": job.digest}
            write_file(path, partial(torch.save, left))
            saved = time.monotonic()
    done = max(1, method.done - first)
    return (time.monotonic() - began) / done, {f"last/{k}": float(v) for k, v in scalars.items()}


def _prepare(
    job: Job, method_class: type[Method], settings: Any, model: Any, task: Task, rank: int, started: float
) -> Outcome:
    # every rank works on all rows, and rank 0 keeps the result
    tensors = method_class.prepare(model, task, derive_seed("prepare", job.seed), settings)
    outcome = Outcome("ok", digest=digest_state(tensors), seconds=time.monotonic() - started)
    if rank == 0:
        out = Path(job.out)
        save_tensors(out, tensors)
        card = {"job": asdict(job), "job_digest": job.digest, "outcome": asdict(outcome), "sha256": file_digest(out)}
        write_json(out.with_suffix(".json"), card)
    return outcome


def _last_checkpoint(path: Path, job: Job, device: torch.device) -> dict[str, Any] | None:
    """The state that the job was left in, or None: there is none, it is another job's, or it cannot be read. Without it the job
    begins again, and comes to the same."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except (RuntimeError, EOFError, UnpicklingError):
        return None
    return state if state.pop("job_digest", None) == job.digest else None


def _place() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
