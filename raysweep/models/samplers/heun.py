"""The second-order sampler of EDM, algorithm 2 of Karras et al., NeurIPS 2022, arXiv:2206.00364, in float64.

It runs from s_max to s_min, in steps spaced by rho. `eta` is its churn, as a share of the largest that the paper allows,
sqrt(2) - 1 per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from raysweep.models.noise import STEP_STREAMS, normal_rows
from raysweep.models.samplers.base import Given, Run, Sampler, distinct_times, last


class Heun(Sampler):
    """The usual sampler of EDM models."""

    kind: ClassVar[str] = "heun"

    def check(self, model: Any) -> None:
        if not isinstance(model.default_sampler, Heun):
            raise ValueError(f"sampler heun needs an EDM model; this is a model of family {model.family}")

    def draw(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run, given: Given | None = None
    ) -> torch.Tensor:
        start = noise.double() * model.edm["sigma_max"]
        return last(self.steps(model, start, grid(model.edm, run.steps), cond, run, given)).to(noise.dtype)

    def rebuild(
        self, model: Any, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        s = float(model.levels()[t])
        start = z.double() + s * eps.double()
        return last(self.steps(model, start, grid(model.edm, max(2, steps), s), cond, Run(steps))).to(z.dtype)

    def trajectory(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a run from noise, (n, C, H, W); x_t has exactly the noise level of t.

        The run begins at the highest level of training, for above it there is no t, and each of its levels is the one of
        training that is nearest to the sampler's. Raises ValueError for more steps than there are levels.
        """
        known = model.levels().cpu()
        times = distinct_times(known.log(), grid(model.edm, run.steps, float(known[-1]))[:-1].log())
        levels = torch.cat([known[times], torch.zeros(1, dtype=torch.float64)])
        start = noise.double() * float(levels[0])
        for t, (s, x, _) in zip(times, self.steps(model, start, levels, cond, run), strict=True):
            yield t, (x / math.sqrt(1 + s * s)).to(model.dtype)

    def steps(
        self,
        model: Any,
        x: torch.Tensor,
        levels: torch.Tensor,
        cond: torch.Tensor | None,
        run: Run,
        given: Given | None = None,
    ) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """(level, x before, x after) of each step, x in float64. levels: as by `grid`."""
        for i, (s, after) in enumerate(zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)):
            if run.eta > 0 and run.seeds is not None:
                raised = s * (1 + run.eta * (math.sqrt(2) - 1))
                extra = normal_rows(run.seeds, model.shape, STEP_STREAMS + i).to(x)
                x = x + math.sqrt(raised**2 - s**2) * extra
                s = raised
            if given is not None:
                x = given.put(x, 1.0, s)
            level = torch.full((len(x), 1, 1, 1), s, dtype=torch.float64, device=x.device)
            slope = (x - model.denoised(x, level, cond, run.guidance)) / s
            moved = x + (after - s) * slope
            if after > 0:
                next_level = torch.full_like(level, after)
                next_slope = (moved - model.denoised(moved, next_level, cond, run.guidance)) / after
                moved = x + (after - s) * (slope + next_slope) / 2
            yield s, x, moved
            x = moved


def grid(edm: Mapping[str, float], steps: int, start: float | None = None) -> torch.Tensor:
    """Noise levels of a run, decreasing, the last one 0; (steps + 1,), float64. start: the first level, None for s_max."""
    top, low, rho = start or edm["sigma_max"], edm["sigma_min"], edm["rho"]
    share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    levels = (top ** (1 / rho) + share * (low ** (1 / rho) - top ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
