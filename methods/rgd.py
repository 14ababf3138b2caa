"""RGD: restricted gradient with a diversified retain set.

Source: Ko et al., "Boosting Alignment for Post-Unlearning Text-to-Image Generative Models", NeurIPS 2024,
arXiv:2412.07808, Theorem 4 and the released CIFAR code.
    s = <g_f, g_r>
    s < 0:  delta_f = g_f - (s/|g_r|^2) g_r,  delta_r = g_r - (s/|g_f|^2) g_f;   otherwise both unchanged
    descend along  delta_f + lam * delta_r
Both losses are minimised (g_f is the gradient of the *negated* forget loss) and all parameters form one vector. To first
order neither loss rises. The optimiser is Adam, as in the released code, which keeps that only approximately.

Diversity: the retain rows are balanced over the task's groups (its classes). `retain_pass` says how many enter a step:
one balanced minibatch, or all of the retain set (released CIFAR code: 50 images of each of the 9 other classes; its
average divides a last batch of 2 by 64, which this one does not).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Draw, Training
from methods.graddiff import GradDiff, GradDiffSettings


class RGDSettings(GradDiffSettings):
    """Settings of RGD."""

    trunc_elem_sq: float | None = Field(
        0.1, ge=0, description="truncation alpha in squared pixels (paper, CIFAR-10); null: off"
    )
    granularity: Literal["global", "per_tensor"] = Field("global", description="what is projected as one vector")
    retain_pass: Literal["minibatch", "balanced", "full"] = Field("balanced", description="retain rows per step")
    retain_per_group: int | None = Field(None, ge=1, description="rows kept of each group; null: all (paper: 50)")


class RGD(GradDiff):
    """Descends the restricted gradient on a balanced retain set; arXiv:2412.07808, Theorem 4."""

    name = "rgd"
    source = "Ko et al., NeurIPS 2024, arXiv:2412.07808, Theorem 4"
    Hyperparameters: ClassVar[type[Training]] = RGDSettings
    hp: RGDSettings

    def draws(self) -> dict[str, Draw]:
        size = None if self.hp.retain_pass == "full" else self.hp.batch_size
        retain = Draw(size, balanced=self.hp.retain_pass == "balanced", per_group=self.hp.retain_per_group)
        return {"forget": Draw(self.hp.batch_size), "retain": retain}

    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor) -> torch.Tensor:
        if self.hp.granularity == "global":
            return restricted_direction(g_forget, g_retain, self.hp.lam)
        return _per_tensor(self.params, g_forget, g_retain, self.hp.lam)


def restricted_direction(g_forget: torch.Tensor, g_retain: torch.Tensor, lam: float) -> torch.Tensor:
    """delta_f + lam delta_r (Theorem 4), for flat vectors of equal shape and any float dtype.

    g_forget is the gradient of the negated forget loss. A zero vector is never divided by: it leaves the other one
    unprojected. Under conflict the result is a g_f + b g_r with a = 1 - lam s/|g_f|^2 and b = lam - s/|g_r|^2.
    """
    s = torch.dot(g_forget, g_retain)
    forget_sq, retain_sq = torch.dot(g_forget, g_forget), torch.dot(g_retain, g_retain)
    if not (s < 0 and forget_sq > 0 and retain_sq > 0):
        return g_forget + lam * g_retain
    return (1 - lam * (s / forget_sq)) * g_forget + (lam - s / retain_sq) * g_retain


def _per_tensor(params: Sequence[torch.Tensor], g_f: torch.Tensor, g_r: torch.Tensor, lam: float) -> torch.Tensor:
    pairs = zip(gradients.split(params, g_f), gradients.split(params, g_r), strict=True)
    return torch.cat([restricted_direction(f.reshape(-1), r.reshape(-1), lam) for f, r in pairs])
