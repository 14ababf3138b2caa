"""SLD: safe latent diffusion, a sampler that steers away from the concept; nothing is trained.

Source: Schramowski et al., "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models", CVPR 2023,
arXiv:2211.05105, and the released pipeline (in diffusers). With c_p the condition, c_S the concept and s_g the guidance,
each step of sampling uses
    eps = eps_null + s_g (eps_p - eps_null - g),   g = 0 in the first `warmup` of the steps
    g   = mu * (eps_S - eps_null) + s_m nu,        nu <- beta_m nu + (1 - beta_m) g
    mu  = min(1, s_S |eps_p - eps_S|) per element where eps_p - eps_S < threshold, 0 elsewhere
Where the condition *is* the concept, eps_p - eps_S = 0 and so is mu: the release does nothing there. `mu: at_least_one`
is the other bound of the scale, max(1, s_S |eps_p - eps_S|), which falls back to eps_null under the concept itself.

The weights of the candidate are those of the base model, so any check that bypasses the sampler finds the concept there.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from methods.base import Goal, Hyperparameters, Method, Model, Scalars
from methods.rows import Batch, Draw


class SLDSettings(Hyperparameters):
    """Settings of SLD; defaults are the release's "medium"."""

    scale: float = Field(1000.0, ge=0, description="s_S (released: 20, 1000, 2000, 5000 from weak to max)")
    threshold: float = Field(0.01, ge=0, description="lambda (released: 0, 0.01, 0.025, 1)")
    momentum: float = Field(0.3, ge=0, le=1, description="s_m (released: 0, 0.3, 0.5, 0.5)")
    beta: float = Field(0.4, ge=0, lt=1, description="beta_m (released: 0, 0.4, 0.7, 0.7)")
    warmup: float = Field(0.2, ge=0, le=1, description="share of the steps without g (released: 15, 10, 7, 0 of 50)")
    mu: Literal["at_most_one", "at_least_one"] = Field("at_most_one", description="bound of the scale (see above)")


class SLD(Method):
    """Safety guidance at sampling time; arXiv:2211.05105."""

    name = "sld"
    source = "Schramowski et al., CVPR 2023, arXiv:2211.05105"
    needs = frozenset()
    abilities = frozenset({"safe sampling"})
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 0
    copies = 1
    tape = 0
    Hyperparameters = SLDSettings
    hp: SLDSettings

    @classmethod
    def unsuited(cls, hyperparameters: SLDSettings, model: Model, goal: Goal) -> list[str]:
        return [] if model.unconditional(1) is not None else ["it needs a model with an unconditional branch"]

    @property
    def steps(self) -> int:
        return 0

    def draws(self) -> dict[str, Draw]:
        return {}

    def step(self, batch: Batch) -> Scalars:
        return {}  # never called: there are no steps

    def finish(self) -> dict[str, float]:
        asked = self.goal.concept
        concept = {"concept": self.goal.forget_class if asked is None else list(asked)}
        self.model.sampler = {"kind": "safe"} | concept | self.hp.model_dump()
        return super().finish()


class SafetyGuidance:
    """The state of one sampling run: call it with the three predictions of every step in turn."""

    def __init__(self, settings: dict[str, Any], steps: int):
        self.hp, self.first = settings, round(settings["warmup"] * steps)
        self.nu: torch.Tensor | None = None
        self.done = 0

    def __call__(
        self,
        out_p: torch.Tensor,
        out_null: torch.Tensor,
        out_concept: torch.Tensor,
        guidance: float,
        unit: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """The guided output of this step; differences of outputs times `unit` are differences in epsilon."""
        hp = self.hp
        nu = torch.zeros_like(out_p) if self.nu is None else self.nu
        mu = scale(unit * (out_p - out_concept), hp["scale"], hp["threshold"], hp["mu"])
        g = mu * unit * (out_concept - out_null) + hp["momentum"] * nu
        self.nu = hp["beta"] * nu + (1 - hp["beta"]) * g
        self.done += 1
        if self.done <= self.first:
            g = torch.zeros_like(g)
        return out_null + guidance * (out_p - out_null - g / unit)


def scale(difference: torch.Tensor, strength: float, threshold: float, mu: str) -> torch.Tensor:
    """mu, elementwise, from eps_p - eps_S."""
    size = difference.abs() * strength
    size = size.clamp(max=1.0) if mu == "at_most_one" else size.clamp(min=1.0)
    return torch.where(difference < threshold, size, 0)
