"""The papers' experiments as configs: `search_spaces/presets/NAME.yaml`.

A preset is a config with two more parts. `about` says where it comes from, how the paper measures, what a user must bring, and
what is different here. `tiny` makes miniatures of that (see `raysweep.miniature`) and sets what must be smaller, so that
`raysweep run NAME scale=tiny` takes the same way through the same files' formats on a laptop.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raysweep.storage.texts import load_yaml, read_text

Scale = Literal["paper", "tiny"]


# What every experiment can do with less of, at `scale=tiny`: a few trials, small audits, and no attack that takes minutes.
SMALL: dict[str, Any] = {
    "oracles": 1,
    "audit.top": 3,
    "audit.rounds": 1,
    "audit.finalists": 1,
    "audit.timeout_s": 600,
    "audit.probe": {"samples": 60, "class_samples": 30, "noises": 20, "groups": 5},
    "audit.audit": {
        "samples": 100, "class_samples": 40, "noises": 20, "loss_noises": 10, "membership_images": 30, "groups": 5,
        "recall_images": 4, "recall_noises": 4, "strips": 8,
    },
    "audit.durability": {"class_samples": 30, "noises": 20, "groups": 5, "relearn_steps": [5], "inversion_steps": 20},
}  # fmt: skip


class PresetError(ValueError):
    """A part of a preset cannot be used; the message begins with its key."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bring(_Part):
    """Something that a user must have."""

    key: str = Field(description="the setting that names it, dotted")
    what: str = Field(description="what it is")
    get: str = Field(description="where it comes from, or the command that fetches it")


class About(_Part):
    """What a preset repeats."""

    title: str = Field(description="the experiment, in a few words")
    paper: str = Field(description="authors, venue, arXiv id, section")
    protocol: tuple[str, ...] = Field(description="how the paper measures, and what stands for it here")
    bring: tuple[Bring, ...] = Field(description="what a user must bring")
    differs: tuple[str, ...] = Field((), description="what is done differently here, and why")
    network: dict[str, Any] = Field(
        default_factory=dict, description="its architecture, so that cost can be told before the weights are there"
    )


class Tiny(_Part):
    """What is different at `scale=tiny`."""

    make: dict[str, dict[str, dict[str, Any] | None]] = Field(description="name -> {maker: arguments}")
    set: dict[str, Any] = Field(description="dotted setting -> value; {made} is the folder of what was made")


def folder() -> Any:
    """Where the presets are."""
    return files("search_spaces").joinpath("presets")


def names() -> list[str]:
    """All presets, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in folder().iterdir() if f.name.endswith(".yaml"))


def path_of(name: str) -> Path:
    """The file of a preset."""
    return Path(str(folder().joinpath(f"{name}.yaml")))


def about(name: str) -> About:
    """What a preset says of itself."""
    return About.model_validate(load_yaml(read_text(path_of(name)))["about"])


def about_of(path: Path, name: str | None = None) -> About | None:
    """What the file of a preset, or a copy of one, says of itself; of a file that says nothing (a resolved config), what the
    preset `name` does, if there is one."""
    told = load_yaml(read_text(path)).get("about")
    if told is not None:
        return About.model_validate(told)
    return about(name) if name in names() else None


def settings(tiny: Any, methods: int, cache: Path | None) -> dict[str, Any]:
    """The settings that make a preset tiny, dotted; makes the miniatures that they name.

    Raises:
        ValidationError: `tiny` has other keys than `make` and `set`.
        PresetError: a miniature cannot be made.
    """
    from raysweep.miniature import MiniatureError, made

    parts = Tiny.model_validate(tiny)
    try:
        where = str(made(parts.make, cache))
    except MiniatureError as error:
        raise PresetError(f"tiny.make.{error}") from error
    return SMALL | {"search.trials": 2 * methods} | {key: _filled(value, where) for key, value in parts.set.items()}


def _filled(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, where) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, where) for v in value]
    return value.replace("{made}", where) if isinstance(value, str) else value
