"""Images on the way from noise, sampled by a model itself: the inputs of ESD (arXiv:2303.07345) and of methods after it.

Each row stops at a point of a DDIM run of n steps that its seed draws. `timestep` is the t that the networks receive. level: that
of x_t, as in ESD's current release. older_release: as in its first one, in SalUn's copy and in AdvUnlearn. There the n steps of the run
divide the schedule of length T, a random k < n gives t, uniform in [k T/n, (k + 1) T/n), and the sampler returns x_t two points of its run
lower: at n = 50, T = 1000 its level is 39 to 58 steps below t. That sampler also starts one point below the top.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from methods.base import Model, Training


class Sampled(Training):
    """Settings of a method that samples the images of its steps itself."""

    guidance: float = Field(3.0, ge=0, description="guidance while sampling x_t (released: 3)")
    sampler_steps: int = Field(
        50, ge=1, description="length of the DDIM run, at most that of the schedule (released: 50)"
    )
    timestep: Literal["level", "older_release"] = Field(
        "level",
        description="t given to the networks: the noise level of x_t (current release), or at or above it (first release)",
    )
    sample_from: Literal["trained", "base"] = Field("trained", description="the model that x_t is sampled from")


def partial_samples(
    model: Model, cond: torch.Tensor, seeds: torch.Tensor, hp: Sampled
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, t): rows (n, C, H, W) sampled by `model` under `cond` up to a random step of the run, and the t of `timestep`, (n,)."""
    u, n = model.uniform(seeds, 2), hp.sampler_steps
    point = (u[:, 0] * n).long().clamp(max=n - 1)  # level: counted from the top of the run; older_release: k
    stop = point if hp.timestep == "level" else (n + 1 - point).clamp(max=n - 1)
    x_t, times, last = None, [], int(stop.max())
    for i, (t, x) in enumerate(model.trajectory(cond, seeds, n, hp.guidance)):
        stops = (stop == i).view(-1, *[1] * (x.dim() - 1))
        x_t = torch.where(stops, x, torch.zeros_like(x) if x_t is None else x_t)
        times.append(t)
        if i == last:
            break
    assert x_t is not None
    level, length = torch.tensor(times, device=u.device)[stop], len(model.alphas)
    if hp.timestep == "level":
        return x_t, level
    drawn = ((point + u[:, 1]) * length / n).long().clamp(max=length - 1)
    return x_t, torch.maximum(level, drawn)
