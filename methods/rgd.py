"""RGD: restricted gradient with a diversified retain set.

Source: Ko et al., "Boosting Alignment for Post-Unlearning Text-to-Image Generative Models", NeurIPS 2024,
arXiv:2412.07808, Theorem 4 and the released CIFAR code.
    s = <g_f, g_r>
    s < 0:  delta_f = g_f - (s/|g_r|^2) g_r,  delta_r = g_r - (s/|g_f|^2) g_f;   otherwise both unchanged
    descend along  delta_f + lam * delta_r
Both losses are minimised (g_f is the gradient of the *negated* forget loss) and all parameters form one vector. To first
order neither loss rises. The optimiser is Adam, as in the released code, which keeps that only approximately.

Diversity: the retain rows are balanced over the task's groups (its classes). `retain_pass` decides which of them enter a step:
one balanced minibatch, or all of the retain set (released CIFAR code: 50 images of each of the 9 other classes; its
average divides a last batch of 2 by 64, this one divides it by 2). The Stable Diffusion release pairs forget and retain
prompts of the same scene in a step; here both are drawn independently. `methods.rg` is the same without the diversity.
"""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field

from methods import gradients
from methods.graddiff import GradDiff, GradDiffSettings


class RestrictedSettings(GradDiffSettings):
    """Settings of the restricted gradient."""

    trunc_elem_sq: float | None = Field(
        0.1, ge=0, description="truncation alpha in squared pixels (paper, CIFAR-10); null: off"
    )
    granularity: Literal["global", "per_block", "per_tensor"] = Field(
        "global", description="the part of the weights that is projected as one vector (paper: the whole model)"
    )


class RGDSettings(RestrictedSettings):
    """Settings of RGD."""

    retain_pass: Literal["minibatch", "balanced", "full"] = Field("balanced", description="retain rows per step")


class RGD(GradDiff):
    """Descends the restricted gradient on a balanced retain set; arXiv:2412.07808, Theorem 4."""

    name = "rgd"
    source = "Ko et al., NeurIPS 2024, arXiv:2412.07808, Theorem 4"
    Hyperparameters: ClassVar[type[BaseModel]] = RGDSettings
    hp: RestrictedSettings

    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor, products: gradients.Products) -> torch.Tensor:
        sizes = self.blocks()
        if len(sizes) == 1:
            return _combine_in_place(g_forget, g_retain, _coefficients(*products, self.hp.lam))
        for f, r in zip(torch.split(g_forget, sizes), torch.split(g_retain, sizes), strict=True):
            _combine_in_place(f, r, _coefficients(*gradients.products(f, r), self.hp.lam))
        return g_forget

    def blocks(self) -> list[int]:
        """Lengths of the consecutive pieces of the flat vector that are projected separately."""
        if self.hp.granularity == "per_tensor":
            return [p.numel() for p in self.params]
        if self.hp.granularity == "per_block":
            pairs = zip(self.names, self.params, strict=True)
            return [sum(p.numel() for _, p in b) for _, b in groupby(pairs, key=lambda pair: pair[0].split(".")[0])]
        return [sum(p.numel() for p in self.params)]


def restricted_direction(g_forget: torch.Tensor, g_retain: torch.Tensor, lam: float) -> torch.Tensor:
    """delta_f + lam delta_r (Theorem 4), for flat vectors of equal shape and any float dtype.

    g_forget is the gradient of the negated forget loss. If one vector is zero, the other one is not projected. Under conflict
    the result is a g_f + b g_r with a = 1 - lam s/|g_f|^2 and b = lam - s/|g_r|^2.
    """
    a, b = _coefficients(*gradients.products(g_forget, g_retain), lam)
    return a.to(g_forget) * g_forget + b.to(g_forget) * g_retain


def _coefficients(
    s: torch.Tensor, forget_sq: torch.Tensor, retain_sq: torch.Tensor, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of `restricted_direction`, computed on the device so that the step does not wait for it."""
    conflict = (s < 0) & (forget_sq > 0) & (retain_sq > 0)
    a = torch.where(conflict, 1 - lam * (s / torch.where(conflict, forget_sq, 1)), 1)
    b = torch.where(conflict, lam - s / torch.where(conflict, retain_sq, 1), lam)
    return a, b


def _combine_in_place(
    g_forget: torch.Tensor, g_retain: torch.Tensor, coefficients: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """a g_forget + b g_retain in the storage of `g_forget`; overwrites `g_retain`, too."""
    a, b = coefficients
    return g_forget.mul_(a).add_(g_retain.mul_(b))
