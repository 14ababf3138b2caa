"""Pixel-space diffusion models over diffusers' `UNet2DModel`, unconditional or class-conditional.

`PixelDDPM` is the handle that methods and evaluators see (see `methods.base.Model`): it hides the parameterisation
(epsilon or v prediction), draws every random number from per-row seeds, and samples with diffusers' own DDIM scheduler.
Symbols: alphas[t] is the cumulative product (often written with a bar), gamma = sqrt(alphas), sigma = sqrt(1 - alphas),
x_t = gamma x0 + sigma eps.

A model is its weights and the way it is sampled. Usually that is DDIM; a method may leave another sampler, which is saved
in `raysweep_sampler.json` beside the weights:
    {"kind": "one_step", "t": t}          a generator: x0 predicted once, from noise of step t
    {"kind": "safe", "concept": c, ...}   DDIM that steers away from class c (see `methods.sld`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from evaluators.base import ROWS
from methods.sld import SafetyGuidance
from raysweep.models.draws import normal_rows, uniform_rows
from raysweep.store import digest_of, digest_state

SAMPLER = "raysweep_sampler.json"


class PixelDDPM:
    """A U-Net and its noise schedule.

    Args:
        net: predicts epsilon or v for x_t of shape (n, C, H, W) and t of shape (n,).
        scheduler: a DDIM scheduler; its `prediction_type` says what `net` predicts ("epsilon" or "v_prediction").
        null_label: the class index that stands for "no class"; None for an unconditional network.
        sampler: how it is sampled, as plain data; None for DDIM.
    """

    family = "pixel-ddpm"

    def __init__(
        self,
        net: Any,
        scheduler: DDIMScheduler,
        null_label: int | None = None,
        sampler: dict[str, Any] | None = None,
    ):
        self.net, self.scheduler, self.null_label, self.sampler = net, scheduler, null_label, sampler
        self.prediction: str = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction!r} is not supported; valid: epsilon, v_prediction")
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.double()

    @classmethod
    def build(cls, config: dict, seed: int) -> PixelDDPM:
        """A freshly initialised model. `config` holds `unet` and `scheduler` keyword arguments and `null_label`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = UNet2DModel(**config["unet"])
        return cls(net, DDIMScheduler(**config["scheduler"]), config.get("null_label"))

    @classmethod
    def load(cls, folder: str | Path) -> PixelDDPM:
        """Reads a diffusers folder (`DDIMPipeline.save_pretrained` layout, safetensors only)."""
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder}: not a diffusers pipeline folder (model_index.json is missing)")
        unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
        if not unet.is_file():
            pickles = [p.name for p in (folder / "unet").glob("*.bin")]
            found = f"; found {', '.join(pickles)}, but pickled weights are never loaded" if pickles else ""
            raise ValueError(f"{unet}: missing: weights must be in safetensors format{found}")
        try:
            net = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False)
        except Exception as error:  # truncated or foreign files surface as many different exceptions
            raise ValueError(f"{unet}: cannot be read: {str(error).splitlines()[0]}") from error
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        classes = net.config.num_class_embeds
        special = folder / SAMPLER
        sampler = json.loads(special.read_text()) if special.is_file() else None
        if sampler is not None and sampler.get("kind") not in ("one_step", "safe"):
            raise ValueError(f"{special}: kind {sampler.get('kind')!r} is not a sampler; valid: one_step, safe")
        return cls(net, scheduler, classes - 1 if classes else None, sampler)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `DDIMPipeline.from_pretrained` reads, and the sampler beside it if it is not DDIM."""
        DDIMPipeline(unet=self.net, scheduler=self.scheduler).save_pretrained(folder, safe_serialization=True)
        if self.sampler is not None:
            (Path(folder) / SAMPLER).write_text(json.dumps(self.sampler, indent=2))

    def with_net(self, net: Any) -> PixelDDPM:
        """Another network of the same architecture, on the same schedule and with the usual sampler."""
        other = type(self)(net, self.scheduler, self.null_label)
        other.alphas = self.alphas
        return other

    def unconditional(self, count: int) -> torch.Tensor | None:
        """The condition of the unconditional branch for `count` rows; None where there is none to choose."""
        return None if self.null_label is None else torch.full((count,), self.null_label, device=self.device)

    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """Conditions that say less than `cond` (n, ...): here the null label alone."""
        null = self.unconditional(len(cond))
        return [] if null is None else [null]

    @property
    def digest(self) -> str:
        """Content hash of weights and sampler."""
        weights = digest_state(self.net.state_dict())
        return weights if self.sampler is None else digest_of(weights, self.sampler)

    def fresh(self, seed: int) -> PixelDDPM:
        """The same architecture with newly drawn weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = UNet2DModel.from_config(self.net.config)
        return self.with_net(net.to(self.dtype))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        size = self.net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.net.config.in_channels, height, width

    # diffusers' own `dtype` walks through every module at each look, a tenth of a step of a small network
    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device) -> PixelDDPM:
        """Moves the network and its schedule in place."""
        self.net.to(device)
        self.alphas = self.alphas.to(device)
        return self

    def noise(self, seeds: torch.Tensor) -> torch.Tensor:
        """Standard normal noise (n, C, H, W); row i depends on seeds[i] alone."""
        return normal_rows(seeds, self.shape).to(self.device, self.dtype)

    def uniform(self, seeds: torch.Tensor, columns: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), float64, shape (n, columns); row i depends on seeds[i] alone."""
        return uniform_rows(seeds, columns).to(self.device)

    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gamma, sigma) at t, each of shape (n, 1, 1, 1), in the model's dtype."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt().to(self.dtype), (1 - a).sqrt().to(self.dtype)

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = gamma x0 + sigma eps."""
        gamma, sigma = self.gamma_sigma(t)
        return gamma * x0 + sigma * eps

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's own output (epsilon or v). `cond` is ignored by an unconditional network."""
        labels = None
        if self.null_label is not None:
            labels = torch.full_like(t, self.null_label, dtype=torch.long) if cond is None else cond
        return self.net(x_t, t, class_labels=labels).sample

    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted noise, whatever the parameterisation."""
        output = self.predict(x_t, t, cond)
        if self.prediction == "epsilon":
            return output
        gamma, sigma = self.gamma_sigma(t)
        return gamma * output + sigma * x_t

    def levels(self) -> torch.Tensor:
        """sigma / gamma of every step, (T,), increasing: the noise levels of x0 + s eps."""
        return ((1 - self.alphas) / self.alphas).sqrt()

    def eps_at(self, x: torch.Tensor, s: float, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted noise at x = x0 + s eps (n, C, H, W) for any s between the ends of `levels`.

        The network is asked at the step that lies there when log s is interpolated between steps.
        """
        levels = self.levels().cpu().log().numpy()
        step = float(np.interp(math.log(s), levels, np.arange(len(levels))))
        gamma = 1 / math.sqrt(1 + s * s)
        x_t = gamma * x
        output = self.predict(x_t, torch.full((len(x),), step, device=x.device, dtype=x.dtype), cond)
        return output if self.prediction == "epsilon" else gamma * output + s * gamma * x_t

    def x0(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predicted clean image, whatever the parameterisation; not clipped."""
        output = self.predict(x_t, t, cond)
        gamma, sigma = self.gamma_sigma(t)
        return (x_t - sigma * output) / gamma if self.prediction == "epsilon" else gamma * x_t - sigma * output

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What `predict` is trained to give: eps, or v = gamma eps - sigma x0."""
        if self.prediction == "epsilon":
            return eps
        gamma, sigma = self.gamma_sigma(t)
        return gamma * eps - sigma * x0

    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) with (predict - target)^2 = w(t) (x0_hat - x0)^2, shape (n, 1, 1, 1): gamma^2/sigma^2 or 1/sigma^2."""
        gamma, sigma = self.gamma_sigma(t)
        return (gamma / sigma) ** 2 if self.prediction == "epsilon" else 1 / sigma**2

    @torch.no_grad()
    def sample(
        self,
        cond: torch.Tensor | None,
        seeds: torch.Tensor,
        steps: int,
        guidance: float = 1.0,
        batch: int = ROWS,
        eta: float = 0.0,
        noise_scale: float = 1.0,
    ) -> torch.Tensor:
        """Samples in [-1, 1], shape (n, C, H, W); image i depends only on seeds[i] and cond[i], on a CPU to the last bit.

        By DDIM in `steps` with classifier-free `guidance` and noise of strength `eta` (1: that of DDPM) at each step, from
        standard normal noise times `noise_scale`, unless the model has a sampler of its own: a one-step generator ignores
        steps, guidance and eta. `batch` rows go through the network at once; the last ones are filled up, because kernels
        round differently for another number of rows.
        """
        self.net.eval()
        parts = []
        for rows in _filled(len(seeds), batch):
            labels = None if cond is None else cond[rows].to(self.device)
            x = noise_scale * self.noise(seeds[rows])
            if self.sampler is not None and self.sampler["kind"] == "one_step":
                x = self._one_step(x, labels)
            else:
                x = self._ddim(x, self._scheduler(steps), None, labels, guidance, (eta, seeds[rows]))
            parts.append(x.clamp(-1, 1).cpu())
        return torch.cat(parts)[: len(seeds)]

    @torch.no_grad()
    def reconstruct(
        self,
        x0: torch.Tensor,
        seeds: torch.Tensor,
        t: int,
        steps: int,
        cond: torch.Tensor | None = None,
        batch: int = ROWS,
    ) -> torch.Tensor:
        """Noises x0 (n, C, H, W) to step t (rounded down to the sampler's grid) and denoises it in about `steps`.

        Row i depends only on x0[i], seeds[i] and cond[i]; see `sample` for `batch`.
        """
        self.net.eval()
        parts = []
        for rows in _filled(len(seeds), batch):
            scheduler = self._scheduler(max(1, round(len(self.alphas) * steps / t)))
            start = int(scheduler.timesteps[scheduler.timesteps <= t][0])
            eps = self.noise(seeds[rows])
            x_t = self.add_noise(x0[rows].to(eps), eps, torch.full((len(eps),), start, device=self.device))
            labels = None if cond is None else cond[rows].to(self.device)
            parts.append(self._ddim(x_t, scheduler, start, labels, 1.0).clamp(-1, 1).cpu())
        return torch.cat(parts)[: len(seeds)]

    @torch.no_grad()
    def trajectory(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float = 1.0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a DDIM run from noise, (n, C, H, W)."""
        self.net.eval()
        for t, x, _ in self._run(self.noise(seeds), self._scheduler(steps), None, cond, guidance):
            yield t, x

    def _one_step(self, noise: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        assert self.sampler is not None
        t = torch.full((len(noise),), self.sampler["t"], device=self.device)
        _, sigma = self.gamma_sigma(t)
        return self.x0(sigma * noise, t, cond)

    def _scheduler(self, steps: int) -> DDIMScheduler:
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler

    def _ddim(
        self,
        x: torch.Tensor,
        scheduler: DDIMScheduler,
        start: int | None,
        cond: torch.Tensor | None,
        guidance: float,
        noisy: tuple[float, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Denoises x from step `start` (None: the first) to 0 on the scheduler's grid."""
        for _, _, after in self._run(x, scheduler, start, cond, guidance, noisy):
            x = after
        return x

    def _run(
        self,
        x: torch.Tensor,
        scheduler: DDIMScheduler,
        start: int | None,
        cond: torch.Tensor | None,
        guidance: float,
        noisy: tuple[float, torch.Tensor] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(t, x before, x after) of each step. noisy: (eta, seeds) of the noise added at each step, None for none."""
        eta, seeds = noisy or (0.0, None)
        times = [int(t) for t in scheduler.timesteps if start is None or t <= start]
        safe = None
        if self.sampler is not None and self.sampler["kind"] == "safe":
            safe = SafetyGuidance(self.sampler, len(times))
        for t in times:
            output = self._guided(x, torch.full((len(x),), t, device=x.device), cond, guidance, safe)
            more = None
            if eta > 0 and seeds is not None:  # a stream of its own per step, past those of noise and uniform numbers
                more = normal_rows(seeds, self.shape, 2 + t).to(self.device, self.dtype)
            after = scheduler.step(output, t, x, eta=eta, variance_noise=more).prev_sample
            yield t, x, after
            x = after

    def _guided(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None, guidance: float, safe: SafetyGuidance | None
    ) -> torch.Tensor:
        """The network's output at x under classifier-free guidance, and safety guidance if there is one."""
        output = self.predict(x, t, cond)
        null = None if cond is None else self.unconditional(len(cond))
        if cond is None or null is None or (guidance == 1.0 and safe is None):
            return output
        free = self.predict(x, t, null)
        if safe is None:
            return free + guidance * (output - free)
        concept = self.predict(x, t, torch.full_like(cond, safe.hp["concept"]))
        unit = 1.0 if self.prediction == "epsilon" else self.gamma_sigma(t)[0]  # v differs from epsilon by 1/gamma
        return safe(output, free, concept, guidance, unit)


def _filled(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Indices of `count` rows in batches of exactly `batch`, the last one filled up with its last row."""
    for start in range(0, count, batch):
        yield torch.arange(start, start + batch).clamp(max=count - 1)
