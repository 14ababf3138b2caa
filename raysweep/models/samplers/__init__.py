"""Samplers of diffusion models. A model carries one, and its folder saves it.

A sampler other than the usual one of the model's family is saved in `raysweep_sampler.json` beside the weights, by its `kind` and
settings. A new sampler is a subclass of `Sampler` in a file of this package, and a line in `SAMPLERS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raysweep.models.folders import read_json
from raysweep.models.samplers.base import Given, Run, Sampler
from raysweep.models.samplers.ddim import DDIM
from raysweep.models.samplers.euler import Euler
from raysweep.models.samplers.heun import Heun
from raysweep.models.samplers.one_step import OneStep
from raysweep.models.samplers.safe import Safe

__all__ = [
    "DDIM",
    "FILE",
    "SAMPLERS",
    "Euler",
    "Given",
    "Heun",
    "OneStep",
    "Run",
    "Safe",
    "Sampler",
    "load",
    "parse",
    "plain_data",
    "save",
]

FILE = "raysweep_sampler.json"
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "one_step": OneStep,
    "safe": Safe,
}


def parse(data: dict[str, Any], model: Any, source: str = "sampler") -> Sampler:
    """The sampler that `kind` and settings describe.

    Raises ValueError, naming `source` and the key, for an unknown kind, for settings that are missing, unknown or out of range, and
    for a sampler that does not suit the model.
    """
    kind, settings = data.get("kind"), {key: value for key, value in data.items() if key != "kind"}
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise ValueError(f"{source}: kind {kind!r} is not a sampler; valid: {', '.join(SAMPLERS)}")
    try:
        sampler = SAMPLERS[kind](**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0] if first["loc"] else "settings"
        raise ValueError(f"{source}: {key}: {first['msg'][0].lower()}{first['msg'][1:]} (sampler {kind})") from error
    try:
        sampler.check(model)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return sampler


def plain_data(model: Any) -> dict[str, Any] | None:
    """Kind and settings of a model's sampler; None for the usual one of its family."""
    return None if model.sampler == model.default_sampler else model.sampler.data()


def save(folder: str | Path, model: Any) -> None:
    """Writes a model's sampler into its folder, unless it is the usual one of its family."""
    data = plain_data(model)
    if data is not None:
        (Path(folder) / FILE).write_text(json.dumps(data, indent=2))


def load(folder: Path, model: Any) -> Sampler:
    """The sampler in a model's folder, or the usual one of its family; raises ValueError as `parse` does."""
    path = folder / FILE
    return parse(read_json(path), model, str(path)) if path.is_file() else model.default_sampler
