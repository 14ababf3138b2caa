"""Miniatures: tiny models and datasets in the formats of the real ones, so that an experiment runs before its files are there."""

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
    """A miniature cannot be made as it is asked for; the message says which, and why."""


def made(spec: dict[str, Any], cache: Path | None) -> Path:
    """The folder that holds what `spec` asks for: name -> {maker: its arguments}. Made once, then read from the cache.

    Raises:
        MiniatureError: a maker that does not exist, or arguments that it cannot work with.
    """
    code = code_digest("raysweep/miniature/*.py", "raysweep/tasks/digits_models.py", "raysweep/models/*.py")
    folder = cache_folder(cache) / "miniatures" / digest_of(spec, code)
    if not folder.is_dir():

        def fill(out: Path) -> None:
            for name, how in spec.items():
                if len(how) != 1 or next(iter(how)) not in MAKERS:
                    raise MiniatureError(f"{name}: takes one of {', '.join(MAKERS)}, not {', '.join(how) or 'nothing'}")
                ((maker, arguments),) = how.items()
                try:
                    MAKERS[maker](out / name, **(arguments or {}))
                except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise MiniatureError(f"{name}: {maker} cannot work with {arguments} ({error})") from error

        write_folder(folder, fill)
    return folder
