"""Checks the folder of a rectified-flow pipeline: its text encoders, whether its parts fit each other, and its scheduler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from raysweep.models.folders import INDEX, read_json, reading
from raysweep.models.pipeline_folder import check_classes
from raysweep.models.validation import SCHEDULE
from raysweep.models.weights import warn

ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
CLIPS = ("text_encoder", "text_encoder_2")
# settings of other pipelines' schedulers, under which a step t would have no level of its own
UNSUPPORTED = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def encoders_of(folder: Path, index: dict[str, Any]) -> dict[str, type]:
    """The text encoders that the index of a folder names, and their classes.

    Raises ValueError if there is none, if one is of another class, or if one or its tokenizer is named and not there.
    """
    kinds = {part: kind for part, kind in ENCODERS.items() if index.get(part) not in (None, [None, None])}
    if not kinds:
        raise ValueError(f"{folder / INDEX}: names no text encoder; it needs one or more of {', '.join(ENCODERS)}")
    check_classes(folder, index, kinds)
    for part, kind in kinds.items():
        for needed in (part, part.replace("text_encoder", "tokenizer")):
            if not (folder / needed).is_dir():
                raise ValueError(
                    f"{folder / needed}: is missing: {INDEX} names {part}, a {kind.__name__}; add the folder, or set {part} and "
                    f"{part.replace('text_encoder', 'tokenizer')} to [null, null] there for a model that reads prompts without it"
                )
    return kinds


def check_parts(folder: Path, modules: dict[str, Any], vae: Any, tokenizers: dict[str, Any]) -> None:
    """Raises ValueError unless the transformer, the autoencoder's configuration `vae` and the text encoders fit each other."""
    config = modules["transformer"].config
    if vae.latent_channels != config.in_channels:
        raise ValueError(
            f"{folder}: the autoencoder makes latents of {vae.latent_channels} channels, and the transformer takes "
            f"{config.in_channels}: they are not of the same model"
        )
    _check_size(folder / "transformer" / "config.json", config)
    clips = [part for part in CLIPS if part in modules]
    width, pooled = (
        sum(getattr(modules[part].config, key) for part in clips) for key in ("hidden_size", "projection_dim")
    )
    whole, takes = len(clips) == len(CLIPS), config.pooled_projection_dim
    if pooled != takes if whole else pooled >= takes:
        raise ValueError(
            f"{folder}: {' and '.join(clips)} give pooled states of width {pooled}, and the transformer takes {takes} "
            f"(pooled_projection_dim){'' if whole else ', part of them from the CLIP model that is missing'}: they are not of the same "
            "model"
        )
    if width > config.joint_attention_dim:
        raise ValueError(
            f"{folder}: {' and '.join(clips)} give embeddings of width {width}, and the transformer attends to those of "
            f"{config.joint_attention_dim} (joint_attention_dim): they are not of the same model"
        )
    if "text_encoder_3" in modules and modules["text_encoder_3"].config.d_model != config.joint_attention_dim:
        raise ValueError(
            f"{folder}: text_encoder_3 gives embeddings of width {modules['text_encoder_3'].config.d_model}, and the transformer "
            f"attends to those of {config.joint_attention_dim} (joint_attention_dim): they are not of the same model"
        )
    lengths = [tokenizers[part].model_max_length for part in clips]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{folder}: tokenizer reads {lengths[0]} tokens and tokenizer_2 {lengths[1]} (model_max_length): the states of both CLIP "
            "models lie side by side, so both must read as many"
        )


def _check_size(path: Path, config: Any) -> None:
    """Raises ValueError unless a transformer's latents can be cut into patches that it has positions for."""
    size, patch, most = config.sample_size, config.patch_size, config.pos_embed_max_size
    if not isinstance(size, int) or size % patch:
        raise ValueError(f"{path}: sample_size is {size!r}; it must be a multiple of patch_size, {patch}")
    if most is not None and size // patch > most:
        raise ValueError(
            f"{path}: latents of sample_size {size} have {size // patch} patches a side, and pos_embed_max_size is {most}"
        )


def flow_schedule(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in a folder; raises ValueError unless it is diffusers' one of flows, with a shift of its levels alone."""
    path = folder / SCHEDULE
    config, kind = read_json(path), FlowMatchEulerDiscreteScheduler
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise ValueError(f"{path}: holds a {config['_class_name']}; a flow model has a {kind.__name__}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(
                f"{path}: {key} is {config[key]!r}; supported are a constant shift and dynamic shifting alone"
            )
    steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"{path}: num_train_timesteps is {steps!r}; it must be 2 or more")
    if not (_is_number(shift) and shift > 0):
        raise ValueError(f"{path}: shift is {shift!r}; it must be a positive number")
    with reading(path):
        scheduler = kind.from_config(config)
    if config.get("use_dynamic_shifting"):
        numbers = {key: scheduler.config[key] for key in DYNAMIC}
        if not all(map(_is_number, numbers.values())) or numbers[DYNAMIC[2]] == numbers[DYNAMIC[3]]:
            raise ValueError(f"{path}: use_dynamic_shifting needs numbers, and two lengths that differ: {numbers}")
    elif "shift" not in config:
        warn(f"{path}: does not say shift; the library's default is taken: shift = {scheduler.config.shift}")
    return scheduler


def check_levels(path: Path, model: Any) -> None:
    """Raises ValueError, naming the scheduler's file, unless the noise levels of a model's steps rise between 0 and 1."""
    alphas, negative = model.alphas, False
    if model.mu is not None and model.scheduler.config.time_shift_type == "linear":
        negative = model.mu <= 0
    if negative or not bool(((alphas > 0) & (alphas < 1)).all()) or bool((alphas.diff() >= 0).any()):
        raise ValueError(
            f"{path}: its shift gives levels of noise that do not rise from step to step between 0 and 1: is it too large, or negative?"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
