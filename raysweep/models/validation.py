"""Checks of a diffusion model before a run: sizes, channels, noise schedule, one forward pass, a task's conditions.

Each fault is reported in one sentence that a run would only meet at its first forward pass, or never notice.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from raysweep.models.folders import read_json, reading
from raysweep.models.weights import warn
from raysweep.registry import resolve

SCHEDULE = "scheduler_config.json"
# keys whose defaults differ between schedulers
STATED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
PREDICTIONS = ("epsilon", "v_prediction")
SMALL = 50_000_000  # weights of a network that answers for one row in about a second on a CPU


def check_unet(folder: Path, config: Any) -> None:
    """Raises ValueError unless a U-Net's configuration has a sample size, and as many output as input channels."""
    path, size = folder / "config.json", config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(
            f"{path}: sample_size is {'null' if size is None else repr(size)}: set it to the size of what the network denoises, a "
            "number or [height, width] (pixels; of a latent model, its latents)"
        )
    inputs, outputs = config.in_channels, config.out_channels
    if outputs == 2 * inputs:
        raise ValueError(
            f"{path}: out_channels is {outputs}, twice in_channels: the network also predicts variances (learned_range), which none of "
            f"the methods, samplers and checks here knows; supported are networks that give {inputs} channels"
        )
    if outputs != inputs:
        guesses = {9: " (an inpainting model?)", 8: " (a model that edits pictures?)"}
        guess = guesses.get(inputs, "") if outputs == 4 else ""
        raise ValueError(
            f"{path}: in_channels is {inputs} and out_channels {outputs}{guess}: a network is supported that predicts noise or velocity "
            "of what it takes, in as many channels"
        )


def schedule(folder: Path, latent: bool = False) -> tuple[Any, DDIMScheduler]:
    """The scheduler in a folder, and DDIM on its noise schedule.

    latent: samples are latents, which are unbounded and never clipped, whatever the folder says. Raises ValueError if it has no
    schedule of betas, or one on which something divides by zero.
    """
    path = folder / SCHEDULE
    config = read_json(path)
    name = str(config.get("_class_name", DDIMScheduler.__name__))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise ValueError(f"{path}: {name} is not a scheduler of diffusers")
    if "beta_schedule" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(f"{path}: {name} has no schedule of betas, as DDPM, DDIM, PNDM, Euler and their kin have")
    with reading(path):
        original = kind.from_config(config)
        scheduler = ddim(original, latent)
    unstated = [key for key in STATED if key not in config]
    if unstated and config.get("trained_betas") is None:
        defaults = ", ".join(f"{key} = {scheduler.config[key]}" for key in unstated)
        warn(f"{path}: does not say {', '.join(unstated)}; the library's default is taken: {defaults}")
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise ValueError(
            f"{path}: prediction_type {scheduler.config.prediction_type!r} is not supported; valid: {', '.join(PREDICTIONS)}"
        )
    _check_alphas(path, scheduler)
    with reading(path):
        _try(ddim(original, latent))
    return original, scheduler


def ddim(scheduler: Any, latent: bool = False) -> DDIMScheduler:
    """DDIM on the noise schedule of another scheduler; latent: as in `schedule`."""
    # without the private entries, which record the other scheduler's defaults
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return DDIMScheduler.from_config(config | ({"clip_sample": False, "thresholding": False} if latent else {}))


def _try(scheduler: DDIMScheduler) -> None:
    """Runs two steps, which raise any error that the scheduler's settings would raise in a run."""
    scheduler.set_timesteps(2)
    pixel = torch.zeros(1, 1, 1, 1)
    for t in scheduler.timesteps:
        scheduler.step(pixel, int(t), pixel)


def _check_alphas(path: Path, scheduler: DDIMScheduler) -> None:
    alphas = scheduler.alphas_cumprod
    if alphas.numel() < 2:
        raise ValueError(
            f"{path}: its noise schedule has {alphas.numel()} steps (num_train_timesteps); it needs 2 or more"
        )
    if not bool(alphas.isfinite().all()) or bool((alphas < 0).any()) or bool((alphas.diff() > 0).any()):
        raise ValueError(
            f"{path}: its betas are not between 0 and 1: what is left of a picture must fall from step to step"
        )
    if float(alphas[0]) >= 1:
        raise ValueError(f"{path}: step 0 adds no noise (beta_start is too small), and losses divide by its noise")
    if float(alphas[-1]) == 0 and scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            f"{path}: the last step leaves nothing of a picture (rescale_betas_zero_snr, or a beta of 1), and prediction_type "
            "is epsilon, which then divides by zero; such schedules go with v_prediction"
        )


def check_pass(model: Any, cond: torch.Tensor | None, source: str) -> None:
    """Raises ValueError, naming `source`, unless the network of a diffusion model takes and returns the shapes of its configuration.

    One row goes through it on PyTorch's meta device, which computes shapes alone, without arithmetic or memory. A network of at
    most `SMALL` weights is also run on a row, and its output must be finite. cond: the condition of a row (1,) or (1, L), or None
    for the unconditional pass.
    """
    meta = torch.device("meta")
    with reading(Path(source)):
        with meta:  # new modules have shapes and no values
            shadow = model.fresh(0)
        x = torch.empty(1, *model.shape, device=meta, dtype=model.dtype)
        output = shadow.outline(x, None if cond is None else cond.to(meta))
        if output.shape != x.shape:
            raise ValueError(f"its network gives {tuple(output.shape[1:])} for {tuple(x.shape[1:])}")
        if sum(p.numel() for p in model.net.parameters()) <= SMALL:
            with torch.no_grad():
                row = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
                output = model.predict(row, torch.zeros(1, dtype=torch.long, device=model.device), cond)
            if not bool(output.isfinite().all()):
                raise ValueError("its network answers with numbers that are not finite: are its weights damaged?")


def check_serves(model: Any, task: Any, source: str) -> None:
    """Raises ValueError, naming `source`, unless the network of a diffusion model takes the conditions of a task."""
    if not hasattr(model, "outline"):
        return
    cond = task.splits["forget"].cond
    if cond is not None and "label" in resolve("family", model.family).conditions:
        _check_labels(model, task, source)
    check_pass(model, None if cond is None else cond[:1], source)
    if cond is None or model.unconditional(1) is not None:
        check_pass(model, None, source)


def _check_labels(model: Any, task: Any, source: str) -> None:
    """Raises ValueError unless every class of a task is one of the network's, and none of them stands for "no class"."""
    known = model.net.config.num_class_embeds or 0
    labels = {int(c) for split in task.splits.values() if split.cond is not None for c in split.cond.unique()}
    needed = max(len(task.class_names), 1 + max(labels))
    if not known:
        raise ValueError(f"{source}: must be class-conditional (num_class_embeds)")
    if needed > known or (model.null_label is not None and model.null_label < needed):
        null = "" if model.null_label is None else f", of which {model.null_label} stands for no class"
        raise ValueError(
            f"{source}: its network knows {known} class indices (num_class_embeds){null}, and the task has {needed} classes: it must "
            f"know {needed}{'' if model.null_label is None else ' and one more for no class, the last'}"
        )
