"""The CLIP model to which a text-to-image pipeline's text encoder belongs: compares pictures and prompts through that encoder.

The folder is transformers' (`CLIPModel` with its image processor). Text passes through the pipeline's own weights. The folder
adds the parts that the pipeline lacks: the vision tower, both projections and, where the pipeline holds only the first blocks
of the text tower (Stable Diffusion 2), the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel

from raysweep.models import weights
from raysweep.models.configuration import network_settings, plain
from raysweep.models.folders import component_files, reading
from raysweep.models.handle import Handle
from raysweep.storage.files import alike, digest_of, digest_state

PREFIX = "text_model."  # before the names of the encoder's tensors in some of transformers' classes


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model. images: its image processor; folder: the folder that it was read from."""

    net: Any
    images: Any
    folder: str

    @classmethod
    def load(cls, folder: str | Path) -> Clip:
        """Reads a folder of transformers, safetensors only; raises ValueError, saying what is wrong with it."""
        folder = Path(folder)
        component_files(folder, ("config.json",))
        component_files(folder, ("preprocessor_config.json",))
        net = weights.read(CLIPModel, folder, dtype=torch.float32)
        with reading(folder):
            images = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        return cls(net.eval().requires_grad_(False), images, str(folder))

    @property
    def digest(self) -> str:
        """Content hash of the weights, of the networks' settings and of the images' normalisation."""
        images = plain([self.images.image_mean, self.images.image_std])
        return digest_of(digest_state(self.net.state_dict()), network_settings(self.net), images)


class TextTower(Handle):
    """A pipeline's text encoder as the text tower of its CLIP model.

    Args:
        model: a text-to-image model; its `net` is shared, so that gradients and edits are those of the pipeline.
        clip: the CLIP model. Raises ValueError unless one of the text encoders is the beginning of its text tower.
    """

    family = "clip"

    def __init__(self, model: Any, clip: Clip):
        encoders = list(model.columns)
        differing = [_differing(model.net[name], clip.net.text_model) for name in encoders]
        if all(differing):
            raise ValueError(
                f"{clip.folder}: is not the CLIP model of this text encoder: {differing[0][0]} differs, or is missing in "
                "one of the two"
            )
        self.name = encoders[differing.index([])]
        self.columns = model.columns[self.name]
        self.net, self.clip = nn.ModuleDict({self.name: model.net[self.name]}), clip.net
        size = clip.net.config.vision_config.image_size
        self.image_shape = (3, size, size)
        self.mean, self.std = (
            torch.tensor(getattr(clip.images, k)).view(1, 3, 1, 1) for k in ("image_mean", "image_std")
        )

    def to(self, device: torch.device) -> Self:
        """Moves the folder's parts; the encoder moves with its pipeline."""
        self.clip.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @property
    def logit_scale(self) -> torch.Tensor:
        """Factor of the cosines before the softmax, a scalar."""
        return self.clip.logit_scale.exp()

    @torch.no_grad()
    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of images (n, 3, H, W) in [-1, 1] of any size, resized as CLIP does."""
        fitted = F.interpolate(x, self.image_shape[1:], mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = ((fitted + 1) / 2 - self.mean.to(x)) / self.std.to(x)
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d), not normalised, of the pipeline's tokens of prompts."""
        tensors = text_tensors(self.net[self.name])
        out = functional_call(self.clip.text_model, tensors, (), {"input_ids": tokens[:, self.columns]})
        return self.clip.text_projection(out.pooler_output)

    def unconditional(self, count: int) -> None:
        """None: there is no branch without a caption."""


def text_tensors(encoder: Any) -> dict[str, torch.Tensor]:
    """The parameters of a text encoder that belong to the tower, by their names there."""
    return {
        name.removeprefix(PREFIX): p
        for name, p in encoder.named_parameters()
        if name.split(".")[0] != "text_projection"
    }


def _differing(encoder: Any, tower: Any) -> list[str]:
    """The names of an encoder's tensors that the tower lacks, or whose values differ after rounding to half precision."""
    expected = text_tensors(tower)
    return [name for name, p in text_tensors(encoder).items() if name not in expected or not alike(expected[name], p)]
