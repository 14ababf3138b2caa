"""Applies a method to a model: what train workers do for each trial, and `raysweep.unlearn` in any process. No Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from methods.base import Method
from raysweep.models import families
from raysweep.models.threads import one_thread
from raysweep.registry import resolve, suggest, unserved
from raysweep.storage.files import write_file
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task, encoded

Progress = Callable[[int, int, float], None]  # of (steps done, steps in all, the method's first diagnostic)
Interrupt = Callable[[], str]  # "leave": write a checkpoint and stop; "lost": stop; anything else: go on
REPORT_EVERY = 25  # steps; each report waits for the device


class Stopped(Exception):
    """Training was interrupted; the message is the interrupt's word."""


@dataclass(frozen=True)
class Unlearned:
    """The result of a method. step_seconds: mean over its steps; diagnostics: of its last step and of its end, by name."""

    model: Any
    step_seconds: float
    diagnostics: dict[str, float]


def unlearn(
    model: Any,
    task: Task,
    method: str,
    hyperparameters: Mapping[str, Any],
    *,
    seed: int = 0,
    prepared: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Unlearned:
    """Applies a method to a copy of a model; `raysweep.unlearn` describes the arguments and errors."""
    method_class: type[Method] = resolve("method", method)
    if method == "retrain":
        model, hyperparameters = _untrained(model, task, seed), task.recipe | dict(hyperparameters)
    settings = _settings(method_class, hyperparameters)
    reasons = refusals(method_class, task) or method_class.unsuited(settings, model, task.goal)
    if reasons:
        raise ValueError(f"{method} cannot serve the task {task.name}: {'; '.join(reasons)}")
    on_images = method_class.on_images(settings)
    rows = task if on_images else encoded(task, model)
    clip = _clip(task) if on_images else None

    def copied() -> Any:
        copy_ = trainable_copy(model, seed)
        return copy_ if clip is None else families.with_tower(copy_, clip)

    device = next(iter(model.net.parameters())).device
    with (
        one_thread(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):  # the caller's random state stays
        if prepared is None:
            prepared = prepare(method_class, settings, copied(), rows, derive_seed("prepare", method))  # a sweep's seed
        return apply(method_class, settings, copied(), rows, prepared, seed, progress=progress)


def _untrained(model: Any, task: Task, seed: int) -> Any:
    """Weights that never saw the task's data, from which a sweep's oracles start, too: new ones, or those that the task names."""
    if task.base is None or task.trained:
        return model.fresh(derive_seed("init", seed))
    return families.load(task.base).to(model.device)


def _settings(method: type[Method], hyperparameters: Mapping[str, Any]) -> Any:
    """Validated hyperparameters; raises ValueError, naming each that is wrong."""
    names = list(method.Hyperparameters.model_fields)
    try:
        return method.Hyperparameters(**hyperparameters)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            key = ".".join(map(str, e["loc"]))
            unknown = f"not a hyperparameter of {method.name}{suggest(key, names)}"
            message = unknown if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}")
        raise ValueError("\n".join(problems)) from error


def refusals(method: type[Method], task: Task) -> list[str]:
    """Why a method cannot serve a task at all; [] if it can."""
    reasons = unserved(method, task.family)
    if task.kind not in method.kinds:
        reasons.append(f"it forgets {' or '.join(sorted(method.kinds))}, and the task is of kind {task.kind!r}")
    return reasons + [f"it needs the {need} set" for need in sorted(method.needs - set(task.splits))]


def prepare(method_class: type[Method], settings: Any, model: Any, task: Task, seed: int) -> dict[str, torch.Tensor]:
    """The tensors that a method computes once per base, by name; empty for most. Every rank computes on all rows."""
    torch.manual_seed(seed)
    return method_class.prepare(model, task, derive_seed("prepare", seed), settings)


def apply(
    method_class: type[Method],
    settings: Any,
    model: Any,
    task: Task,
    prepared: Mapping[str, torch.Tensor],
    seed: int,
    precision: str = "fp32",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    interrupt: Interrupt | None = None,
) -> Unlearned:
    """Trains `model` in place by a method to its end. task: its images in the form that the method takes, pixels or latents."""
    torch.manual_seed(seed)
    method = method_class(model, settings, dict(prepared), task.goal)
    step_seconds, diagnostics = train(method, task, seed, precision, checkpoint, progress, interrupt)
    diagnostics |= method.finish()
    return Unlearned(method.model, step_seconds, diagnostics)


def trainable_copy(model: Any, seed: int, modules: tuple[str, ...] = (), lora: Mapping[str, Any] | None = None) -> Any:
    """A copy of a model that may be changed: all of it, only `modules`, or adapters of a rank and alpha (`lora`)."""
    copied = model.with_net(copy.deepcopy(model.net))
    if modules:
        copied.train_only(modules)
    if lora is not None:
        copied.adapt(lora["rank"], lora["alpha"], derive_seed("adapter", seed))
    return copied


@dataclass(frozen=True)
class Checkpoint:
    """A file that keeps a method's state while it trains. every_s: least seconds between two writes."""

    path: Path
    job_digest: str
    every_s: float

    def write(self, state: dict[str, Any]) -> None:
        """Writes a method's state atomically."""
        write_file(self.path, partial(torch.save, state | {"job_digest": self.job_digest}))

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state on a device; None if there is none, it is another job's, or it cannot be read.

        A job without its checkpoint starts again and ends with the same weights.
        """
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True, map_location=device)
        except (RuntimeError, EOFError, UnpicklingError):
            return None
        return state if state.pop("job_digest", None) == self.job_digest else None


def train(
    method: Method,
    task: Task,
    seed: int,
    precision: str = "fp32",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    interrupt: Interrupt | None = None,
) -> tuple[float, dict[str, float]]:
    """Steps a method to its end, from its checkpoint if it has one.

    seed: of data order, noise, time steps and dropout. precision: of the passes, fp32 or bf16; weights and optimiser stay in
    fp32. progress: called on rank 0 with (steps done, steps in all, the method's first diagnostic).
    interrupt: asked between steps; raises Stopped if it says so.
    Returns (seconds per step, diagnostics of the last step as last/NAME).
    """
    rank, world = rank_and_world()
    weight = next(iter(method.model.net.parameters()))
    state = None if checkpoint is None else checkpoint.read(weight.device)
    if state is not None:
        method.load_state_dict(state)
    row_seed, steps, first = derive_seed("trial", seed), method.steps, method.done
    began = saved = time.monotonic()
    scalars: dict[str, torch.Tensor] = {}
    while method.done < steps:
        batch = task.batch(method.draws(), row_seed, method.done, rank, world)
        # dropout is the network's only use of the global random state
        torch.manual_seed(derive_seed("dropout", seed, method.done, rank))
        # nothing is cached, since a step may change weights more than once
        with torch.autocast(weight.device.type, torch.bfloat16, precision == "bf16", cache_enabled=False):
            scalars = method.step({name: rows.to(weight.device, weight.dtype) for name, rows in batch.items()})
        if progress is not None and rank == 0 and (method.done % REPORT_EVERY == 0 or method.done == steps):
            progress(method.done, steps, float(next(iter(scalars.values()), 0.0)))
        if checkpoint is not None and rank == 0 and time.monotonic() - saved > checkpoint.every_s:
            checkpoint.write(method.state_dict())
            saved = time.monotonic()
        if interrupt is not None and (word := interrupt()) in ("leave", "lost"):
            if word == "leave" and checkpoint is not None:
                checkpoint.write(method.state_dict())
            raise Stopped(word)
    done = max(1, method.done - first)
    return (time.monotonic() - began) / done, {f"last/{name}": float(value) for name, value in scalars.items()}


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _clip(task: Task) -> Any:
    """The CLIP model that a task names beside its base; None for none."""
    if task.clip is None:
        return None
    from raysweep.models.tower import Clip

    return Clip.load(task.clip)
