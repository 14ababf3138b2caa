"""Sampling of a distilled generator, which draws in one step (score forgetting distillation, arXiv:2409.11219)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from raysweep.models.samplers.base import Given, Run, Sampler


class OneStep(Sampler):
    """x0 predicted once, from noise at the level of step t, whatever the run's steps, guidance and eta.

    Noised images are rebuilt, parts completed, and trajectories run by the usual sampler of the family: a generator of one step has
    none.
    """

    kind: ClassVar[str] = "one_step"

    t: int = Field(ge=0, description="step whose noise level the generator takes")

    def check(self, model: Any) -> None:
        if self.t >= len(model.alphas):
            raise ValueError(f"t: {self.t} is not a step of the model, 0 to {len(model.alphas) - 1}")

    def draw(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run, given: Given | None = None
    ) -> torch.Tensor:
        if given is not None:
            usual: Sampler = model.default_sampler
            return usual.draw(model, noise, cond, run, given)
        t = torch.full((len(noise),), self.t, device=noise.device)
        _, sigma = model.gamma_sigma(t)
        images: torch.Tensor = model.x0(sigma * noise, t, cond)
        return images

    def rebuild(
        self, model: Any, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        usual: Sampler = model.default_sampler
        return usual.rebuild(model, z, eps, t, steps, cond)

    def trajectory(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run
    ) -> Iterator[tuple[int, torch.Tensor]]:
        usual: Sampler = model.default_sampler
        return usual.trajectory(model, noise, cond, run)
