"""The protocol of a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Run:
    """Settings of one run from noise.

    guidance: g of classifier-free guidance, eps_null + g (eps_cond - eps_null). eta: strength of the noise that is added at each
    step, 0 for none. seeds: those of that noise, (n,).
    """

    steps: int
    guidance: float = 1.0
    eta: float = 0.0
    seeds: torch.Tensor | None = None


@dataclass(frozen=True)
class Given:
    """The part of a result that is known beforehand; a run puts it in place before each of its steps.

    z: what is known (n, C, H, W), in what the network denoises; mask (n, 1, H, W): True where it is. eps: its noise, that from which
    the run begins, (n, C, H, W).
    """

    z: torch.Tensor
    mask: torch.Tensor
    eps: torch.Tensor

    def put(self, x: torch.Tensor, gamma: torch.Tensor | float, sigma: torch.Tensor | float) -> torch.Tensor:
        """x (n, C, H, W) with gamma z + sigma eps in the known part."""
        return torch.where(self.mask, (gamma * self.z + sigma * self.eps).to(x), x)


class Sampler(BaseModel, ABC):
    """A way to sample a diffusion model. Its fields are its settings, which are saved with the model; every field is required.

    Shapes: noise, z, eps and results (n, C, H, W) in what the network denoises, cond (n, ...) or None. Row i of a result depends
    only on row i of the arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]

    def data(self) -> dict[str, Any]:
        """Kind and settings as plain data."""
        return {"kind": self.kind} | self.model_dump(mode="json")

    def check(self, model: Any) -> None:
        """Raises ValueError if the model cannot be sampled this way."""

    @abstractmethod
    def draw(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run, given: Given | None = None
    ) -> torch.Tensor:
        """Draws from standard normal noise what fits the known part, if there is one; in that part itself the result is undefined."""

    @abstractmethod
    def rebuild(
        self, model: Any, z: torch.Tensor, eps: torch.Tensor, t: int, steps: int, cond: torch.Tensor | None
    ) -> torch.Tensor:
        """Adds noise eps to z up to step t and removes it again in about `steps`, without guidance."""

    @abstractmethod
    def trajectory(
        self, model: Any, noise: torch.Tensor, cond: torch.Tensor | None, run: Run
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(t, x_t) before each step of a run from noise."""


def last(run: Iterator[tuple[Any, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The result of a run of (step, x before, x after)."""
    return deque(run, maxlen=1).pop()[2]


def distinct_times(known: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """Distinct steps t, decreasing, whose noise levels are nearest to those of a sampler.

    known: a number for the level of every t, (T,), increasing; wanted: the same for the sampler's, decreasing. Raises ValueError
    for more of these than there are steps t.
    """
    steps, times = len(wanted), list[int]()
    if steps > len(known):
        raise ValueError(f"{steps} sampler steps are more than the {len(known)} noise levels of the model")
    for k, level in enumerate(wanted.tolist()):
        nearest = int((known - level).abs().argmin())
        below = times[-1] if times else len(known)  # no level twice, and one left for each step to come
        times.append(max(min(nearest, below - 1), steps - 1 - k))
    return times
