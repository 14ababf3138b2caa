"""Which class handles a model: by the family that a task names, or by what a folder says of itself.

A class is imported when a model of its family is: libraries of the others would take every process of a run seconds to load.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.models.folders import OPEN_CLIP, pipeline_class, read_json

if TYPE_CHECKING:
    from raysweep.models.latent import LatentText
    from raysweep.models.tower import Clip

HANDLES = {
    "clip": "raysweep.models.clip:Contrastive",
    "edm": "raysweep.models.edm:EDM",
    "pixel-ddpm": "raysweep.models.pixel:PixelDDPM",
    "text-ddpm": "raysweep.models.latent:LatentText",
    "vlm": "raysweep.models.vision_language:VisionLanguage",
}
PIPELINES = {
    "DDIMPipeline": "pixel-ddpm",
    "DDPMPipeline": "pixel-ddpm",
    "EDMPipeline": "edm",
    "StableDiffusionPipeline": "text-ddpm",
    "StableDiffusionXLPipeline": "text-ddpm",
}


def handle(family: str) -> Any:
    """The class of a family's models."""
    module, _, name = HANDLES[family].partition(":")
    return getattr(import_module(module), name)


def family_of(folder: Path) -> str:
    """The family of the model in a pipeline's, an open_clip or a LLaVA folder; raises ValueError if it is none of them."""
    if (folder / OPEN_CLIP).is_file():
        return "clip"
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "llava":
        return "vlm"
    return PIPELINES[pipeline_class(folder, PIPELINES)]


def load(folder: str | Path) -> Any:
    """The model in a folder; raises ValueError, saying what is wrong with the folder."""
    return handle(family_of(Path(folder))).load(folder)


def example(task: Any) -> Any:
    """A model of a task's architecture, to look at: the user's own, or a freshly initialised one. ValueError as by `load`."""
    return build(task, 0) if task.base is None else load(task.base)


def with_tower(model: LatentText, clip: Clip) -> LatentText:
    """The model, with the CLIP model of its text encoder at hand; raises ValueError if it is that of another."""
    from raysweep.models.tower import TextTower

    model.tower = TextTower(model, clip).to(model.device)
    return model


def build(task: Any, seed: int, frozen: str | Path | None = None) -> Any:
    """A model of the architecture of a `Task` to be trained: freshly initialised, or the weights that a task starts from.

    frozen: folder of the trained autoencoder of a latent model; None: a fresh one.
    """
    if task.base is not None:
        given = load(task.base)
        return given.fresh(seed) if task.trained else given
    made = handle(task.family)
    if task.family == "text-ddpm":
        return made.build(task.model, seed, None if frozen is None else Path(frozen))
    return made.build(task.model, seed)
