"""Latent text-to-image diffusion models: the folders of diffusers' `StableDiffusionPipeline` and its two-encoder XL kin.

See `raysweep.models.text_to_image` for what they share with other latent models.
"""

from __future__ import annotations

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from raysweep.models import samplers, weights
from raysweep.models.diffusion import Diffusion
from raysweep.models.folders import INDEX, NETWORK, TOKENIZER, pipeline_class, read_json
from raysweep.models.pipeline_folder import check_autoencoder, check_classes, check_parts_fit, read_tokenizer
from raysweep.models.text_to_image import Frozen, TextToImage
from raysweep.models.validation import SCHEDULE, check_unet, ddim, schedule

PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LatentText(TextToImage):
    """A latent text-to-image model whose network is a U-Net: modules `unet`, `text_encoder` and, for an XL model,
    `text_encoder_2`."""

    family = "text-ddpm"
    reads: ClassVar[tuple[str, ...]] = (
        INDEX,
        f"scheduler/{SCHEDULE}",
        samplers.FILE,
        *(f"{part}/{name}" for part in ("unet", "vae", "text_encoder", "text_encoder_2") for name in NETWORK),
        *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    )
    schedule_keys: ClassVar[frozenset[str]] = Diffusion.schedule_keys - {"clip_sample", "thresholding"}
    denoiser = "unet"
    adapted = ATTENTION

    def use_schedule(self, scheduler: Any) -> None:
        super().use_schedule(ddim(scheduler, latent=True))

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

    def summary(self, tokens: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = self.net["text_encoder"](tokens[:, self.columns["text_encoder"]]).pooler_output
        return state

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        tokens = self.unconditional(len(x_t)) if cond is None else cond
        hidden, added = self.embed(tokens)
        return self.net["unet"](x_t, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """The embeddings that the U-Net attends to, (n, length, width), and the further conditions of an XL U-Net."""
        hidden, pooled = self.embedded(tokens)
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
        outputs = [self.net[name](tokens[:, span], output_hidden_states=True) for name, span in self.columns.items()]
        hidden, pooled = torch.cat([o.hidden_states[-2] for o in outputs], -1), outputs[1][0]
        if self.frozen.zero_null:
            null = (tokens == self.unconditional(1)).all(1)
            hidden, pooled = hidden.masked_fill(null[:, None, None], 0), pooled.masked_fill(null[:, None], 0)
        return hidden, pooled
