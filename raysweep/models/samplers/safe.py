"""Safety guidance: DDIM that steers away from a concept.

Source: Schramowski et al., "Safe Latent Diffusion", CVPR 2023, arXiv:2211.05105, and the released pipeline (in diffusers). With c_p
the condition, c_S the concept and s_g the guidance, each step uses
    eps = eps_null + s_g (eps_p - eps_null - g),   g = 0 in the first `warmup` of the steps
    g   = mu * (eps_S - eps_null) + s_m nu,        nu <- beta_m nu + (1 - beta_m) g
    mu  = min(1, s_S |eps_p - eps_S|) per element where eps_p - eps_S < threshold, 0 elsewhere
`mu: at_least_one` takes max(1, s_S |eps_p - eps_S|) instead.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, Strict, StrictInt

from raysweep.models.samplers.ddim import DDIM, Guide, branches


class Safe(DDIM):
    """DDIM under safety guidance."""

    kind: ClassVar[str] = "safe"

    concept: StrictInt | Annotated[tuple[StrictInt, ...], Strict(False)] = Field(
        description="c_S: a class label, or the tokens of a prompt"
    )
    scale: float = Field(ge=0, description="s_S")
    threshold: float = Field(ge=0, description="lambda")
    momentum: float = Field(ge=0, le=1, description="s_m")
    beta: float = Field(ge=0, lt=1, description="beta_m")
    warmup: float = Field(ge=0, le=1, description="share of the steps without g")
    mu: Literal["at_most_one", "at_least_one"] = Field(description="bound of the scale")

    def check(self, model: Any) -> None:
        super().check(model)
        null = model.unconditional(1)
        if null is None:
            raise ValueError("sampler safe needs a model with an unconditional branch")
        if torch.tensor(self.concept).shape != null.shape[1:]:
            valid = "a class label" if null.dim() == 1 else f"the {null.shape[1]} tokens of a prompt"
            raise ValueError(f"concept: must be {valid}, not {self.concept}")

    def guide(self, steps: int) -> Guide:
        guidance = SafetyGuidance(self, steps)

        def output(
            model: Any, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None, strength: float
        ) -> torch.Tensor:
            null = None if cond is None else model.unconditional(len(cond))
            if cond is None or null is None:
                unguided: torch.Tensor = model.predict(x, t, cond)
                return unguided
            concept = torch.as_tensor(self.concept, device=cond.device).expand_as(cond)
            out_p, out_null, out_concept = branches(model, x, t, [cond, null, concept])
            unit = (
                1.0 if model.prediction == "epsilon" else model.gamma_sigma(t)[0]
            )  # v differs from epsilon by 1/gamma
            return guidance(out_p, out_null, out_concept, strength, unit)

        return output


class SafetyGuidance:
    """The state of one run: call it with the three outputs of every step in turn."""

    def __init__(self, settings: Safe, steps: int):
        self.settings, self.warmup_steps = settings, round(settings.warmup * steps)
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
        s = self.settings
        nu = torch.zeros_like(out_p) if self.nu is None else self.nu
        mu = safety_scale(unit * (out_p - out_concept), s.scale, s.threshold, s.mu)
        g = mu * unit * (out_concept - out_null) + s.momentum * nu
        self.nu = s.beta * nu + (1 - s.beta) * g
        self.done += 1
        if self.done <= self.warmup_steps:
            g = torch.zeros_like(g)
        return out_null + guidance * (out_p - out_null - g / unit)


def safety_scale(difference: torch.Tensor, strength: float, threshold: float, bound: str) -> torch.Tensor:
    """mu, elementwise, from eps_p - eps_S."""
    size = difference.abs() * strength
    size = size.clamp(max=1.0) if bound == "at_most_one" else size.clamp(min=1.0)
    return torch.where(difference < threshold, size, 0)
