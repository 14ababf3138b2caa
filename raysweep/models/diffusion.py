"""The common base of diffusion models: the noise schedule, its parameterisations, and sampling.

`Diffusion` hides the parameterisation (epsilon or v prediction) and draws every random number from per-row seeds. Symbols: alphas[t] is the cumulative product (often written with a bar),
gamma = sqrt(alphas), sigma = sqrt(1 - alphas), x_t = gamma x0 + sigma eps.

A model carries its sampler (`raysweep.models.samplers`). Usually that is DDIM; a method may leave another one, which is saved
beside the weights.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from raysweep.models import samplers
from raysweep.models.configuration import scheduler_settings
from raysweep.models.handle import Handle
from raysweep.models.noise import normal_rows, pipeline_rows, uniform_rows

ROWS = 50  # images that go through the network at once: kernels round differently for another number of rows


class Diffusion(Handle, ABC):
    """A network and its noise schedule; see `methods.base.Model` for shapes.

    The network denoises images in [-1, 1] or latents; `encode` and `decode` convert between the two. Methods see rows of data
    that are encoded already; `sample` and `reconstruct` return images.

    Args:
        net: the trainable modules.
        scheduler: a DDIM scheduler; its `prediction_type` is the output of `predict` ("epsilon" or "v_prediction").
    """

    schedule_keys: ClassVar[frozenset[str]] = frozenset(inspect.signature(DDIMScheduler.__init__).parameters)
    default_sampler: ClassVar[samplers.Sampler] = samplers.DDIM()

    def __init__(self, net: Any, scheduler: DDIMScheduler):
        self.net, self.sampler = net, self.default_sampler
        self.use_schedule(scheduler)

    def use_schedule(self, scheduler: Any) -> None:
        """Takes the noise schedule of a scheduler of diffusers; raises ValueError if its `prediction_type` is not supported."""
        self.scheduler = scheduler
        self.prediction: str = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction!r} is not supported; valid: epsilon, v_prediction")
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.double()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.shape

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's own output (epsilon or v). `cond` is ignored by an unconditional network."""

    def outline(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's output for x (n, C, H, W) at some step, for its shape alone; on any device."""
        return self.predict(x, torch.zeros(len(x), dtype=torch.long, device=x.device), cond)

    @abstractmethod
    def unconditional(self, count: int) -> torch.Tensor | None:
        """The condition of the unconditional branch for `count` rows; None if the network has no such branch."""

    @abstractmethod
    def with_net(self, net: Any) -> Self:
        """The model with other trainable modules of the same architecture, and the usual sampler."""

    @abstractmethod
    def fresh(self, seed: int) -> Self:
        """The same architecture with newly drawn weights."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes a folder that diffusers reads, and the sampler beside it if it is not the usual one."""

    @property
    def encoder_digest(self) -> str:
        """Content hash of everything that `encode` depends on."""
        return ""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The network's input for images (n, C, H, W) in [-1, 1]."""
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images from the network's samples."""
        return z

    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """Less specific conditions than `cond` (n, ...): here the unconditional one alone."""
        null = self.unconditional(len(cond))
        return [] if null is None else [null]

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data: the network's settings, the noise schedule, the sampler and the label for "no class"."""
        return {
            **super().settings,
            "schedule": self.schedule_settings(),
            "sampler": samplers.plain_data(self),
            "null_label": self.null_label,
        }

    def schedule_settings(self) -> dict[str, Any]:
        """Plain data: what the noise schedule depends on."""
        return scheduler_settings(self.scheduler)

    def to(self, device: torch.device) -> Self:
        """Moves the network and its schedule in place."""
        self.alphas = self.alphas.to(device)
        return super().to(device)

    def use_sampler(self, kind: str, **settings: Any) -> None:
        """Samples the model by another sampler from here on; raises ValueError unless kind and settings are valid for it."""
        self.sampler = samplers.parse({"kind": kind, **settings}, self)

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

        The network is evaluated at the (fractional) step whose level is s, log s being interpolated between steps.
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
        """The training target of `predict`: eps, or v = gamma eps - sigma x0."""
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
        as_pipeline: bool = False,
    ) -> torch.Tensor:
        """Samples in [-1, 1], shape (n, C, H, W); image i depends only on seeds[i] and cond[i], on a CPU to the last bit.

        By the model's sampler, in `steps` with classifier-free `guidance` and noise of strength `eta` (1: that of DDPM) at each
        step, from standard normal noise times `noise_scale`. as_pipeline: this noise is that of diffusers' pipelines for seeds[i] (see
        `pipeline_rows`), not that of `noise`. `batch` rows go through the network at once; the last ones are filled up, because
        kernels round differently for another number of rows.
        """
        self.net.eval()
        parts = []
        for rows in _filled(len(seeds), batch):
            labels = None if cond is None else cond[rows].to(self.device)
            noise = pipeline_rows(seeds[rows], self.shape) if as_pipeline else self.noise(seeds[rows])
            noise = noise_scale * noise.to(self.device, self.dtype)
            run = samplers.Run(steps, guidance, eta, seeds[rows])
            parts.append(self.decode(self.sampler.draw(self, noise, labels, run)).clamp(-1, 1).cpu())
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
            eps = self.noise(seeds[rows])
            z = self.encode(x0[rows].to(eps))
            labels = None if cond is None else cond[rows].to(self.device)
            parts.append(self.decode(self.sampler.rebuild(self, z, eps, t, steps, labels)).clamp(-1, 1).cpu())
        return torch.cat(parts)[: len(seeds)]

    @torch.no_grad()
    def complete(
        self,
        x0: torch.Tensor,
        known: torch.Tensor,
        cond: torch.Tensor | None,
        seeds: torch.Tensor,
        steps: int,
        guidance: float = 1.0,
        batch: int = ROWS,
        eta: float = 0.0,
    ) -> torch.Tensor:
        """Samples in [-1, 1], (n, C, H, W), in which the model has drawn what the mask `known` (n, 1, H, W) leaves open of images x0.

        Before each step of the sampler the known part is replaced by x0, noised to the level of that step. A model of latents is given
        those of x0 with the open part in grey. Of x0 (n, C, H, W) only the known part has an influence; row i depends on no other row.
        See `sample` for the other arguments.
        """
        self.net.eval()
        parts = []
        for rows in _filled(len(seeds), batch):
            noise, mask = self.noise(seeds[rows]), known[rows].to(self.device)
            part = x0[rows].to(noise) * mask
            z = self.encode(part)
            coarse = F.interpolate(mask.to(z), size=z.shape[-2:]) > 0.5
            labels = None if cond is None else cond[rows].to(self.device)
            run = samplers.Run(steps, guidance, eta, seeds[rows])
            drawn = self.decode(self.sampler.draw(self, noise, labels, run, samplers.Given(z, coarse, noise)))
            parts.append(torch.where(mask, part, drawn).clamp(-1, 1).cpu())
        return torch.cat(parts)[: len(seeds)]

    @torch.no_grad()
    def trajectory(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float = 1.0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a run from noise, (n, C, H, W)."""
        self.net.eval()
        yield from self.sampler.trajectory(self, self.noise(seeds), cond, samplers.Run(steps, guidance))


def _filled(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Indices of `count` rows in batches of exactly `batch`, the last one filled up with its last row."""
    for start in range(0, count, batch):
        yield torch.arange(start, start + batch).clamp(max=count - 1)
