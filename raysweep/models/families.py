"""Loads and builds models by their family: the one that a task names, or the one that a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.models import stored
from raysweep.models.folders import INDEX, pipeline_class, read_json
from raysweep.records import Family
from raysweep.registry import FAMILIES, PluginError, external, imported, resolve

if TYPE_CHECKING:
    from raysweep.models.text_to_image import TextToImage
    from raysweep.models.tower import Clip


def handle(family: str) -> Any:
    """The class of a family's models; raises UnknownName or PluginError."""
    record: Family = resolve("family", family)
    if family in FAMILIES:
        return imported(record.handle)
    try:
        offered = imported(record.handle)
    except Exception as error:  # a foreign module may raise anything
        raise PluginError(f"the family {family!r}: {record.handle} cannot be imported: {error}") from error
    if offered.family != family:
        raise PluginError(f"the family {family!r}: {record.handle} states the family {offered.family!r}")
    return offered


def family_of(folder: Path) -> str:
    """The family of the model in a folder; raises ValueError if it is none that is known."""
    folder = stored.base_of(folder) or folder
    family = _recognised(folder, FAMILIES)
    if family is not None:
        return family
    offered = {name: resolve("family", name) for name in external("family")}
    family = _recognised(folder, offered)
    by_pipeline = {p: name for name, record in (FAMILIES | offered).items() for p in record.pipelines}
    return family or by_pipeline[pipeline_class(folder, by_pipeline)]  # which says what is wrong with the folder


def _recognised(folder: Path, records: Mapping[str, Family]) -> str | None:
    """The family whose marks are in a folder, or else the one of its pipeline; None if there is none among `records`."""
    for name, record in records.items():
        if record.marks and all(_says(folder / file, entries) for file, entries in record.marks.items()):
            return name
    pipeline = read_json(folder / INDEX).get("_class_name") if (folder / INDEX).is_file() else None
    return next((name for name, record in records.items() if pipeline in record.pipelines), None)


def _says(file: Path, entries: Mapping[str, Any]) -> bool:
    """Whether a file is there and, as JSON, has these entries."""
    if not file.is_file():
        return False
    content = read_json(file) if entries else {}
    return all(content.get(key) == value for key, value in entries.items())


def load(folder: str | Path) -> Any:
    """The model in a folder: a whole one, or a run's candidate over its base; raises ValueError, saying what is wrong with it."""
    folder = Path(folder)
    base = stored.base_of(folder)
    return handle(family_of(folder)).load(folder) if base is None else stored.compose(folder, base, load)


def example(task: Any) -> Any:
    """A throw-away model of a task's architecture: the user's own, or a freshly initialised one. Raises ValueError as `load`."""
    return build(task, 0) if task.base is None else load(task.base)


def with_tower(model: TextToImage, clip: Clip) -> TextToImage:
    """The model, with the CLIP model of its text encoder at hand; raises ValueError if it is that of another."""
    from raysweep.models.tower import TextTower

    model.tower = TextTower(model, clip).to(model.device)
    return model


def build(task: Any, seed: int, frozen: str | Path | None = None) -> Any:
    """A model of the architecture of a `Task` to be trained: freshly initialised, or the weights that a task starts from.

    frozen: folder of the trained autoencoder of a latent model; None: a fresh one.
    """
    if task.base is not None:
        start = load(task.base)
        return start.fresh(seed) if task.trained else start
    parts = [] if frozen is None else [Path(frozen)]
    return handle(task.family).build(task.model, seed, *parts)
