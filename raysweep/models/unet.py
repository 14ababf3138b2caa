"""Pixel-space models over one U-Net, unconditional or class-conditional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from raysweep.models import samplers
from raysweep.models.diffusion import Diffusion
from raysweep.models.folders import INDEX, NETWORK
from raysweep.models.validation import SCHEDULE


class OneUNet(Diffusion):
    """A model whose network is one U-Net. null_label: the class index that stands for "no class", if any."""

    reads: ClassVar[tuple[str, ...]] = (
        INDEX,
        *(f"unet/{name}" for name in NETWORK),
        f"scheduler/{SCHEDULE}",
        samplers.FILE,
    )

    @property
    def shape(self) -> tuple[int, int, int]:
        return unet_shape(self.net.config)

    def unconditional(self, count: int) -> torch.Tensor | None:
        return None if self.null_label is None else torch.full((count,), self.null_label, device=self.device)

    def fresh(self, seed: int) -> Self:
        return self.with_net(draw_weights(lambda: type(self.net).from_config(self.net.config), seed).to(self.dtype))


def unet_shape(config: Any) -> tuple[int, int, int]:
    """(C, H, W) of a U-Net's input, by its configuration."""
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def draw_weights(make: Callable[[], Any], seed: int) -> Any:
    """The network that `make` builds, with weights drawn from `seed`; the global random state is left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
