"""What a folder's configuration must say for its model to be what it is taken for: sizes, channels, noise schedule, one pass.

Whatever a run would only meet at its first forward pass, or never notice, is said in one sentence here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from raysweep.models.folders import read_json, reading
from raysweep.models.weights import tell
from raysweep.registry import resolve

SCHEDULE = "scheduler_config.json"
# what a folder is expected to say
STATED = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
PREDICTIONS = ("epsilon", "v_prediction")
SMALL = 50_000_000  # weights of a network that answers for one row in about a second on a CPU


def check_unet(folder: Path, config: Any) -> None:
    """Raises ValueError unless a U-Net's configuration gives a size, and as many channels back as it takes."""
    where, size = folder / "config.json", config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(
            f"{where}: sample_size is {'null' if size is None else repr(size)}: set it to the size of what the network denoises, a "
            "number or [height, width] (pixels; of a latent model, its latents)"
        )
    taken, given = config.in_channels, config.out_channels
    if given == 2 * taken:
        raise ValueError(
            f"{where}: out_channels is {given}, twice in_channels: the network also predicts variances (learned_range), which none of "
            f"the methods, samplers and checks here knows; supported are networks that give {taken} channels"
        )
    if given != taken:
        kind = {9: " (an inpainting model?)", 8: " (a model that edits pictures?)"}.get(taken, "") if given == 4 else ""
        raise ValueError(
            f"{where}: in_channels is {taken} and out_channels {given}{kind}: a network is supported that predicts noise or velocity "
            "of what it takes, in as many channels"
        )


def schedule(folder: Path, latent: bool = False) -> tuple[Any, DDIMScheduler]:
    """The scheduler in a folder as it is, and DDIM on its noise schedule.

    latent: what is sampled are latents, which have no bounds and are never clipped, whatever the folder says.
    Raises ValueError if it has no schedule of betas, or one on which something divides by zero.
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
        given = kind.from_config(config)
        sampler = ddim(given, latent)
    untold = [key for key in STATED if key not in config]
    if untold and config.get("trained_betas") is None:
        told = ", ".join(f"{key} = {sampler.config[key]}" for key in untold)
        tell(f"{path}: does not say {', '.join(untold)}; the library's default is taken: {told}")
    if sampler.config.prediction_type not in PREDICTIONS:
        raise ValueError(
            f"{path}: prediction_type {sampler.config.prediction_type!r} is not supported; valid: {', '.join(PREDICTIONS)}"
        )
    _check_alphas(path, sampler)
    with reading(path):
        _try(ddim(given, latent))
    return given, sampler


def ddim(given: Any, latent: bool = False) -> DDIMScheduler:
    """DDIM on the noise schedule of another scheduler; latent: as in `schedule`."""
    # without what a configuration remembers of its origin: defaults of one scheduler are not those of another
    config = {k: v for k, v in given.config.items() if not k.startswith("_")}
    return DDIMScheduler.from_config(config | ({"clip_sample": False, "thresholding": False} if latent else {}))


def _try(sampler: DDIMScheduler) -> None:
    """A step of the sampler, which raises what its settings would raise in a run."""
    sampler.set_timesteps(2)
    pixel = torch.zeros(1, 1, 1, 1)
    for t in sampler.timesteps:
        sampler.step(pixel, int(t), pixel)


def _check_alphas(path: Path, sampler: DDIMScheduler) -> None:
    alphas = sampler.alphas_cumprod
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
    if float(alphas[-1]) == 0 and sampler.config.prediction_type == "epsilon":
        raise ValueError(
            f"{path}: the last step leaves nothing of a picture (rescale_betas_zero_snr, or a beta of 1), and prediction_type "
            "is epsilon, which then divides by zero; such schedules go with v_prediction"
        )


def check_pass(model: Any, cond: torch.Tensor | None, where: str) -> None:
    """Raises ValueError, naming `where`, unless the network of a diffusion model takes and gives what its configuration says.

    One row goes through it on PyTorch's meta device: shapes alone, without arithmetic or memory; and through networks of at most
    `SMALL` weights themselves, whose answer must be finite. cond: the condition of a row (1,) or (1, L), or None for the
    unconditional pass.
    """
    meta = torch.device("meta")
    with reading(Path(where)):
        with meta:  # modules that are made here have shapes and no values
            shadow = model.fresh(0)
        x = torch.empty(1, *model.shape, device=meta, dtype=model.dtype)
        given = shadow.outline(x, None if cond is None else cond.to(meta))
        if given.shape != x.shape:
            raise ValueError(f"its network gives {tuple(given.shape[1:])} for {tuple(x.shape[1:])}")
        if sum(p.numel() for p in model.net.parameters()) <= SMALL:
            with torch.no_grad():
                row = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
                answer = model.predict(row, torch.zeros(1, dtype=torch.long, device=model.device), cond)
            if not bool(answer.isfinite().all()):
                raise ValueError("its network answers with numbers that are not finite: are its weights damaged?")


def check_serves(model: Any, task: Any, where: str) -> None:
    """Raises ValueError, naming `where`, unless the network of a diffusion model takes the conditions of a task."""
    if not hasattr(model, "outline"):
        return
    cond = task.splits["forget"].cond
    if task.kind == "class" and "label" in resolve("family", model.family).conditions:
        _check_labels(model, task, where)
    check_pass(model, None if cond is None else cond[:1], where)
    if task.kind == "points" or model.unconditional(1) is not None:
        check_pass(model, None, where)


def _check_labels(model: Any, task: Any, where: str) -> None:
    """Raises ValueError unless every class of a task is one of the network's, and none the one that stands for no class."""
    known = model.net.config.num_class_embeds or 0
    labels = {int(c) for split in task.splits.values() if split.cond is not None for c in split.cond.unique()}
    needed = max(len(task.class_names), 1 + max(labels))
    if not known:
        raise ValueError(f"{where}: must be class-conditional (num_class_embeds)")
    if needed > known or (model.null_label is not None and model.null_label < needed):
        null = "" if model.null_label is None else f", of which {model.null_label} stands for no class"
        raise ValueError(
            f"{where}: its network knows {known} class indices (num_class_embeds){null}, and the task has {needed} classes: it must "
            f"know {needed}{'' if model.null_label is None else ' and one more for no class, the last'}"
        )
