"""Which class handles a model: by the family that a task names, or by what a folder says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.constants import HF_CONFIG_NAME

from raysweep.models.clip import Contrastive
from raysweep.models.edm import CLASS as EDM_CLASS
from raysweep.models.edm import EDM
from raysweep.models.folders import pipeline_class
from raysweep.models.latent import PIPELINES, LatentText
from raysweep.models.pixel import CLASSES as PIXEL
from raysweep.models.pixel import PixelDDPM
from raysweep.models.vision_language import VisionLanguage, declared


def load(folder: str | Path) -> Any:
    """The model in a pipeline's, an open_clip or a LLaVA folder; raises ValueError, saying what is wrong with the folder."""
    if (Path(folder) / HF_CONFIG_NAME).is_file():
        return Contrastive.load(folder)
    if declared(Path(folder)):
        return VisionLanguage.load(folder)
    name = pipeline_class(Path(folder), (*PIXEL, *PIPELINES, EDM_CLASS))
    if name == EDM_CLASS:
        return EDM.load(folder)
    return PixelDDPM.load(folder) if name in PIXEL else LatentText.load(folder)


def example(task: Any) -> Any:
    """A model of a task's architecture, to look at: the user's own, or a freshly initialised one. ValueError as by `load`."""
    return build(task, 0) if task.base is None else load(task.base)


def build(task: Any, seed: int, frozen: str | Path | None = None) -> Any:
    """A model of the architecture of a `Task` to be trained: freshly initialised, or the weights that a task starts from. frozen: folder of the trained autoencoder of a latent
    model; None: a fresh one."""
    if task.base is not None:
        given = load(task.base)
        return given.fresh(seed) if task.trained else given
    config: dict[str, Any] = task.model
    if task.family == LatentText.family:
        return LatentText.build(config, seed, None if frozen is None else Path(frozen))
    if task.family == Contrastive.family:
        return Contrastive.build(config, seed)
    if task.family == EDM.family:
        return EDM.build(config, seed)
    return PixelDDPM.build(config, seed)
