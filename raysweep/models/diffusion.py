"""What all diffusion models share: the noise schedule, its parameterisations, and sampling.

`Diffusion` hides the parameterisation (epsilon or v prediction), draws every random number from per-row seeds, and samples
with diffusers' own DDIM scheduler. Symbols: alphas[t] is the cumulative product (often written with a bar),
gamma = sqrt(alphas), sigma = sqrt(1 - alphas), x_t = gamma x0 + sigma eps.

A model is its weights and the way it is sampled. Usually that is DDIM; a method may leave another sampler, which is saved
in `raysweep_sampler.json` beside the weights:
    {"kind": "one_step", "t": t}          a generator: x0 predicted once, from noise of step t
    {"kind": "safe", "concept": c, ...}   DDIM that steers away from class c, or from the prompt of tokens c (`methods.sld`)
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DDIMScheduler

from evaluators.batches import ROWS
from methods.sld import SafetyGuidance
from raysweep.models.folders import read_json
from raysweep.models.handle import Handle
from raysweep.models.noise import normal_rows, uniform_rows
from raysweep.storage.files import digest_of

SAMPLER = "raysweep_sampler.json"


class Diffusion(Handle, ABC):
    """A network and its noise schedule; see `methods.base.Model` for shapes.

    What the network denoises need not be images: `encode` and `decode` lead from images in [-1, 1] to what it denoises
    and back. Rows of data for methods are encoded beforehand; `sample` and `reconstruct` give and take images.

    Args:
        net: the trainable modules.
        scheduler: a DDIM scheduler; its `prediction_type` says what `predict` gives ("epsilon" or "v_prediction").
        sampler: how it is sampled, as plain data; None for DDIM.
    """

    null_label: int | None = None

    def __init__(self, net: Any, scheduler: DDIMScheduler, sampler: dict[str, Any] | None = None):
        self.net, self.scheduler, self.sampler = net, scheduler, sampler
        self.prediction: str = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction!r} is not supported; valid: epsilon, v_prediction")
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.double()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.shape

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """The network's own output (epsilon or v). `cond` is ignored by an unconditional network."""

    def outline(self, x: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """What the network gives for x (n, C, H, W) at some step: for its shape alone, on any device."""
        return self.predict(x, torch.zeros(len(x), dtype=torch.long, device=x.device), cond)

    @abstractmethod
    def unconditional(self, count: int) -> torch.Tensor | None:
        """The condition of the unconditional branch for `count` rows; None where there is none to choose."""

    @abstractmethod
    def with_net(self, net: Any) -> Self:
        """Other trainable modules of the same architecture, on the same schedule and with the usual sampler."""

    @abstractmethod
    def fresh(self, seed: int) -> Self:
        """The same architecture with newly drawn weights."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes a folder that diffusers reads, and the sampler beside it if it is not DDIM."""

    @property
    def encoder_digest(self) -> str:
        """Content hash of what `encode` depends on."""
        return ""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """What the network denoises, of images (n, C, H, W) in [-1, 1]."""
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images of what the network made."""
        return z

    def reduced(self, cond: torch.Tensor) -> list[torch.Tensor]:
        """Conditions that say less than `cond` (n, ...): here the unconditional one alone."""
        null = self.unconditional(len(cond))
        return [] if null is None else [null]

    @property
    def digest(self) -> str:
        """Content hash of weights and sampler."""
        weights = super().digest
        return weights if self.sampler is None else digest_of(weights, self.sampler)

    def to(self, device: torch.device) -> Self:
        """Moves the network and its schedule in place."""
        self.alphas = self.alphas.to(device)
        return super().to(device)

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
                x = self._draw(x, labels, steps, guidance, (eta, seeds[rows]))
            parts.append(self.decode(x).clamp(-1, 1).cpu())
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
            parts.append(self.decode(self._rebuild(z, eps, t, steps, labels)).clamp(-1, 1).cpu())
        return torch.cat(parts)[: len(seeds)]

    @torch.no_grad()
    def trajectory(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float = 1.0
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a DDIM run from noise, (n, C, H, W)."""
        self.net.eval()
        for t, x, _ in self._run(self.noise(seeds), self._scheduler(steps), None, cond, guidance):
            yield t, x

    def _draw(
        self,
        noise: torch.Tensor,
        cond: torch.Tensor | None,
        steps: int,
        guidance: float,
        noisy: tuple[float, torch.Tensor],
    ) -> torch.Tensor:
        """What the sampler makes of noise; noisy: (eta, seeds) of the noise added at each step."""
        return self._ddim(noise, self._scheduler(steps), None, cond, guidance, noisy)

    def _rebuild(
        self, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        """What the sampler makes of z noised to step t."""
        scheduler = self._scheduler(max(1, round(len(self.alphas) * steps / t)))
        start = int(scheduler.timesteps[scheduler.timesteps <= t][0])
        x_t = self.add_noise(z, eps, torch.full((len(eps),), start, device=self.device))
        return self._ddim(x_t, scheduler, start, cond, 1.0)

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
        """The network's output at x under classifier-free guidance, and safety guidance if there is one. All branches go through
        the network in one pass: on a GPU, small batches take as long as their kernels take to launch.
        """
        null = None if cond is None else self.unconditional(len(cond))
        if cond is None or null is None or (guidance == 1.0 and safe is None):
            return self.predict(x, t, cond)
        conds = [cond, null]
        if safe is not None:
            conds.append(torch.as_tensor(safe.hp["concept"], device=cond.device).expand_as(cond))
        k = len(conds)
        # differences of outputs are taken in the precision of x, also where passes are in half precision
        outputs = self.predict(torch.cat([x] * k), torch.cat([t] * k), torch.cat(conds)).to(x.dtype).chunk(k)
        output, free = outputs[:2]
        if safe is None:
            return free + guidance * (output - free)
        unit = 1.0 if self.prediction == "epsilon" else self.gamma_sigma(t)[0]  # v differs from epsilon by 1/gamma
        return safe(output, free, outputs[2], guidance, unit)


def save_sampler(folder: str | Path, sampler: dict[str, Any] | None) -> None:
    """Writes how a model is sampled beside it, unless by DDIM."""
    if sampler is not None:
        (Path(folder) / SAMPLER).write_text(json.dumps(sampler, indent=2))


def load_sampler(folder: Path) -> dict[str, Any] | None:
    """How the model in a folder is sampled; None for DDIM. Raises ValueError for a kind that there is not."""
    path = folder / SAMPLER
    if not path.is_file():
        return None
    sampler = read_json(path)
    if sampler.get("kind") not in ("one_step", "safe"):
        raise ValueError(f"{path}: kind {sampler.get('kind')!r} is not a sampler; valid: one_step, safe")
    needed = "t" if sampler["kind"] == "one_step" else "concept"
    if needed not in sampler:
        raise ValueError(f"{path}: a sampler of kind {sampler['kind']!r} needs the key {needed!r}")
    return sampler


def _filled(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Indices of `count` rows in batches of exactly `batch`, the last one filled up with its last row."""
    for start in range(0, count, batch):
        yield torch.arange(start, start + batch).clamp(max=count - 1)
