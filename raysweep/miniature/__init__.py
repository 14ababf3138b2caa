"""Miniatures: tiny models and datasets in the formats of real ones, on which a preset runs without the paper's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysweep.miniature import data, models
from raysweep.storage.cache import cache_folder
from raysweep.storage.code_digests import code_digest
from raysweep.storage.files import digest_of, write_folder

MAKERS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        models.ddpm, models.edm, models.stable_diffusion, models.clip, models.vlm,
        data.idx, data.cifar10, data.stl10, data.celeba, data.files, data.tree, data.shards, data.table,
    )
}  # fmt: skip


class MiniatureError(ValueError):
    """A miniature cannot be made as specified; the message says which and why."""


def make(spec: dict[str, Any], cache: Path | None) -> Path:
    """Makes the miniatures of `spec` (name -> {maker: its arguments}) in the cache, unless they are there; returns their folder.

    Raises:
        MiniatureError: a maker that does not exist, or arguments that it cannot use.
    """
    code = code_digest("raysweep/miniature/*.py", "raysweep/tasks/digits_models.py", "raysweep/models/**/*.py")
    folder = cache_folder(cache) / "miniatures" / digest_of(spec, code)
    if not folder.is_dir():

        def fill(out: Path) -> None:
            for name, recipe in spec.items():
                if len(recipe) != 1 or next(iter(recipe)) not in MAKERS:
                    raise MiniatureError(
                        f"{name}: takes one of {', '.join(MAKERS)}, not {', '.join(recipe) or 'nothing'}"
                    )
                ((maker, arguments),) = recipe.items()
                try:
                    MAKERS[maker](out / name, **(arguments or {}))
                except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise MiniatureError(f"{name}: {maker} cannot work with {arguments} ({error})") from error

        write_folder(folder, fill)
    return folder
