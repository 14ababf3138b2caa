"""Looks at a pipeline's folder before a library reads it, so that what is wrong with it is said in one sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

INDEX = "model_index.json"


def pipeline_class(folder: Path, valid: Iterable[str]) -> str:
    """The pipeline class that a folder declares; raises ValueError unless it is one of `valid`."""
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder}: not a diffusers pipeline folder ({INDEX} is missing)")
    try:
        name = json.loads(index.read_text()).get("_class_name")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{index}: not a pipeline's index ({error})") from error
    if name not in valid:
        raise ValueError(f"{folder}: holds a {name}; supported: {', '.join(sorted(valid))}")
    return str(name)


def no_pickles(folder: Path) -> None:
    """Raises ValueError unless a component's weights are there in safetensors format."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    found = f"; found {', '.join(pickles)}, but pickled weights are never loaded" if pickles else ""
    raise ValueError(f"{folder}: weights are missing: they must be in safetensors format{found}")


def component_files(folder: Path, either: tuple[str, ...]) -> None:
    """Raises ValueError unless one of the files is in the folder."""
    if not any((folder / name).is_file() for name in either):
        raise ValueError(f"{folder}: {' or '.join(either)} is missing")


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turns whatever a library raises about files that are cut short or foreign into one ValueError."""
    try:
        yield
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{place}: cannot be read: {reason}") from error
