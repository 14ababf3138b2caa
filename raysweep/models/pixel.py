"""Pixel-space diffusion models over diffusers' `UNet2DModel`, unconditional or class-conditional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from raysweep.models import samplers, weights
from raysweep.models.folders import pipeline_class
from raysweep.models.unet import OneUNet, draw_weights
from raysweep.models.validation import check_unet, schedule

CLASSES = ("DDIMPipeline", "DDPMPipeline")


class PixelDDPM(OneUNet):
    """A U-Net and its noise schedule.

    Args:
        net: predicts epsilon or v for x_t of shape (n, C, H, W) and t of shape (n,).
        scheduler: as in `Diffusion`.
        null_label: the class index that stands for "no class"; None for an unconditional network.
    """

    family = "pixel-ddpm"

    def __init__(self, net: Any, scheduler: DDIMScheduler, null_label: int | None = None):
        super().__init__(net, scheduler)
        self.null_label = null_label

    @classmethod
    def build(cls, config: dict, seed: int) -> PixelDDPM:
        """A freshly initialised model. `config` holds `unet` and `scheduler` keyword arguments and `null_label`."""
        net = draw_weights(lambda: UNet2DModel(**config["unet"]), seed)
        return cls(net, DDIMScheduler(**config["scheduler"]), config.get("null_label"))

    @classmethod
    def load(cls, folder: str | Path) -> PixelDDPM:
        """Reads a diffusers folder (`DDIMPipeline.save_pretrained` layout, safetensors only).

        Of a class-conditional network the last class index stands for "no class". Raises ValueError, saying what is wrong with
        the folder.
        """
        folder = Path(folder)
        pipeline_class(folder, CLASSES)
        net = weights.read(UNet2DModel, folder / "unet")
        check_unet(folder / "unet", net.config)
        _, scheduler = schedule(folder / "scheduler")
        classes = net.config.num_class_embeds
        model = cls(net, scheduler, classes - 1 if classes else None)
        model.sampler = samplers.load(folder, model)
        return model

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `DDIMPipeline.from_pretrained` reads, and the sampler beside it if it is not the usual one."""
        DDIMPipeline(unet=self.net, scheduler=self.scheduler).save_pretrained(folder, safe_serialization=True)
        samplers.save(folder, self)

    def with_net(self, net: Any) -> PixelDDPM:
        other = type(self)(net, self.scheduler, self.null_label)
        other.alphas = self.alphas
        return other

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        labels = None
        if self.null_label is not None:
            labels = torch.full_like(t, self.null_label, dtype=torch.long) if cond is None else cond
        return self.net(x_t, t, class_labels=labels).sample
