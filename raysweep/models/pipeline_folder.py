"""Checks the folder of a text-to-image pipeline: the classes of its parts, and whether they belong to one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from raysweep.models import weights
from raysweep.models.folders import INDEX, component_files, reading

SHORTEST_PROMPT = 3  # tokens: a word between the two ends


def check_classes(folder: Path, index: dict[str, Any], classes: dict[str, type]) -> None:
    """Raises ValueError unless the index of a folder names these classes for its parts."""
    for part, cls in classes.items():
        entry = index.get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name != cls.__name__:
            raise ValueError(f"{folder / INDEX}: {part}: is {name or 'none'}; supported there: {cls.__name__}")


def check_autoencoder(folder: Path, config: Any, shifted: bool = False) -> None:
    """Raises ValueError unless latents are the encoder's means times a factor; shifted: unless a number is first subtracted."""
    path = folder / "config.json"
    if not isinstance(config.scaling_factor, int | float) or config.scaling_factor <= 0:
        raise ValueError(f"{path}: scaling_factor is {config.scaling_factor!r}; it must be a positive number")
    shift = config.get("shift_factor")
    if shifted and not isinstance(shift, int | float):
        raise ValueError(f"{path}: shift_factor is {shift!r}; it must be a number, which the pipeline adds to latents")
    for key in ("shift_factor",) * (not shifted) + ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            kinds = "scaled, or shifted by one number," if shifted else "scaled"
            raise ValueError(f"{path}: {key} is set: latents that are shifted are not supported, only {kinds} ones")


def read_tokenizer(folder: Path, encoder: Any, kind: Any = CLIPTokenizer, longest: int | None = None) -> Any:
    """The tokenizer of a text encoder, of class `kind`.

    longest: the most tokens of a prompt; None: those that the encoder has positions for. Without `tokenizer_config.json` prompts have
    that length and the class's own padding.
    """
    component_files(folder, ("tokenizer.json", "vocab.json" if kind is CLIPTokenizer else "spiece.model"))
    with reading(folder):
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    longest, vocabulary = longest or encoder.config.max_position_embeddings, encoder.config.vocab_size
    if not (folder / "tokenizer_config.json").is_file():
        weights.warn(
            f"{folder}: tokenizer_config.json is missing: prompts are cut and padded to the {longest} tokens of the text encoder, with "
            f"{tokenizer.pad_token!r} as padding"
        )
    length = tokenizer.model_max_length
    if not isinstance(length, int | float) or length < SHORTEST_PROMPT:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {length!r}; it must be {SHORTEST_PROMPT} or more"
        )
    tokenizer.model_max_length = int(min(length, longest))
    numbers = tokenizer.get_vocab().values()
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{folder}: some of its tokens have the same number: its vocabulary is damaged")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{folder.parent}: the tokenizer has {len(tokenizer)} tokens, but the text encoder knows {vocabulary}: "
            "they are not of the same model"
        )
    return tokenizer


def check_parts_fit(folder: Path, unet: Any, vae: Any, encoders: list[Any], xl: bool) -> None:
    """Raises ValueError unless the configurations of U-Net and autoencoder and the text encoders fit each other."""
    if vae.latent_channels != unet.in_channels:
        raise ValueError(
            f"{folder}: the autoencoder makes latents of {vae.latent_channels} channels, and the U-Net "
            f"takes {unet.in_channels}: they are not of the same model"
        )
    width, attended = sum(e.config.hidden_size for e in encoders), unet.cross_attention_dim
    if not (attended == width or (isinstance(attended, list | tuple) and set(attended) == {width})):
        raise ValueError(
            f"{folder}: the text encoder{'s' * xl} give{'' if xl else 's'} embeddings of width {width}, and the U-Net attends to those "
            f"of {attended} (cross_attention_dim): they are not of the same model"
        )
