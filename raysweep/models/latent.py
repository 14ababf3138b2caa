"""Latent text-to-image diffusion models: the folders of diffusers' `StableDiffusionPipeline` and its two-encoder XL kin.

The trainable modules are the U-Net and the text encoders; the autoencoder is frozen. A condition is the tokens of a prompt,
(n, L); an XL model's second tokenizer appends its own to those of the first. Latents are the means of the encoder, scaled as
the pipelines scale them. Images are decoded as by the pipelines, but never filtered: a safety checker would hide from an audit
what the model draws.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from raysweep.models import samplers, weights
from raysweep.models.configuration import network_settings, tokenizer_settings
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import Embeddings
from raysweep.models.folders import INDEX, NETWORK, TOKENIZER, no_progress_bars, pipeline_class, read_json
from raysweep.models.pipeline_folder import check_autoencoder, check_classes, check_parts_fit, read_tokenizer
from raysweep.models.unet import draw_weights, unet_shape
from raysweep.models.validation import SCHEDULE, check_unet, ddim, schedule
from raysweep.storage.files import alike, digest_of, digest_state

PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MASKED = (0.3, 0.5, 0.7)  # shares of a caption's words, see `LatentText.reduced`


@dataclass(frozen=True)
class Frozen:
    """The parts of a pipeline that are not trained.

    scheduler: the folder's scheduler, saved unchanged. zero_null: the unconditional branch has embeddings of zeros instead of
    those of the empty prompt (XL).
    """

    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler: Any
    zero_null: bool = False


class LatentText(Diffusion):
    """A text-to-image model: U-Net, text encoders, tokenizers and a frozen autoencoder.

    Args:
        net: modules `unet`, `text_encoder` and, for an XL model, `text_encoder_2`.
        frozen: the rest of the pipeline.
        trains: names of the modules whose weights may change; None: as their `requires_grad` says.

    embeddings: a cache of prompts' embeddings, for a model whose text encoders do not change.
    """

    family = "text-ddpm"
    reads: ClassVar[tuple[str, ...]] = (
        INDEX,
        f"scheduler/{SCHEDULE}",
        samplers.FILE,
        *(f"{part}/{name}" for part in ("unet", "vae", "text_encoder", "text_encoder_2") for name in NETWORK),
        *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    )
    schedule_keys: ClassVar[frozenset[str]] = Diffusion.schedule_keys - {"clip_sample", "thresholding"}
    latent: ClassVar[bool] = True

    def __init__(self, net: nn.ModuleDict, frozen: Frozen, trains: tuple[str, ...] | None = None):
        super().__init__(net, ddim(frozen.scheduler, latent=True))
        self.frozen = frozen
        frozen.vae.requires_grad_(False).eval()
        if trains is not None:
            self.train_only(trains)
        self._embedded: tuple[Any, Any] = (None, None)
        self.embeddings: Embeddings | None = None

    @classmethod
    def build(cls, config: dict[str, Any], seed: int, vae: Path | None = None) -> LatentText:
        """A freshly initialised model.

        `config` holds keyword arguments of `unet`, `text_encoder`, `vae` and `scheduler`, and the `words` that the
        tokenizer knows as one token each; `token_scale` multiplies the fresh word embeddings. vae: folder of a trained
        autoencoder; None: a fresh one.
        """
        from raysweep.models.words import tokenizer_of

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = tokenizer_of(tuple(config["words"]), config["text_encoder"]["max_position_embeddings"])
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            text: Any = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **config["text_encoder"]))
            with torch.no_grad():  # small transformers learn faster from word embeddings larger than the library's
                text.get_input_embeddings().weight.mul_(config.get("token_scale", 1.0))
            net = nn.ModuleDict({"unet": UNet2DConditionModel(**config["unet"]), "text_encoder": text})
            if vae is None:
                autoencoder = AutoencoderKL(**config["vae"])
            else:
                autoencoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
        return cls(net, Frozen(autoencoder, (tokenizer,), DDIMScheduler(**config["scheduler"])))

    @classmethod
    def load(cls, folder: str | Path) -> LatentText:
        """Reads a pipeline's folder; safetensors only. Unused parts, such as its safety checker, may be absent.

        Raises ValueError if it is of another class, or if a part is missing, pickled, cut short, does not hold the tensors that it
        describes, or does not fit the others.
        """
        folder = Path(folder)
        xl = "XL" in pipeline_class(folder, PIPELINES)
        index = read_json(folder / INDEX)
        kinds = {"text_encoder": CLIPTextModel} | ({"text_encoder_2": CLIPTextModelWithProjection} if xl else {})
        check_classes(folder, index, {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **kinds})
        modules: dict[str, Any] = {"unet": weights.read(UNet2DConditionModel, folder / "unet")}
        check_unet(folder / "unet", modules["unet"].config)
        vae = weights.read(AutoencoderKL, folder / "vae")
        check_autoencoder(folder / "vae", vae.config)
        for part, kind in kinds.items():
            modules[part] = weights.read(kind, folder / part, dtype=torch.float32)
        encoders = [m for n, m in modules.items() if n != "unet"]
        tokenizers = tuple(
            read_tokenizer(folder / part.replace("text_encoder", "tokenizer"), encoder)
            for part, encoder in zip(kinds, encoders, strict=True)
        )
        check_parts_fit(folder, modules["unet"].config, vae.config, encoders, xl)
        scheduler, _ = schedule(folder / "scheduler", latent=True)
        zero = bool(xl and index.get("force_zeros_for_empty_prompt", True))
        net = nn.ModuleDict(modules).float().eval()
        model = cls(net, Frozen(vae.float(), tokenizers, scheduler, zero), tuple(modules))
        model.sampler = samplers.load(folder, model)
        return model

    def save(self, folder: str | Path) -> None:
        with no_progress_bars():
            self.pipeline().save_pretrained(folder, safe_serialization=True)
        samplers.save(folder, self)

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The pipeline of diffusers that holds these modules."""
        frozen, net = self.frozen, self.net
        shared = {
            "vae": frozen.vae,
            "unet": net["unet"],
            "text_encoder": net["text_encoder"],
            "tokenizer": frozen.tokenizers[0],
            "scheduler": frozen.scheduler,
        }
        if "text_encoder_2" in net:
            return StableDiffusionXLPipeline(
                **shared,
                text_encoder_2=net["text_encoder_2"],
                tokenizer_2=frozen.tokenizers[1],
                force_zeros_for_empty_prompt=frozen.zero_null,
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def with_net(self, net: Any) -> LatentText:
        other = type(self)(net, self.frozen)
        other.alphas = self.alphas
        if self.embeddings is not None and _same(self.encoders, other.encoders):
            other.embeddings = self.embeddings
        return other

    def fresh(self, seed: int) -> LatentText:
        def modules() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    name: type(m).from_config(m.config) if name == "unet" else type(m)(copy.deepcopy(m.config))
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
        return [module for name, module in self.net.items() if name != "unet"]

    def adapt(self, rank: int, alpha: int, seed: int) -> None:
        """Adds low-rank adapters (LoRA, arXiv:2106.09685) to the attention of the U-Net, and trains nothing but them."""
        from peft import LoraConfig

        self.net.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=ATTENTION)
            self.net["unet"].add_adapter(config)

    def merge(self) -> None:
        """Merges adapters into the weights: a model whose adapters can be unloaded would have forgotten nothing."""
        unet: Any = self.net["unet"]
        if getattr(unet, "peft_config", None):
            unet.fuse_lora()
            unet.unload_lora()

    def to(self, device: torch.device) -> LatentText:
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

    def same_encoder(self, other: LatentText) -> bool:
        """Whether both have the same autoencoder, up to rounding to half precision, in which pipelines are often stored."""
        a, b = self.frozen.vae.state_dict(), other.frozen.vae.state_dict()
        same_factor = self.frozen.vae.config.scaling_factor == other.frozen.vae.config.scaling_factor
        return same_factor and a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)

    @property
    def shape(self) -> tuple[int, int, int]:
        return unet_shape(self.net["unet"].config)

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

    def unconditional(self, count: int) -> torch.Tensor:
        return self.tokens([""]).to(self.device).expand(count, -1)

    @torch.no_grad()
    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """The reduced prompts of CLiD (Zhai et al., arXiv:2405.14800): without the most important 30, 50 and 70 % of their words,
        and empty. The importance of a word is 1 - cosine between the pooled states of the (first) text encoder with and
        without it.
        """
        tokenizer = self.frozen.tokenizers[0]
        prompts = tokenizer.batch_decode(cond[:, : tokenizer.model_max_length], skip_special_tokens=True)
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
        tokens = self.tokens(texts).to(self.device)[:, : self.frozen.tokenizers[0].model_max_length]
        complete, *shortened = self.net["text_encoder"](tokens).pooler_output.float()
        importance = [1 - float(torch.cosine_similarity(complete, state, dim=0)) for state in shortened]
        return sorted(range(len(words)), key=lambda i: -importance[i])

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        vae = self.frozen.vae
        return (vae.encode(x.to(vae.dtype)).latent_dist.mean * vae.config.scaling_factor).to(x.dtype)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        vae = self.frozen.vae
        images = vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample.to(z.dtype)
        if not bool(torch.isfinite(images).all()):
            raise ValueError("the autoencoder gave values that are not finite, which would be shown as black images")
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        tokens = self.unconditional(len(x_t)) if cond is None else cond
        hidden, added = self.embed(tokens)
        return self.net["unet"](x_t, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample

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
        return super().outline(x, cond)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """The embeddings that the U-Net attends to, (n, length, width), and the further conditions of an XL U-Net.

        Embeddings come from `embeddings` where it holds them. Without gradients the last ones are cached until tokens or weights
        change, because a sampler asks for the same at every step.
        """
        embedded = None if self.embeddings is None else self.embeddings.look_up(tokens)
        if embedded is None and torch.is_grad_enabled():
            embedded = self.encoded(tokens)
        elif embedded is None:
            versions = tuple(p._version for module in self.encoders for p in module.parameters())
            half = torch.is_autocast_enabled(tokens.device.type)
            key = (tokens.cpu().numpy().tobytes(), tuple(tokens.shape), versions, half)
            if self._embedded[0] != key:
                self._embedded = (key, self.encoded(tokens))
            embedded = self._embedded[1]
        hidden, pooled = embedded
        if pooled is None:
            return hidden, None
        _, height, width = self.image_shape
        sizes = torch.tensor([height, width, 0, 0, height, width], device=tokens.device, dtype=hidden.dtype)
        return hidden, {"text_embeds": pooled, "time_ids": sizes.expand(len(tokens), -1)}

    def attended(self, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings that the U-Net attends to for prompts (n, L), (n, length, width), and each prompt's last word in them, (n,)."""
        tokenizer = self.frozen.tokenizers[0]
        end = (cond[:, : tokenizer.model_max_length] == tokenizer.eos_token_id).int().argmax(1)
        return self.embed(cond)[0], end - 1

    def encoded(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states of the text encoders, (n, length, width), and the pooled ones of an XL model, (n, width)."""
        first = self.net["text_encoder"]
        if "text_encoder_2" not in self.net:
            return first(tokens)[0], None
        length = self.frozen.tokenizers[0].model_max_length
        outputs = [
            encoder(part, output_hidden_states=True)
            for encoder, part in ((first, tokens[:, :length]), (self.net["text_encoder_2"], tokens[:, length:]))
        ]
        hidden, pooled = torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1][0]
        if self.frozen.zero_null:
            null = (tokens == self.unconditional(1)).all(1)
            hidden, pooled = hidden.masked_fill(null[:, None, None], 0), pooled.masked_fill(null[:, None], 0)
        return hidden, pooled


def adaptable(unet: nn.Module) -> list[nn.Parameter]:
    """The weights that adapters change once they are merged."""
    ends = tuple(f".{name}.weight" for name in ATTENTION)
    return [p for name, p in unet.named_parameters() if name.endswith(ends)]


def _same(encoders: list[nn.Module], others: list[nn.Module]) -> bool:
    """Whether two lists of networks have the same weights."""
    return all(
        torch.equal(a, b)
        for one, other in zip(encoders, others, strict=True)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
