"""The common base of all model handles: the network, its hash and its device."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from raysweep.models.configuration import network_settings
from raysweep.storage.files import digest_of, digest_state, rounded_digests


class Handle:
    """A model of a family, around its network.

    family: name of the family. reads: patterns of the files that `load` reads, relative to the folder, () if not stated; of files
    of weights, the ones of the usual variant. schedule_keys: the settings of the folder's scheduler that count. latent: whether the
    network denoises latents instead of images. net: the trainable modules.
    tower: the CLIP model of a text-to-image model's text encoder (`TextTower`), where the user named one. null_label: the class
    index that stands for "no class", if any. sampler: the sampler of a diffusion model; default_sampler: the usual one of its
    family.
    """

    family: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    schedule_keys: ClassVar[frozenset[str]] = frozenset()
    latent: ClassVar[bool] = False
    tower: Any = None
    net: Any
    null_label: int | None = None
    sampler: Any = None
    default_sampler: ClassVar[Any] = None

    @property
    def digest(self) -> str:
        """Content hash of everything that the model's output depends on: all tensors and `settings`."""
        return digest_of(digest_state(self.net.state_dict()), self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data: what the model's output depends on besides the tensors of its network."""
        return {"net": network_settings(self.net)}

    @property
    def networks(self) -> tuple[str, ...]:
        """Hashes of the network's tensors after rounding to each half precision.

        Models that share one have the same network, whatever their settings and the type of their tensors.
        """
        return rounded_digests(self.net.state_dict())

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
