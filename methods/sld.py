"""SLD: safe latent diffusion, a sampler that steers away from the concept; nothing is trained.

Source: Schramowski et al., "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models", CVPR 2023,
arXiv:2211.05105, and the released pipeline (in diffusers). With c_p the condition, c_S the concept and s_g the guidance,
each step of sampling uses
    eps = eps_null + s_g (eps_p - eps_null - g),   g = 0 in the first `warmup` of the steps
    g   = mu * (eps_S - eps_null) + s_m nu,        nu <- beta_m nu + (1 - beta_m) g
    mu  = min(1, s_S |eps_p - eps_S|) per element where eps_p - eps_S < threshold, 0 elsewhere
Where the condition *is* the concept, eps_p - eps_S = 0 and so is mu: the release does nothing there. `mu: at_least_one`
is the other bound of the scale, max(1, s_S |eps_p - eps_S|), which falls back to eps_null under the concept itself.

The model's own sampler computes this (`use_sampler("safe", ...)`); the method chooses its settings. The weights of the candidate
are those of the base model, so any check that bypasses the sampler finds the concept.
"""

from __future__ import annotations

from typing import Literal

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
        goal = self.goal
        concept = goal.forget_class if goal.concept is None else goal.concept
        self.model.use_sampler("safe", concept=concept, **self.hp.model_dump())
        return super().finish()
