"""The common base of all model handles: the network, its hash and its device."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from raysweep.storage.files import digest_state


class Handle:
    """A model of a family, around its network.

    family: name of the family. latent: whether the network denoises latents instead of images. net: the trainable modules.
    tower: the CLIP model of a text-to-image model's text encoder (`TextTower`), where the user named one. null_label: the class
    index that stands for "no class", if any. sampler: the sampler of a diffusion model; default_sampler: the usual one of its
    family.
    """

    family: ClassVar[str]
    latent: ClassVar[bool] = False
    tower: Any = None
    net: Any
    null_label: int | None = None
    sampler: Any = None
    default_sampler: ClassVar[Any] = None

    @property
    def digest(self) -> str:
        """Content hash of everything that the model's output depends on."""
        return digest_state(self.net.state_dict())

    # diffusers' own `dtype` walks through all modules at each access, a tenth of a step of a small network
    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device) -> Self:
        """Moves the model in place."""
        self.net.to(device)
        return self
