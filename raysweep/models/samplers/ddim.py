"""DDIM by diffusers' own scheduler, with classifier-free guidance.

Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler

from raysweep.models.noise import STEP_STREAMS, normal_rows
from raysweep.models.samplers.base import Given, Run, Sampler, last

Guide = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(model, x_t, t, cond, guidance) -> the guided output of the network at one step."""


class DDIM(Sampler):
    """The usual sampler of models with a noise schedule; eta 1 adds the noise of DDPM at each step."""

    kind: ClassVar[str] = "ddim"

    def check(self, model: Any) -> None:
        if not isinstance(model.default_sampler, DDIM):
            raise ValueError(
                f"sampler {self.kind} needs a model that DDIM samples; this is a model of family {model.family}"
            )

    def draw(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run, given: Given | None = None
    ) -> torch.Tensor:
        return last(self.steps(model, noise, scheduler_of(model, run.steps), None, cond, run, given))

    def rebuild(
        self, model: Any, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        whole = len(model.alphas) * steps / t  # steps of a run from noise whose last `steps` begin at t
        scheduler = scheduler_of(model, max(1, round(whole)))
        if not (scheduler.timesteps <= t).any():  # rounding down has left no step below t
            scheduler = scheduler_of(model, math.ceil(whole))
        start = int(scheduler.timesteps[scheduler.timesteps <= t][0])
        x_t = model.add_noise(z, eps, torch.full((len(eps),), start, device=z.device))
        return last(self.steps(model, x_t, scheduler, start, cond, Run(steps)))

    def trajectory(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for t, x, _ in self.steps(model, noise, scheduler_of(model, run.steps), None, cond, run):
            yield t, x

    def guide(self, steps: int) -> Guide:
        """The guidance of a run of so many steps."""
        return classifier_free

    def steps(
        self,
        model: Any,
        x: torch.Tensor,
        scheduler: DDIMScheduler,
        start: int | None,
        cond: torch.Tensor | None,
        run: Run,
        given: Given | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(t, x before, x after) of each step on the scheduler's grid, from `start` (None: the first) to 0."""
        times = [int(t) for t in scheduler.timesteps if start is None or t <= start]
        guide = self.guide(len(times))
        for t in times:
            at = torch.full((len(x),), t, device=x.device)
            if given is not None:
                x = given.put(x, *model.gamma_sigma(at))
            output = guide(model, x, at, cond, run.guidance)
            extra = None
            if run.eta > 0 and run.seeds is not None:
                extra = normal_rows(run.seeds, model.shape, STEP_STREAMS + t).to(model.device, model.dtype)
            after = scheduler.step(output, t, x, eta=run.eta, variance_noise=extra).prev_sample
            yield t, x, after
            x = after


def scheduler_of(model: Any, steps: int) -> DDIMScheduler:
    """A new scheduler for one run of `steps`, because schedulers keep state."""
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]  # rounding may append -1, as for 29 of 1,000
    return scheduler


def classifier_free(
    model: Any, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None, guidance: float
) -> torch.Tensor:
    """The network's output under classifier-free guidance (Ho, Salimans, arXiv:2207.12598)."""
    null = None if cond is None or guidance == 1.0 else model.unconditional(len(cond))
    if cond is None or null is None:
        single: torch.Tensor = model.predict(x, t, cond)
        return single
    output, unconditional = branches(model, x, t, [cond, null])
    return unconditional + guidance * (output - unconditional)


def branches(model: Any, x: torch.Tensor, t: torch.Tensor, conds: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The network's outputs under each condition, from one pass: on a GPU, the time of small batches is that of kernel launches."""
    k = len(conds)
    # differences of outputs are taken in the precision of x, also where passes are in half precision
    outputs: torch.Tensor = model.predict(torch.cat([x] * k), torch.cat([t] * k), torch.cat(conds))
    return outputs.to(x.dtype).chunk(k)
