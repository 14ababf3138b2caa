"""The common base of latent text-to-image models: a pipeline of diffusers around a network that denoises latents.

The trainable modules are the denoising network and the text encoders, by their names in the pipeline's folder; the autoencoder
is frozen. A condition is the tokens of a prompt, (n, L): those of every tokenizer in the order of its encoder. Latents are the
means of the encoder, shifted and scaled as the pipelines do. Images are decoded as by the pipelines, but never filtered: a
safety checker would hide from an audit what the model draws.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import nn

from raysweep.models import samplers
from raysweep.models.configuration import network_settings, tokenizer_settings
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import Embeddings
from raysweep.models.folders import no_progress_bars, quiet_logs
from raysweep.models.unet import draw_weights, unet_shape
from raysweep.storage.files import alike, digest_of, digest_state

MASKED = (0.3, 0.5, 0.7)  # shares of a caption's words, see `TextToImage.reduced`


@dataclass(frozen=True)
class Frozen:
    """The parts of a pipeline that are not trained.

    tokenizers: in the order of the text encoders. scheduler: the folder's scheduler, saved unchanged. zero_null: the
    unconditional branch has embeddings of zeros instead of those of the empty prompt (Stable Diffusion XL).
    """

    vae: AutoencoderKL
    tokenizers: tuple[Any, ...]
    scheduler: Any
    zero_null: bool = False


class TextToImage(Diffusion):
    """A text-to-image model: denoising network, text encoders, tokenizers and a frozen autoencoder.

    Args:
        net: the denoising network and the text encoders.
        frozen: the rest of the pipeline.
        trains: names of the modules whose weights may change; None: as their `requires_grad` says.

    denoiser: the name of the denoising network among the modules of `net`; the others are text encoders. adapted: the layers
    that adapters change, by the end of their names. embeddings: a cache of prompts' embeddings, for a model whose text encoders
    do not change.
    """

    latent: ClassVar[bool] = True
    denoiser: ClassVar[str]
    adapted: ClassVar[tuple[str, ...]]

    def __init__(self, net: nn.ModuleDict, frozen: Frozen, trains: tuple[str, ...] | None = None):
        self.net, self.frozen, self.sampler = net, frozen, self.default_sampler
        self.use_schedule(frozen.scheduler)
        frozen.vae.requires_grad_(False).eval()
        if trains is not None:
            self.train_only(trains)
        self._embedded: tuple[Any, Any] = (None, None)
        self.embeddings: Embeddings | None = None

    @abstractmethod
    def pipeline(self) -> Any:
        """The pipeline of diffusers that holds these modules."""

    @abstractmethod
    def encoded(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text encoders' hidden states that the network attends to, (n, length, width), and the pooled ones, (n, width),
        or None if it takes none."""

    @abstractmethod
    def summary(self, tokens: torch.Tensor) -> torch.Tensor:
        """One state per prompt, (n, width): the pooled one of the first text encoder."""

    def save(self, folder: str | Path) -> None:
        with no_progress_bars(), quiet_logs():  # diffusers warns of text encoders that are absent
            self.pipeline().save_pretrained(folder, safe_serialization=True)
        samplers.save(folder, self)

    def with_net(self, net: Any) -> Self:
        other = type(self)(net, self.frozen)
        other.alphas = self.alphas
        if self.embeddings is not None and _same(self.encoders, other.encoders):
            other.embeddings = self.embeddings
        return other

    def fresh(self, seed: int) -> Self:
        def modules() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: type(m).from_config(m.config) if name == self.denoiser else type(m)(copy.deepcopy(m.config))
                    for name, m in self.net.items()
                }
            )

        return self.with_net(draw_weights(modules, seed).to(self.dtype))

    def train_only(self, modules: tuple[str, ...]) -> None:
        """Lets only the weights of these modules change; raises ValueError for one that there is not."""
        unknown = sorted(set(modules) - set(self.net))
        if unknown:
            raise ValueError(f"the model has no module {', '.join(unknown)}; valid: {', '.join(self.net)}")
        for name, module in self.net.items():
            module.requires_grad_(name in modules)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders."""
        return [module for name, module in self.net.items() if name != self.denoiser]

    @property
    def columns(self) -> dict[str, slice]:
        """Each text encoder's columns of a row of tokens, by its name in `net`."""
        spans, start = {}, 0
        names = [name for name in self.net if name != self.denoiser]
        for name, tokenizer in zip(names, self.frozen.tokenizers, strict=True):
            spans[name] = slice(start, start + tokenizer.model_max_length)
            start += tokenizer.model_max_length
        return spans

    def adapt(self, rank: int, alpha: int, seed: int) -> None:
        """Adds low-rank adapters (LoRA, arXiv:2106.09685) to the network's attention, and trains nothing but them."""
        from peft import LoraConfig

        self.net.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = list(self.adapted)
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
            self.net[self.denoiser].add_adapter(config)

    def merge(self) -> None:
        """Merges adapters into the weights: a model whose adapters can be unloaded would have forgotten nothing."""
        network: Any = self.net[self.denoiser]
        if getattr(network, "peft_config", None):
            network.fuse_lora()
            network.unload_lora()

    def adaptable(self) -> list[nn.Parameter]:
        """The weights that adapters change once they are merged."""
        return adaptable(self.net[self.denoiser], self.adapted)

    def to(self, device: torch.device) -> Self:
        self.frozen.vae.to(device)
        return super().to(device)

    @property
    def digest(self) -> str:
        return digest_of(super().digest, self.encoder_digest)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data: as of other diffusion models, for each network, the tokenizers and the unconditional branch."""
        return {
            **super().settings,
            "net": {name: network_settings(module) for name, module in self.net.items()},
            "tokenizers": [tokenizer_settings(tokenizer) for tokenizer in self.frozen.tokenizers],
            "zero_null": self.frozen.zero_null,
        }

    @property
    def encoder_digest(self) -> str:
        """Content hash of the autoencoder and its settings, which latents depend on."""
        return digest_of(digest_state(self.frozen.vae.state_dict()), network_settings(self.frozen.vae))

    def same_encoder(self, other: TextToImage) -> bool:
        """Whether both have the same autoencoder, up to rounding to half precision, in which pipelines are often stored."""
        a, b = self.frozen.vae.state_dict(), other.frozen.vae.state_dict()
        same_latents = self.latent_scale == other.latent_scale
        return same_latents and a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)

    @property
    def shape(self) -> tuple[int, int, int]:
        return unet_shape(self.net[self.denoiser].config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        factor = 2 ** (len(self.frozen.vae.config.block_out_channels) - 1)
        return self.frozen.vae.config.out_channels, self.shape[1] * factor, self.shape[2] * factor

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """(n, L): the tokens of each prompt, cut and padded to the tokenizers' lengths as the pipelines do."""
        tokens = [
            t(
                prompts, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids
            for t in self.frozen.tokenizers
        ]
        return torch.cat(tokens, 1)

    def too_long(self, prompts: list[str]) -> dict[str, list[str]]:
        """The prompts that a text encoder does not read to their end, by a sentence that says which one."""
        cut: dict[str, list[str]] = {}
        for (name, span), tokenizer in zip(self.columns.items(), self.frozen.tokenizers, strict=True):
            length = span.stop - span.start
            ids = tokenizer(prompts, truncation=False, padding=False, verbose=False).input_ids
            longer = [prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) > length]
            if longer:
                cut[f"longer than the {length} tokens that {name} reads, which sees only the beginning"] = longer
        return cut

    def unconditional(self, count: int) -> torch.Tensor:
        return self.tokens([""]).to(self.device).expand(count, -1)

    @torch.no_grad()
    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """The reduced prompts of CLiD (Zhai et al., arXiv:2405.14800): without the most important 30, 50 and 70 % of their words,
        and empty. The importance of a word is 1 - cosine between the `summary` of the prompt with and without it. Prompts are
        read from the tokens of the tokenizer with the most tokens, the first of several.
        """
        spans = list(self.columns.values())
        longest = max(range(len(spans)), key=lambda k: spans[k].stop - spans[k].start)
        tokenizer = self.frozen.tokenizers[longest]
        prompts = tokenizer.batch_decode(cond[:, spans[longest]], skip_special_tokens=True)
        ranked = {prompt: self._by_importance(prompt.split()) for prompt in dict.fromkeys(prompts)}

        def without(prompt: str, share: float) -> str:
            words = prompt.split()
            dropped = ranked[prompt][: max(1, round(share * len(words)))]
            return " ".join(word for i, word in enumerate(words) if i not in dropped)

        masked = [self.tokens([without(prompt, share) for prompt in prompts]).to(cond.device) for share in MASKED]
        return [*masked, self.unconditional(len(cond)).to(cond.device)]

    def _by_importance(self, words: list[str]) -> list[int]:
        """Indices of words, the most important one first."""
        if not words:
            return []
        texts = [" ".join(words), *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
        complete, *shortened = self.summary(self.tokens(texts).to(self.device)).float()
        importance = [1 - float(torch.cosine_similarity(complete, state, dim=0)) for state in shortened]
        return sorted(range(len(words)), key=lambda i: -importance[i])

    @property
    def latent_scale(self) -> tuple[float, float]:
        """(factor, shift): latents are (mean - shift) * factor."""
        config = self.frozen.vae.config
        return config.scaling_factor, config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        vae, (factor, shift) = self.frozen.vae, self.latent_scale
        return ((vae.encode(x.to(vae.dtype)).latent_dist.mean - shift) * factor).to(x.dtype)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        vae, (factor, shift) = self.frozen.vae, self.latent_scale
        images = vae.decode(z.to(vae.dtype) / factor + shift).sample.to(z.dtype)
        if not bool(torch.isfinite(images).all()):
            raise ValueError("the autoencoder gave values that are not finite, which would be shown as black images")
        return images

    def outline(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        config = self.frozen.vae.config
        with x.device:
            vae: Any = AutoencoderKL.from_config(config)
        latent = vae.encode(x.new_empty(len(x), config.in_channels, *self.image_shape[1:])).latent_dist.mean
        image = vae.decode(x).sample
        if latent.shape != x.shape or image.shape[1:] != self.image_shape:
            raise ValueError(
                f"its autoencoder makes latents {tuple(latent.shape[1:])} of images {self.image_shape}, and images "
                f"{tuple(image.shape[1:])} of latents {tuple(x.shape[1:])}"
            )
        return self.shape_pass(x, cond)

    def shape_pass(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's output for latents x at some step, for its shape alone."""
        return super().outline(x, cond)

    def embedded(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `encoded` gives, without running the text encoders again where that is possible.

        Embeddings come from `embeddings` where it holds them. Without gradients the last ones are cached until tokens or weights
        change, because a sampler asks for the same at every step.
        """
        known = None if self.embeddings is None else self.embeddings.look_up(tokens)
        if known is not None:
            return known
        if torch.is_grad_enabled():
            return self.encoded(tokens)
        versions = tuple(p._version for module in self.encoders for p in module.parameters())
        half = torch.is_autocast_enabled(tokens.device.type)
        key = (tokens.cpu().numpy().tobytes(), tuple(tokens.shape), versions, half)
        if self._embedded[0] != key:
            self._embedded = (key, self.encoded(tokens))
        last: tuple[torch.Tensor, torch.Tensor | None] = self._embedded[1]
        return last


def adaptable(network: nn.Module, layers: tuple[str, ...]) -> list[nn.Parameter]:
    """The weights of a network that adapters on these layers change once they are merged."""
    ends = tuple(f".{name}.weight" for name in layers)
    return [p for name, p in network.named_parameters() if name.endswith(ends)]


def _same(encoders: list[nn.Module], others: list[nn.Module]) -> bool:
    """Whether two lists of networks have the same weights."""
    return all(
        torch.equal(a, b)
        for one, other in zip(encoders, others, strict=True)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
