"""Weights, arithmetic and activations of a network, counted from its configuration alone.

Nothing is allocated: single precision is counted on PyTorch's meta device, mixed precision on fake tensors of a GPU, which
need no GPU. Attention counts as a fused kernel, which keeps no attention matrix.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from raysweep.models.folders import quiet_logs

if TYPE_CHECKING:
    from methods.base import Method

# Stable Diffusion as published for 1.4.
STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# Stable Diffusion 3 medium as published: its transformer, CLIP-L, CLIP-G and the encoder of T5 v1.1 XXL.
STABLE_DIFFUSION_3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
CLIP_L: dict[str, Any] = TEXT_ENCODER | {"projection_dim": 768}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
SHIFTED_AUTOENCODER = AUTOENCODER | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
TEXT_LENGTH, T5_LENGTH = 77, 256
SINGLE = 4  # bytes of a number in single precision


@dataclass(frozen=True)
class Footprint:
    """The size of a network and the cost of a forward pass.

    parameters: number of weights of the denoising network, or of all that there is; module: its name in a text-to-image model's
    folder; others: the weights of further modules, by name. flops: floating-point operations per row.
    activations: bytes per row that a pass in single precision keeps for its backward pass; mixed: the same in bf16 mixed
    precision, where normalisations stay in single precision. casts: bytes of that pass's copies of the weights, for any
    number of rows. adaptable: weights that adapters change.
    """

    parameters: int
    flops: float
    activations: float
    others: dict[str, int] = field(default_factory=dict)
    mixed: float = 0.0
    casts: float = 0.0
    adaptable: int = 0
    module: str = "unet"

    @property
    def saved(self) -> int:
        """Bytes of the model saved in single precision."""
        return SINGLE * (self.parameters + sum(self.others.values()))

    def trained(self, modules: tuple[str, ...]) -> int:
        """Number of weights that train if these modules do; () for all modules but an autoencoder."""
        sizes = {self.module: self.parameters} | self.others
        return sum(sizes[m] for m in modules or [m for m in sizes if m != "vae"] if m in sizes)

    def step(self, method: type[Method], rows: float, modules: tuple[str, ...] = (), precision: str = "fp32") -> float:
        """Peak bytes of a training step of a method on so many rows; precision: fp32 or bf16.

        `method.copies` and `method.tape` state what it holds (see `methods.base.Method`).
        """
        trained = self.trained(modules)
        frozen = self.saved / SINGLE - trained
        activations = self.activations * rows if precision == "fp32" else self.mixed * rows + self.casts
        return SINGLE * (trained * method.copies + frozen) + activations * method.tape


def of(network: dict[str, Any]) -> Footprint:
    """The footprint of an architecture, given as a mapping with one entry.

    {"unet": arguments of UNet2DModel}, {"song_unet": arguments of SongUNet}, {"clip": name of an open_clip configuration},
    {"stable_diffusion": arguments of UNet2DConditionModel that differ from version 1.4's}, or {"stable_diffusion_3": arguments of
    SD3Transformer2DModel that differ from the medium model's}. Raises ValueError for another one.
    """
    return _of(json.dumps(network))


@functools.cache
def _of(network: str) -> Footprint:
    ((kind, config),) = json.loads(network).items()
    with quiet_logs():
        if kind in ("unet", "song_unet"):
            return _of_unet(kind, config)
        if kind == "stable_diffusion":
            return _of_stable_diffusion(config or {})
        if kind == "stable_diffusion_3":
            return _of_stable_diffusion_3(config or {})
        if kind == "clip":
            return _of_clip(config)
    valid = "unet, song_unet, stable_diffusion, stable_diffusion_3, clip"
    raise ValueError(f"{kind!r} is not an architecture; valid: {valid}")


def measured(module: torch.nn.Module, run: Callable[[], torch.Tensor], rows: int = 1) -> Footprint:
    """The footprint of a module, in single precision; `run` does a forward pass of so many rows."""
    counter = FlopCounterMode(display=False)
    with _fused_attention() as attention, counter:
        activations = _kept_bytes(module, run)
    total = counter.get_total_flops() + sum(attention)
    return Footprint(_count(module), total / rows, activations / rows)


def with_mixed(
    footprint: Footprint, make: Callable[[], torch.nn.Module], run: Callable[[Any, int], torch.Tensor]
) -> Footprint:
    """Adds `mixed` and `casts` to a footprint. run(net, rows): does a forward pass of a network that `make` built."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), _fused_attention():
        net = make()
        # `torch.autocast` would refuse on a machine without a GPU
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_cache_enabled(False)
        try:
            one, two = (_kept_bytes(net, functools.partial(run, net, rows)) for rows in (1, 2))
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.set_autocast_cache_enabled(before[2])
    return replace(footprint, mixed=float(two - one), casts=float(2 * one - two))


def _kept_bytes(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Bytes that the graph of `run()` keeps for its backward pass, besides the module's weights."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # with the tensor, so that no other storage gets the same address
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = run()
    del output
    return sum(size for size, _ in kept.values())


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _of_unet(kind: str, config: dict[str, Any]) -> Footprint:
    from raysweep.models.edm import NETWORKS

    def run(net: Any, rows: int) -> torch.Tensor:
        size, channels = net.config.sample_size, net.config.in_channels
        labels = torch.zeros(rows, dtype=torch.long) if net.config.num_class_embeds else None
        noise: torch.Tensor = net(
            torch.empty(rows, channels, size, size), torch.zeros(rows), class_labels=labels
        ).sample
        return noise

    return _both(lambda: NETWORKS[kind](**config), run)


def _of_stable_diffusion(config: dict[str, Any]) -> Footprint:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from raysweep.models.latent import ATTENTION
    from raysweep.models.text_to_image import adaptable

    def run(net: Any, rows: int) -> torch.Tensor:
        size, width = net.config.sample_size, net.config.cross_attention_dim
        text = torch.empty(rows, TEXT_LENGTH, width)
        noise: torch.Tensor = net(torch.empty(rows, 4, size, size), torch.zeros(rows), text).sample
        return noise

    with torch.device("meta"):
        encoder, vae = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)), AutoencoderKL(**AUTOENCODER)
        unet = UNet2DConditionModel(**STABLE_DIFFUSION | config)
    others = {"text_encoder": _count(encoder), "vae": _count(vae)}
    adapted = sum(p.numel() for p in adaptable(unet, ATTENTION))
    return replace(
        _both(lambda: UNet2DConditionModel(**STABLE_DIFFUSION | config), run), others=others, adaptable=adapted
    )


