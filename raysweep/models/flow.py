"""Rectified-flow transformers: the folders of diffusers' `StableDiffusion3Pipeline`.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024, arXiv:2403.03206.
With noise level s in (0, 1) and the network's output v, the velocity along the straight path from an image to noise,
    x_t = (1 - s) x0 + s eps,   v* = d x_t / d s = eps - x0,   loss = |v - v*|^2
so that in raysweep's symbols gamma = 1 - s and sigma = s, and at a given x_t
    x0 = x_t - s v,   eps = x_t + (1 - s) v,   |v - v*|^2 = |x0_hat - x0|^2 / s^2 = |eps_hat - eps|^2 / (1 - s)^2
The score of the noisy images is -eps/s at the best v. Methods and checks speak of steps t: step t of T has u = (t + 1/2)/T,
shifted as the folder's scheduler shifts it, s = c u / (1 + (c - 1) u). All levels are inside (0, 1), so nothing divides by 0. A
uniform t is a uniform u; the paper draws u from a logit-normal distribution in training. `alphas` is (1 - s)^2 / ((1 - s)^2 + s^2),
for which gamma/sigma is what it is on a schedule of betas. The network takes T s as its time.

Three text encoders read a prompt, CLIP-L, CLIP-G and T5, and each may be missing: then it gives zeros, as diffusers does for a
missing T5, and as in the paper's training, which drops each one at random.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from raysweep.models import samplers, weights
from raysweep.models.flow_folder import CLIPS, ENCODERS, check_levels, check_parts, encoders_of, flow_schedule
from raysweep.models.folders import INDEX, NETWORK, TOKENIZER, pipeline_class, read_json, reading
from raysweep.models.pipeline_folder import check_autoencoder, check_classes, read_tokenizer
from raysweep.models.text_to_image import Frozen, TextToImage
from raysweep.models.validation import SCHEDULE, check_unet

PIPELINES = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline}
CLIP_LENGTH, T5_LENGTH = 77, 256  # tokens that the pipeline takes by default


class Flow(TextToImage):
    """A rectified-flow transformer: modules `transformer` and, each if the pipeline has it, `text_encoder` (CLIP-L),
    `text_encoder_2` (CLIP-G) and `text_encoder_3` (T5)."""

    family = "flow"
    reads: ClassVar[tuple[str, ...]] = (
        INDEX,
        f"scheduler/{SCHEDULE}",
        samplers.FILE,
        *(f"{part}/{name}" for part in ("transformer", "vae", *ENCODERS) for name in NETWORK),
        *(f"{part.replace('text_encoder', 'tokenizer')}/{name}" for part in ENCODERS for name in TOKENIZER),
    )
    schedule_keys: ClassVar[frozenset[str]] = frozenset(
        inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    )
    default_sampler: ClassVar[samplers.Sampler] = samplers.Euler()
    denoiser = "transformer"
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def use_schedule(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self.scheduler, self.prediction = scheduler, "flow"
        steps = scheduler.config.num_train_timesteps
        u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        if scheduler.config.use_dynamic_shifting:
            s = scheduler.time_shift(self.mu, 1.0, u)
        else:
            s = scheduler.shift * u / (1 + (scheduler.shift - 1) * u)
        self.alphas = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)

    @property
    def mu(self) -> float | None:
        """The pipeline's parameter of the shift that depends on the resolution; None for a scheduler with a constant shift."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        _, height, width = self.shape
        patch = self.net["transformer"].config.patch_size
        limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        mu: float = calculate_shift((height // patch) * (width // patch), *limits)
        return mu

    @classmethod
    def build(cls, config: dict[str, Any], seed: int, vae: Path | None = None) -> Flow:
        """A freshly initialised model.

        `config` holds keyword arguments of `transformer`, `vae`, `scheduler` and of the text encoders that it is to have, and
        the `words` that tokenizers know as one token each; `t5_tokens` is the length of T5's prompts. vae: folder of a trained
        autoencoder; None: a fresh one.
        """
        from raysweep.models.words import t5_tokenizer_of, tokenizer_of

        words, tokenizers = tuple(config["words"]), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules: dict[str, Any] = {"transformer": SD3Transformer2DModel(**config["transformer"])}
            for name in ENCODERS:
                if name not in config:
                    continue
                if name in CLIPS:
                    tokenizer: Any = tokenizer_of(words, config[name]["max_position_embeddings"])
                    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
                    clip = CLIPTextConfig(vocab_size=len(tokenizer), **ids, **config[name])
                    modules[name] = CLIPTextModelWithProjection(clip)
                else:
                    tokenizer = t5_tokenizer_of(words, config["t5_tokens"])
                    modules[name] = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **config[name]))
                tokenizers.append(tokenizer)
            if vae is None:
                autoencoder = AutoencoderKL(**config["vae"])
            else:
                autoencoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False)
        autoencoder.register_to_config(shift_factor=autoencoder.config.shift_factor or 0.0)  # the pipeline adds it
        scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
        return cls(nn.ModuleDict(modules), Frozen(autoencoder, tuple(tokenizers), scheduler))

    @classmethod
    def load(cls, folder: str | Path) -> Flow:
        """Reads a pipeline's folder; safetensors only. The index says which text encoders it has; at least one.

        Raises ValueError if it is of another class, or if a part is missing, pickled, cut short, does not hold the tensors that it
        describes, or does not fit the others.
        """
        folder = Path(folder)
        pipeline_class(folder, PIPELINES)
        index = read_json(folder / INDEX)
        check_classes(folder, index, {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL})
        kinds = encoders_of(folder, index)
        modules: dict[str, Any] = {"transformer": weights.read(SD3Transformer2DModel, folder / "transformer")}
        check_unet(folder / "transformer", modules["transformer"].config)
        vae = weights.read(AutoencoderKL, folder / "vae")
        check_autoencoder(folder / "vae", vae.config, shifted=True)
        tokenizers = []
        for part, kind in kinds.items():
            modules[part] = encoder = weights.read(kind, folder / part, dtype=torch.float32)
            place = folder / part.replace("text_encoder", "tokenizer")
            if part in CLIPS:
                tokenizers.append(read_tokenizer(place, encoder, CLIPTokenizer))
            else:
                tokenizers.append(read_tokenizer(place, encoder, T5Tokenizer, T5_LENGTH))
        check_parts(folder, modules, vae.config, dict(zip(kinds, tokenizers, strict=True)))
        net = nn.ModuleDict(modules).float().eval()
        frozen = Frozen(vae.float(), tuple(tokenizers), flow_schedule(folder / "scheduler"))
        with reading(folder / "scheduler" / SCHEDULE):
            model = cls(net, frozen, tuple(modules))
        check_levels(folder / "scheduler" / SCHEDULE, model)
        model.sampler = samplers.load(folder, model)
        return model

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline of diffusers that holds these modules."""
        modules = dict(self.net.items())
        tokenizers = dict(zip(self.columns, self.frozen.tokenizers, strict=True))
        text = {name: modules.get(name) for name in ENCODERS}
        text |= {name.replace("text_encoder", "tokenizer"): tokenizers.get(name) for name in ENCODERS}
        frozen = self.frozen
        return StableDiffusion3Pipeline(
            transformer=modules["transformer"], scheduler=frozen.scheduler, vae=frozen.vae, **text
        )

    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.level(t).view(-1, 1, 1, 1)
        return (1 - s).to(self.dtype), s.to(self.dtype)

    def level(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level s of steps t, (n,), float64."""
        gamma, sigma = self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()
        return sigma / (gamma + sigma)

    def grid(self, steps: int, t: int | None = None) -> torch.Tensor:
        """Noise levels of a run by diffusers' scheduler, decreasing, the last one 0; (steps + 1,), float64.

        t: the step whose level is the first one; None: the run begins at pure noise.
        """
        scheduler = copy.deepcopy(self.scheduler)  # schedulers keep state
        if t is None:
            scheduler.set_timesteps(steps, mu=self.mu)
        else:
            first = (t + 0.5) / scheduler.config.num_train_timesteps
            before_shift = torch.linspace(first, min(first, scheduler.sigma_min), steps, dtype=torch.float64)
            scheduler.set_timesteps(sigmas=before_shift.tolist(), mu=self.mu)
        levels: torch.Tensor = scheduler.sigmas.double()
        return levels

    def velocity(self, x: torch.Tensor, s: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """v at x = (1 - s) x0 + s eps (n, C, H, W), for noise levels s (n,) in [0, 1]."""
        hidden, pooled = self.embedded(self.unconditional(len(x)) if cond is None else cond)
        time = self.scheduler.config.num_train_timesteps * s
        return self.net["transformer"](x, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=time).sample

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The velocity v."""
        return self.velocity(x_t, self.level(t), cond)

    def shape_pass(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return self.velocity(x, torch.ones(len(x), device=x.device), cond)

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return x_t + self.gamma_sigma(t)[0] * self.predict(x_t, t, cond)

    def x0(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return x_t - self.gamma_sigma(t)[1] * self.predict(x_t, t, cond)

    def eps_at(self, x: torch.Tensor, s: float, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted noise at x = x0 + s eps (n, C, H, W) for any s: x/(1 + s) has the noise level s/(1 + s)."""
        x_t = x / (1 + s)
        level = torch.full((len(x),), s / (1 + s), dtype=torch.float64, device=x.device)
        return x_t + self.velocity(x_t, level, cond) / (1 + s)

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The training target of `predict`: eps - x0, at every t."""
        return eps - x0

    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) with (predict - target)^2 = w(t) (x0_hat - x0)^2, shape (n, 1, 1, 1): 1/s^2."""
        return 1 / self.gamma_sigma(t)[1] ** 2

    def encoded(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states (n, length, width), pooled states (n, pooled width)) that the transformer takes.

        The last hidden states but one of both CLIP models lie side by side, filled up with zeros to the width of T5's, whose
        last ones follow them; the pooled ones are the projections of both CLIP models.
        """
        config, columns = self.net["transformer"].config, self.columns
        outputs = {
            name: self.net[name](tokens[:, columns[name]], output_hidden_states=True)
            for name in CLIPS
            if name in columns
        }
        length = max((out.hidden_states[-2].shape[1] for out in outputs.values()), default=CLIP_LENGTH)
        left = config.pooled_projection_dim - sum(out.text_embeds.shape[-1] for out in outputs.values())
        hidden, pooled = [], []
        for name in CLIPS:
            if name in outputs:
                hidden.append(outputs[name].hidden_states[-2])
                pooled.append(outputs[name].text_embeds)
            else:  # the width of a missing model's states is that of its projection
                hidden.append(self._zeros(tokens, length, left))
                pooled.append(self._zeros(tokens, left))
                left = 0
        clip, width = torch.cat(hidden, -1), config.joint_attention_dim
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        if "text_encoder_3" in columns:
            t5 = self.net["text_encoder_3"](tokens[:, columns["text_encoder_3"]])[0]
        else:
            t5 = self._zeros(tokens, T5_LENGTH, width)
        return torch.cat([clip, t5], 1), torch.cat(pooled, -1)

    def _zeros(self, tokens: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.zeros(len(tokens), *shape, dtype=self.dtype, device=tokens.device)

    def summary(self, tokens: torch.Tensor) -> torch.Tensor:
        """The projection of the first CLIP model; without one, the mean of T5's last states over the prompt's tokens."""
        name, span = next(iter(self.columns.items()))
        part = tokens[:, span]
        if name in CLIPS:
            state: torch.Tensor = self.net[name](part).text_embeds
            return state
        said = (part != self.frozen.tokenizers[0].pad_token_id)[..., None]
        return (self.net[name](part)[0] * said).sum(1) / said.sum(1)
