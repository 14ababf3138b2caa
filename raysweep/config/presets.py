"""Presets: the papers' experiments as configs, `search_spaces/presets/NAME.yaml`.

A preset is a config with two more parts. `about` describes the paper, how it measures, which files a user must bring, and what
differs here. `tiny` lists miniatures of those files (see `raysweep.miniature`) and the settings that must be smaller, so that
`raysweep run NAME scale=tiny` runs the same code on the same file formats on a laptop.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raysweep.storage.texts import load_yaml, read_text

Scale = Literal["paper", "tiny"]

# Settings of every preset at `scale=tiny`: small audits, and no attack that takes minutes.
SMALL: dict[str, Any] = {
    "oracles": 1,
    "audit.top": 3,
    "audit.rounds": 1,
    "audit.finalists": 1,
    "audit.timeout_s": 600,
    "audit.probe": {"samples": 60, "class_samples": 30, "noises": 20, "groups": 5},
    "audit.audit": {
        "samples": 100,
        "class_samples": 40,
        "noises": 20,
        "loss_noises": 10,
        "membership_images": 30,
        "groups": 5,
        "recall_images": 4,
        "recall_noises": 4,
        "strips": 8,
    },
    "audit.durability": {"class_samples": 30, "noises": 20, "groups": 5, "relearn_steps": [5], "inversion_steps": 20},
}


class PresetError(ValueError):
    """A part of a preset is invalid; the message begins with its key."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bring(_Part):
    """A file or folder that a user must bring."""

    key: str = Field(description="the dotted setting that names it")
    what: str = Field(description="what it is")
    get: str = Field(description="where to get it, or the command that downloads it")


class About(_Part):
    """The experiment that a preset repeats."""

    title: str = Field(description="the experiment, in a few words")
    paper: str = Field(description="authors, venue, arXiv id, section")
    protocol: tuple[str, ...] = Field(description="how the paper measures, and the corresponding checks here")
    bring: tuple[Bring, ...] = Field(description="files and folders that a user must bring")
    differs: tuple[str, ...] = Field((), description="differences from the paper, and their reasons")
    network: dict[str, Any] = Field(
        default_factory=dict,
        description="architecture of the base model, from which costs are estimated without its weights",
    )


class Tiny(_Part):
    """The changes at `scale=tiny`."""

    make: dict[str, dict[str, dict[str, Any] | None]] = Field(description="miniatures: name -> {maker: arguments}")
    set: dict[str, Any] = Field(description="dotted setting -> value; {made} stands for the folder of the miniatures")


def folder() -> Any:
    """The folder of the presets."""
    return files("search_spaces").joinpath("presets")


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in folder().iterdir() if f.name.endswith(".yaml"))


def path_of(name: str) -> Path:
    """The file of a preset."""
    return Path(str(folder().joinpath(f"{name}.yaml")))


def file_of(config: str) -> Path:
    """The file of a config, named by its path or as a preset."""
    return path_of(config) if config in names() and not Path(config).exists() else Path(config)


def about(name: str) -> About:
    """The description of a preset."""
    return About.model_validate(load_yaml(read_text(path_of(name)))["about"])


def about_of(path: Path, name: str | None = None) -> About | None:
    """The description in a preset's file, or in a copy of one; for a file without one (a resolved config), that of the preset
    `name`, if it exists."""
    description = load_yaml(read_text(path)).get("about")
    if description is not None:
        return About.model_validate(description)
    return about(name) if name in names() else None


def settings(tiny: Any, methods: int, cache: Path | None) -> dict[str, Any]:
    """Writes the miniatures of a preset and returns its settings at `scale=tiny`, by dotted key.

    Args:
        tiny: the preset's part `tiny`, as plain data.
        methods: the number of methods; each gets two trials.
        cache: the configured cache folder.

    Raises:
        ValidationError: `tiny` has other keys than `make` and `set`.
        PresetError: a miniature cannot be made.
    """
    from raysweep.miniature import MiniatureError, make

    parts = Tiny.model_validate(tiny)
    try:
        folder = str(make(parts.make, cache))
    except MiniatureError as error:
        raise PresetError(f"tiny.make.{error}") from error
    return SMALL | {"search.trials": 2 * methods} | {key: _filled(value, folder) for key, value in parts.set.items()}


def _filled(value: Any, folder: str) -> Any:
    """Plain data with `folder` for {made} in every text."""
    if isinstance(value, dict):
        return {k: _filled(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, folder) for v in value]
    return value.replace("{made}", folder) if isinstance(value, str) else value