def _of_stable_diffusion_3(config: dict[str, Any]) -> Footprint:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from raysweep.models.flow import Flow
    from raysweep.models.text_to_image import adaptable

    def run(net: Any, rows: int) -> torch.Tensor:
        taken = net.config
        text = torch.empty(rows, TEXT_LENGTH + T5_LENGTH, taken.joint_attention_dim)
        latents = torch.empty(rows, taken.in_channels, taken.sample_size, taken.sample_size)
        pooled = torch.empty(rows, taken.pooled_projection_dim)
        velocity: torch.Tensor = net(latents, text, pooled, torch.zeros(rows)).sample
        return velocity

    def make() -> Any:
        return SD3Transformer2DModel(**STABLE_DIFFUSION_3 | config)

    with torch.device("meta"):
        others = {
            "text_encoder": _count(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L))),
            "text_encoder_2": _count(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))),
            "text_encoder_3": _count(T5EncoderModel(T5Config(**T5_XXL))),
            "vae": _count(AutoencoderKL(**SHIFTED_AUTOENCODER)),
        }
        adapted = sum(p.numel() for p in adaptable(make(), Flow.adapted))
    return replace(_both(make, run), others=others, adaptable=adapted, module=Flow.denoiser)


def _of_clip(name: str) -> Footprint:
    import open_clip

    def run(net: Any, rows: int) -> torch.Tensor:
        size = net.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        images = net.encode_image(torch.empty(rows, 3, height, width))
        embeddings: torch.Tensor = images + net.encode_text(torch.zeros(rows, TEXT_LENGTH, dtype=torch.long))
        return embeddings

    def make() -> Any:  # `open_clip.create_model` moves the model, which fake tensors do not support
        config = dict(open_clip.get_model_config(name) or {})
        custom = config.pop("custom_text", False)
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)

    return _both(make, run)


def _both(make: Callable[[], Any], run: Callable[[Any, int], torch.Tensor]) -> Footprint:
    """The footprint of a network that `make` builds, in single and in mixed precision."""
    with torch.device("meta"):
        net = make()
        single = measured(net, lambda: run(net, 1))
    return with_mixed(single, make, run)


class _Attention(torch.autograd.Function):
    """Attention that keeps only inputs and output for its backward pass, as a fused kernel does."""

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
    """Replaces attention by `_Attention` inside a `with` block; yields the operations of each call."""
    flops: list[float] = []
    original = F.scaled_dot_product_attention

    def replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        flops.append(2.0 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        out: torch.Tensor = _Attention.apply(q, k, v)
        return out

    F.scaled_dot_product_attention = replacement  # type: ignore[assignment]
    try:
        yield flops
    finally:
        F.scaled_dot_product_attention = original
