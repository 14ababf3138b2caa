"""What a network costs, from its configuration alone: weights, arithmetic and activations, on PyTorch's meta device.

Nothing is allocated. Attention counts as the fused kernels of GPUs compute it, which keep no matrix of weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# The U-Net of Stable Diffusion 1.x and 2.x; the first is as published for 1.4.
STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TEXT_LENGTH = 77
SINGLE = 4  # bytes of a number in single precision


@dataclass(frozen=True)
class Footprint:
    """Of one forward pass of one row. flops: floating-point operations; activations: bytes in single precision that it keeps
    for its backward pass; parameters: how many weights the network has; others: those of further modules by name."""

    parameters: int
    flops: float
    activations: float
    others: dict[str, int] = field(default_factory=dict)

    @property
    def saved(self) -> int:
        """Bytes of a saved model in single precision."""
        return SINGLE * (self.parameters + sum(self.others.values()))

    def trained(self, modules: tuple[str, ...]) -> int:
        """How many weights change if only these modules train; all but an autoencoder's if there are none named."""
        there = {"unet": self.parameters} | self.others
        return sum(there[m] for m in modules or [m for m in there if m != "vae"] if m in there)


def of(network: dict[str, Any]) -> Footprint:
    """Of an architecture: {"unet": arguments of UNet2DModel}, {"song_unet": those of SongUNet}, {"stable_diffusion": arguments
    of UNet2DConditionModel that differ from those of version 1}, or {"clip": name of an open_clip configuration}. Raises
    ValueError for another one."""
    return _of(json.dumps(network))


@cache
def _of(network: str) -> Footprint:
    ((kind, how),) = json.loads(network).items()
    with torch.device("meta"), _quiet():
        if kind in ("unet", "song_unet"):
            return _of_unet(kind, how)
        if kind == "stable_diffusion":
            return _of_stable_diffusion(how or {})
        if kind == "clip":
            return _of_clip(how)
    raise ValueError(f"{kind!r} is not an architecture; valid: unet, song_unet, stable_diffusion, clip")


def measured(module: torch.nn.Module, run: Callable[[], torch.Tensor], rows: int = 1) -> Footprint:
    """Of a module that is there: `run` does a forward pass of so many rows."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # the tensor stays, so that its storage's name is not given again
        return tensor

    counter = FlopCounterMode(display=False)
    with _fused_attention() as attention, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    total = counter.get_total_flops() + sum(attention)
    return Footprint(_count(module), total / rows, sum(size for size, _ in kept.values()) / rows)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _of_unet(kind: str, config: dict[str, Any]) -> Footprint:
    from raysweep.models.edm import NETWORKS

    net: Any = NETWORKS[kind](**config)
    size, channels = net.config.sample_size, net.config.in_channels
    labels = torch.zeros(1, dtype=torch.long) if net.config.num_class_embeds else None
    return measured(net, lambda: net(torch.empty(1, channels, size, size), torch.zeros(1), class_labels=labels).sample)


def _of_stable_diffusion(config: dict[str, Any]) -> Footprint:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    net: Any = UNet2DConditionModel(**STABLE_DIFFUSION | config)
    size, width = net.config.sample_size, net.config.cross_attention_dim
    text = torch.empty(1, TEXT_LENGTH, width)
    encoder, vae = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)), AutoencoderKL(**AUTOENCODER)
    others = {"text_encoder": _count(encoder), "vae": _count(vae)}
    found = measured(net, lambda: net(torch.empty(1, 4, size, size), torch.zeros(1), text).sample)
    return replace(found, others=others)


def _of_clip(name: str) -> Footprint:
    import open_clip

    net = open_clip.create_model(name, pretrained=None, device="meta")
    size = net.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size

    def run() -> torch.Tensor:
        images = net.encode_image(torch.empty(1, 3, height, width))
        return images + net.encode_text(torch.zeros(1, TEXT_LENGTH, dtype=torch.long))

    return measured(net, run)


class _Attention(torch.autograd.Function):
    """Attention as a fused kernel keeps it for its backward pass: inputs and output alone."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextlib.contextmanager
def _fused_attention() -> Iterator[list[float]]:
    """Counts the operations of attention, and stands in for it."""
    found: list[float] = []
    real = F.scaled_dot_product_attention

    def stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        found.append(2.0 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return _Attention.apply(q, k, v)

    F.scaled_dot_product_attention = stand_in  # type: ignore[assignment]
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = real


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns that a model without weights has none."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
