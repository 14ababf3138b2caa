"""What pixel-space models over one U-Net share, unconditional or class-conditional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from raysweep.models.diffusion import Diffusion


class OneUNet(Diffusion):
    """A model whose network is one U-Net. null_label: the class index that stands for "no class", if any."""

    @property
    def shape(self) -> tuple[int, int, int]:
        size = self.net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.net.config.in_channels, height, width

    def unconditional(self, count: int) -> torch.Tensor | None:
        return None if self.null_label is None else torch.full((count,), self.null_label, device=self.device)

    def fresh(self, seed: int) -> Self:
        return self.with_net(drawn(lambda: type(self.net).from_config(self.net.config), seed).to(self.dtype))


def drawn(make: Callable[[], Any], seed: int) -> Any:
    """What `make` builds with weights drawn from `seed`; the process's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
