"""Latent text-to-image diffusion models: the folders of diffusers' `StableDiffusionPipeline` and its two-encoder XL kin.

The trainable modules are the U-Net and the text encoders; the autoencoder is frozen. A condition is the tokens of a prompt,
(n, L), those of the second tokenizer of an XL model behind those of the first. The image of a latent is what the pipelines
make of it: nothing is filtered, since a safety checker would hide from an audit what the model draws. Latents are the
means of the encoder, scaled as the pipelines scale them.
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
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from raysweep.models import samplers, weights
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import Embeddings
from raysweep.models.folders import INDEX, component_files, pipeline_class, read_json, reading
from raysweep.models.sound import check_unet, ddim, schedule
from raysweep.storage.files import alike, digest_of, digest_state

PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}

for _logging in (diffusers_logging, transformers_logging):  # bars of files under those of a sweep tell nobody anything
    _logging.disable_progress_bar()


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LEAST = 3  # tokens of a prompt: a word between the two ends
MASKED = (0.3, 0.5, 0.7)  # shares of a caption's words, see `LatentText.reduced`


@dataclass(frozen=True)
class Frozen:
    """What a pipeline holds beside its trainable modules.

    scheduler: the configuration that the folder came with, kept as it is. zero_null: the unconditional branch has
    embeddings of zeros instead of those of the empty prompt (XL).
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

    embeddings: those of prompts that need not be embedded again, for a model whose text encoders do not change.
    """

    family = "text-ddpm"
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
            ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
            text: Any = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ends, **config["text_encoder"]))
            with torch.no_grad():  # small transformers learn faster from word embeddings larger than the library's
                text.get_input_embeddings().weight.mul_(config.get("token_scale", 1.0))
            net = nn.ModuleDict({"unet": UNet2DConditionModel(**config["unet"]), "text_encoder": text})
            own = (
                AutoencoderKL(**config["vae"])
                if vae is None
                else AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
            )
        return cls(net, Frozen(own, (tokenizer,), DDIMScheduler(**config["scheduler"])))

    @classmethod
    def load(cls, folder: str | Path) -> LatentText:
        """Reads a pipeline's folder; safetensors only. Parts that nothing here uses, such as its safety checker, may be absent.

        Raises ValueError if it is of another class, or a part of it is missing, pickled, cut short, of other tensors than it
        describes, or does not fit the others.
        """
        folder = Path(folder)
        xl = "XL" in pipeline_class(folder, PIPELINES)
        index = read_json(folder / INDEX)
        kinds = {"text_encoder": CLIPTextModel} | ({"text_encoder_2": CLIPTextModelWithProjection} if xl else {})
        _check_parts(folder, index, {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **kinds})
        modules: dict[str, Any] = {"unet": weights.read(UNet2DConditionModel, folder / "unet")}
        check_unet(folder / "unet", modules["unet"].config)
        vae = weights.read(AutoencoderKL, folder / "vae")
        _check_vae(folder / "vae", vae.config)
        for part, kind in kinds.items():
            modules[part] = weights.read(kind, folder / part, dtype=torch.float32)
        encoders = [m for n, m in modules.items() if n != "unet"]
        places = [folder / part.replace("text_encoder", "tokenizer") for part in kinds]
        tokenizers = tuple(_tokenizer(*pair) for pair in zip(places, encoders, strict=True))
        _check_together(folder, modules["unet"].config, vae.config, encoders, xl)
        given, _ = schedule(folder / "scheduler", latent=True)
        zero = bool(xl and index.get("force_zeros_for_empty_prompt", True))
        net = nn.ModuleDict(modules).float().eval()
        model = cls(net, Frozen(vae.float(), tokenizers, given, zero), tuple(modules))
        model.sampler = samplers.load(folder, model)
        return model

    def save(self, folder: str | Path) -> None:
        self.pipeline().save_pretrained(folder, safe_serialization=True)
        samplers.save(folder, self)

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """The pipeline of diffusers that holds these modules."""
        frozen, net = self.frozen, self.net
        shared = {"vae": frozen.vae, "unet": net["unet"], "text_encoder": net["text_encoder"], "scheduler": frozen.scheduler,
                  "tokenizer": frozen.tokenizers[0]}  # fmt: skip
        if "text_encoder_2" in net:
            return StableDiffusionXLPipeline(
                **shared, text_encoder_2=net["text_encoder_2"], tokenizer_2=frozen.tokenizers[1],
                force_zeros_for_empty_prompt=frozen.zero_null, add_watermarker=False,
            )  # fmt: skip
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = {
                n: type(m).from_config(m.config) if n == "unet" else type(m)(copy.deepcopy(m.config))
                for n, m in self.net.items()
            }
        return self.with_net(nn.ModuleDict(modules).to(self.dtype))

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
        """Puts low-rank adapters (LoRA, arXiv:2106.09685) on the attention of the U-Net; only they change from here on."""
        from peft import LoraConfig

        self.net.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=ATTENTION)
            self.net["unet"].add_adapter(config)

    def merge(self) -> None:
        """Adds what the adapters learned to the weights and removes them: an adapter that can be taken off again would bring
        back what was forgotten."""
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
    def encoder_digest(self) -> str:
        """Content hash of the autoencoder: latents of another one mean something else."""
        return digest_of(digest_state(self.frozen.vae.state_dict()), self.frozen.vae.config.scaling_factor)

    def same_encoder(self, other: LatentText) -> bool:
        """Whether latents of the other mean the same here; half precision, in which pipelines are often kept, counts as such."""
        own, theirs = self.frozen.vae, other.frozen.vae
        a, b = own.state_dict(), theirs.state_dict()
        factors = own.config.scaling_factor == theirs.config.scaling_factor
        return factors and a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.net["unet"].config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        factor = 2 ** (len(self.frozen.vae.config.block_out_channels) - 1)
        return self.frozen.vae.config.out_channels, self.shape[1] * factor, self.shape[2] * factor

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """(n, L): the tokens of each prompt, cut and padded to the tokenizers' lengths as the pipelines do."""
        found = [
            t(prompts, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt")
            for t in self.frozen.tokenizers
        ]
        return torch.cat([f.input_ids for f in found], 1)

    def unconditional(self, count: int) -> torch.Tensor:
        return self.tokens([""]).to(self.device).expand(count, -1)

    @torch.no_grad()
    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """The prompts without the 30, 50 and 70 % of their words that matter most, and the empty one: what CLiD compares with
        (Zhai et al., arXiv:2405.14800). Here a word matters by how far the pooled state of the (first) text encoder turns
        when the word is left out, 1 - cosine.
        """
        tokenizer = self.frozen.tokenizers[0]
        prompts = tokenizer.batch_decode(cond[:, : tokenizer.model_max_length], skip_special_tokens=True)
        ranked = {prompt: self._by_importance(prompt.split()) for prompt in dict.fromkeys(prompts)}

        def without(prompt: str, share: float) -> str:
            words = prompt.split()
            gone = ranked[prompt][: max(1, round(share * len(words)))]
            return " ".join(word for i, word in enumerate(words) if i not in gone)

        masked = [self.tokens([without(prompt, share) for prompt in prompts]).to(cond.device) for share in MASKED]
        return [*masked, self.unconditional(len(cond)).to(cond.device)]

    def _by_importance(self, words: list[str]) -> list[int]:
        """Places of words, from the one that matters most."""
        if not words:
            return []
        texts = [" ".join(words), *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
        tokens = self.tokens(texts).to(self.device)[:, : self.frozen.tokenizers[0].model_max_length]
        whole, *others = self.net["text_encoder"](tokens).pooler_output.float()
        turned = [1 - float(torch.cosine_similarity(whole, other, dim=0)) for other in others]
        return sorted(range(len(words)), key=lambda i: -turned[i])

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
        frozen = self.frozen.vae.config
        with x.device:
            vae: Any = AutoencoderKL.from_config(frozen)
        latent = vae.encode(x.new_empty(len(x), frozen.in_channels, *self.image_shape[1:])).latent_dist.mean
        image = vae.decode(x).sample
        if latent.shape != x.shape or image.shape[1:] != self.image_shape:
            raise ValueError(
                f"its autoencoder makes latents {tuple(latent.shape[1:])} of images {self.image_shape}, and images "
                f"{tuple(image.shape[1:])} of latents {tuple(x.shape[1:])}"
            )
        return super().outline(x, cond)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """What the U-Net attends to, (n, length, width), and what an XL U-Net is told besides.

        Prompts that are remembered are looked up. Without gradients the last embedding is kept, until tokens or weights
        change: a sampler asks for it at every step.
        """
        found = None if self.embeddings is None else self.embeddings.look_up(tokens)
        if found is None and torch.is_grad_enabled():
            found = self.encoded(tokens)
        elif found is None:
            weights = tuple(p._version for module in self.encoders for p in module.parameters())
            half = torch.is_autocast_enabled(tokens.device.type)
            key = (tokens.cpu().numpy().tobytes(), tuple(tokens.shape), weights, half)
            if self._embedded[0] != key:
                self._embedded = (key, self.encoded(tokens))
            found = self._embedded[1]
        hidden, pooled = found
        if pooled is None:
            return hidden, None
        _, height, width = self.image_shape
        sizes = torch.tensor([height, width, 0, 0, height, width], device=tokens.device, dtype=hidden.dtype)
        return hidden, {"text_embeds": pooled, "time_ids": sizes.expand(len(tokens), -1)}

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


def _check_parts(folder: Path, index: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Raises ValueError unless the parts that an index names are of these classes."""
    for part, kind in kinds.items():
        told = index.get(part)
        name = told[1] if isinstance(told, list) and len(told) == 2 else None
        if name != kind.__name__:
            raise ValueError(f"{folder / INDEX}: {part}: is {name or 'none'}; supported there: {kind.__name__}")


def _check_vae(folder: Path, config: Any) -> None:
    """Raises ValueError unless latents are the encoder's means times a factor."""
    where = folder / "config.json"
    if not isinstance(config.scaling_factor, int | float) or config.scaling_factor <= 0:
        raise ValueError(f"{where}: scaling_factor is {config.scaling_factor!r}; it must be a positive number")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ValueError(f"{where}: {key} is set: latents that are shifted are not supported, only scaled ones")


def _tokenizer(folder: Path, encoder: Any) -> CLIPTokenizer:
    """The tokenizer of a text encoder. Without a configuration of its own it has the encoder's length and CLIP's own padding."""
    component_files(folder, ("tokenizer.json", "vocab.json"))
    with reading(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length, known = encoder.config.max_position_embeddings, encoder.config.vocab_size
    if not (folder / "tokenizer_config.json").is_file():
        weights.tell(
            f"{folder}: tokenizer_config.json is missing: prompts are cut and padded to the {length} tokens of the text encoder, with "
            f"{tokenizer.pad_token!r} as padding"
        )
    told = tokenizer.model_max_length
    if not isinstance(told, int | float) or told < LEAST:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {told!r}; it must be {LEAST} or more"
        )
    tokenizer.model_max_length = int(min(told, length))
    if len(tokenizer) > known:
        raise ValueError(
            f"{folder.parent}: the tokenizer has {len(tokenizer)} tokens, but the text encoder knows {known}: "
            "they are not of the same model"
        )
    return tokenizer


def _check_together(folder: Path, unet: Any, vae: Any, encoders: list[Any], xl: bool) -> None:
    """Raises ValueError unless U-Net, autoencoder and text encoders fit each other."""
    if vae.latent_channels != unet.in_channels:
        raise ValueError(
            f"{folder}: the autoencoder makes latents of {vae.latent_channels} channels, and the U-Net "
            f"takes {unet.in_channels}: they are not of the same model"
        )
    width, taken = sum(e.config.hidden_size for e in encoders), unet.cross_attention_dim
    if not (taken == width or (isinstance(taken, list | tuple) and set(taken) == {width})):
        raise ValueError(
            f"{folder}: the text encoder{'s' * xl} give{'' if xl else 's'} embeddings of width {width}, and the U-Net attends to those "
            f"of {taken} (cross_attention_dim): they are not of the same model"
        )


def _same(encoders: list[nn.Module], others: list[nn.Module]) -> bool:
    """Whether two lists of networks have the same weights."""
    return all(
        torch.equal(a, b)
        for one, other in zip(encoders, others, strict=True)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
