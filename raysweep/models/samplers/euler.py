"""Euler's method on the straight paths of a rectified flow, at the noise levels of diffusers' own scheduler.

Source: Liu, Gong, Liu, "Flow Straight and Fast", ICLR 2023, arXiv:2209.03003. With v = eps - x0 predicted at noise level s, a
step to the level r is x + (r - s) v = (1 - r) x0 + r eps, where x0 = x - s v and eps = x + (1 - s) v. `eta` replaces a share
of eps by new noise, as DDIM does on its schedule:
    x <- (1 - r) x0 + sqrt(r^2 - d^2) eps + d noise,   d = eta (r/s) sqrt(s^2 - ((1 - s)/(1 - r))^2 r^2)
With eta = 1, d is the standard deviation of x_r given x_s and x0, as in DDPM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from raysweep.models.noise import STEP_STREAMS, normal_rows
from raysweep.models.samplers.base import Given, Run, Sampler, distinct_times, last


class Euler(Sampler):
    """The usual sampler of flow models."""

    kind: ClassVar[str] = "euler"

    def check(self, model: Any) -> None:
        if not isinstance(model.default_sampler, Euler):
            raise ValueError(f"sampler euler needs a flow model; this is a model of family {model.family}")

    def draw(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run, given: Given | None = None
    ) -> torch.Tensor:
        return last(self.steps(model, noise, model.grid(run.steps), cond, run, given))

    def rebuild(
        self, model: Any, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        start = model.add_noise(z, eps, torch.full((len(z),), t, device=z.device))
        return last(self.steps(model, start, model.grid(steps, t), cond, Run(steps)))

    def trajectory(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a run from noise, (n, C, H, W); x_t has exactly the noise level of t.

        The run begins at the highest level of training, for above it there is no t, and each of its levels is the one of
        training that is nearest to the sampler's. Raises ValueError for more steps than there are levels.
        """
        known = model.gamma_sigma(torch.arange(len(model.alphas), device=model.device))[1].flatten().double().cpu()
        times = distinct_times(known, model.grid(run.steps)[:-1])
        levels = torch.cat([known[times], torch.zeros(1, dtype=torch.float64)])
        start = float(levels[0]) * noise
        for t, (_, x, _) in zip(times, self.steps(model, start, levels, cond, run), strict=True):
            yield t, x

    def steps(
        self,
        model: Any,
        x: torch.Tensor,
        levels: torch.Tensor,
        cond: torch.Tensor | None,
        run: Run,
        given: Given | None = None,
    ) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """(level, x before, x after) of each step, in the dtype of x. levels: as by `Flow.grid`."""
        for i, (s, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
            if given is not None:
                x = given.put(x, 1 - s, s)
            v = guided(model, x, s, cond, run.guidance)
            if run.eta > 0 and run.seeds is not None and after > 0:
                fresh = normal_rows(run.seeds, model.shape, STEP_STREAMS + i).to(x)
                size = run.eta * after / s * math.sqrt(s**2 - ((1 - s) / (1 - after) * after) ** 2)
                kept = math.sqrt(max(0.0, after**2 - size**2))
                moved = (1 - after) * (x - s * v) + kept * (x + (1 - s) * v) + size * fresh
            else:
                moved = x + (after - s) * v
            yield s, x, moved
            x = moved


def guided(model: Any, x: torch.Tensor, s: float, cond: torch.Tensor | None, guidance: float) -> torch.Tensor:
    """The velocity at noise level s under classifier-free guidance, in the dtype of x; both branches in one pass."""
    null = None if cond is None or guidance == 1.0 else model.unconditional(len(cond))
    rows, conds = (x, cond) if cond is None or null is None else (torch.cat([x, x]), torch.cat([cond, null]))
    level = torch.full((len(rows),), s, dtype=torch.float64, device=x.device)
    v: torch.Tensor = model.velocity(rows, level, conds).to(x.dtype)
    if len(rows) == len(x):
        return v
    v, free = v.chunk(2)
    return free + guidance * (v - free)
