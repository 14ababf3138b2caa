"""MUNBa: the two gradients bargain for a common direction, without a weight between them.

Source: Wu & Harandi, "MUNBa: Machine Unlearning via Nash Bargaining", ICCV 2025, arXiv:2411.15537, and the released code.
    maximise log <g_r, d> + log <g_f, d> over the directions d of bounded length; the solution has
    d = a_r g_r + a_f g_f  with  G^T G a = 1/a  (elementwise), which for two gradients is
    a_r = 1 / (|g_r| sqrt(1 + cos)),  a_f = 1 / (|g_f| sqrt(1 + cos)),  cos the cosine of g_r and g_f
So d bisects the angle between the two, its length is always sqrt(2), and both losses fall at the same rate relative to their
gradients' lengths: <d, g_i> = |g_i| sqrt(1 + cos). The lengths of the gradients, and so every weight of a loss, cancel.
Bargaining fails where a gradient vanishes or the two are opposite. All parameters form one vector; the optimiser is Adam.

Forget loss (`forget_loss`): `relabel`, the release's (see `methods.relabelling`), for classes and concepts; or `ascent`, the negated
diffusion loss of `methods.graddiff` with its truncation, which serves every family and makes MUNBa differ from GradDiff and RGD in
the combination of the gradients alone. A contrastive model has the losses of GradDiff; the release trains CLIP as a classifier of the
prompts of all classes, with random labels for forgotten images.

The release computes the weights otherwise (`weights: released`):
    a_r = sqrt((|g_r|^2 |g_f|^2 - s |g_r| |g_f|) / (|g_r|^4 |g_f|^2 - |g_r|^2 s^2 + 1e-8)),  a_f = (1 - a_r^2 |g_r|^2) / (s a_r + 1e-8)
which is the same but for the two constants. The first one is not small: where both |g| are 0.02 it is over a hundred times what it is added
to, and under conflict (s < 0) a_f is then negative, which the release takes for a failure. `fallback` is what is done after a failure: the
direction g_r + fallback g_f (0.5 in the script for a class, 0.1 in that for nudity), or nothing (CLIP's, null; here Adam's moments still
move the weights). The script for a class adds `l1` sum |w| to the loss (`--with_l1`), which falls epoch by epoch. The script for nudity
solves the problem by iteration, on the gradient of the first parameter tensor alone; that is not implemented.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field

from methods import gradients
from methods.base import Goal, Model
from methods.graddiff import AscentSettings, TwoGradients
from methods.losses import is_contrastive
from methods.relabelling import Relabel, relabel_loss, stand_in, without_override
from methods.rows import Rows

CONSTANT = 1e-8  # of the release, in both weights


class MUNBaSettings(AscentSettings):
    """Settings of MUNBa."""

    forget_loss: Literal["ascent", "relabel"] = Field(
        "ascent",
        description="loss of forgotten rows: negated diffusion loss, or the distance to another class (released)",
    )
    relabel: Relabel = Field("next", description="the class whose output is imitated, with forget_loss: relabel")
    beta: float = Field(
        1.0,
        gt=0,
        description="weight of the forget loss (released: 1 class, 100 nudity); cancels in `exact` weights",
    )
    weights: Literal["exact", "released"] = Field(
        "exact", description="of the two gradients: Nash's solution, or the release's formula with its constants"
    )
    fallback: float | None = Field(
        0.5, ge=0, description="weight of the forget gradient where bargaining fails (released: 0.5); null: no gradient"
    )
    l1: float = Field(0.0, ge=0, description="weight of the sum of the weights' absolute values (released: 1e-4 class)")
    l1_stages: int = Field(
        2, ge=1, description="equal parts of the steps over which l1 falls, by l1 / l1_stages each (released: epochs)"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released: 1, which always binds)")


class MUNBa(TwoGradients):
    """Descends the Nash bargaining solution of two gradients; arXiv:2411.15537."""

    name = "munba"
    source = "Wu & Harandi, ICCV 2025, arXiv:2411.15537"
    forwards_per_step = 7
    Hyperparameters: ClassVar[type[BaseModel]] = MUNBaSettings
    hp: MUNBaSettings

    @classmethod
    def unsuited(cls, hyperparameters: MUNBaSettings, model: Model, goal: Goal) -> list[str]:
        reasons = super().unsuited(hyperparameters, model, goal)
        if hyperparameters.forget_loss == "ascent":
            return reasons
        if goal.kind == "points" or is_contrastive(model):
            return [*reasons, "forget_loss: only a class or concept of a diffusion model can be relabelled; use ascent"]
        return reasons + without_override(goal, hyperparameters.relabel)

    def forget_gradient(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.hp.forget_loss == "relabel":
            imitated = stand_in(self.model, rows, self.goal, self.hp.relabel)
            loss = relabel_loss(self.model, rows, imitated)
            gradient, truncated = self.gradient(loss), torch.zeros_like(loss)
        else:
            gradient, loss, truncated = super().forget_gradient(rows)
        return gradient.mul_(self.hp.beta), loss, truncated

    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor, products: gradients.Products) -> torch.Tensor:
        solve = nash_weights if self.hp.weights == "exact" else released_weights
        forget, retain = solve(*products)
        agreed = torch.isfinite(forget) & torch.isfinite(retain) & (forget > 0) & (retain > 0)
        forget = torch.where(agreed, forget, self.hp.fallback or 0.0)
        retain = torch.where(agreed, retain, 0.0 if self.hp.fallback is None else 1.0)
        direction = g_forget.mul_(forget.to(g_forget)).add_(g_retain.mul_(retain.to(g_retain)))
        if self.hp.l1:
            stage = self.done * self.hp.l1_stages // max(1, self.hp.steps)
            for piece, p in zip(gradients.split(self.params, direction), self.params, strict=True):
                piece.add_(p.detach().sign(), alpha=self.hp.l1 * (1 - stage / self.hp.l1_stages))
        return direction


def nash_weights(
    s: torch.Tensor, forget_sq: torch.Tensor, retain_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_f, a_r) of the bargaining solution, from <g_f, g_r>, |g_f|^2 and |g_r|^2; 0 where bargaining fails.

    It fails if a gradient is zero, or if the two are opposite up to rounding.
    """
    cosine = gradients.cosine(s, forget_sq, retain_sq)
    agreed = (forget_sq > 0) & (retain_sq > 0) & (cosine > -1 + math.sqrt(torch.finfo(cosine.dtype).eps))
    scale = torch.where(agreed, 1 + cosine, 1).rsqrt()
    forget, retain = (
        torch.where(agreed, scale / torch.where(agreed, sq, 1).sqrt(), 0) for sq in (forget_sq, retain_sq)
    )
    return forget, retain


def released_weights(
    s: torch.Tensor, forget_sq: torch.Tensor, retain_sq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_f, a_r) by the released formula; not positive, or NaN, where the release takes bargaining for failed."""
    product = retain_sq * forget_sq
    retain = ((product - s * product.sqrt()) / (retain_sq * product - retain_sq * s * s + CONSTANT)).sqrt()
    return (1 - retain_sq * retain * retain) / (s * retain + CONSTANT), retain
