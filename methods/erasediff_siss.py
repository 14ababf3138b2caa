"""EraseDiff as a baseline of the SISS paper: one level, uniform noise as the target on the forget set.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034, baseline EraseDiff
(`erasediff` in the released code), after Wu et al., arXiv:2401.05779; `methods.erasediff` is the bilevel original.
    L_x = E |eps_theta(x_t, t) - eps|^2,   L_a = E |eps_theta(a_t, t) - u|^2,  u ~ U[0, 1)^D, drawn anew each time
    c'  = max(eta - <g_x, g_a>/|g_a|^2, 0);   descend along  g_x + c' g_a
so that <g, g_a> = max(eta |g_a|^2, <g_x, g_a>). Losses are sums over the elements of an image and means over rows. L_a
compares epsilon whatever the network predicts, because u replaces epsilon.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Descent, Scalars, Training
from methods.losses import squared_errors, timesteps
from methods.rows import Batch, Rows


class EraseDiffSISSSettings(Training):
    """Settings of the one-level EraseDiff."""

    lr: float = Field(5e-6, gt=0, description="learning rate (released code: 5e-6 CelebA-HQ, 5e-5 MNIST, 1e-5 SD)")
    steps: int = Field(60, ge=0, description="optimiser steps (released code: 60 CelebA-HQ, 300 MNIST, 35 SD)")
    eta: float = Field(1e-3, gt=0, description="least descent of L_a (released: 1e-3 MNIST, 1e-2 SD)")
    target: Literal["uniform", "normal"] = Field(
        "uniform", description="distribution of u (released: uniform on [0, 1))"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released code)")
    weight_decay: float = Field(1e-6, ge=0, description="AdamW weight decay (released code, pixel models)")
    beta1: float = Field(0.95, ge=0, lt=1, description="AdamW (released code, pixel models)")


class EraseDiffSISS(Descent):
    """Descends g_x + c' g_a towards noise on the forget set; arXiv:2503.01034, baseline EraseDiff."""

    name = "erasediff_siss"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, baseline EraseDiff"
    needs = frozenset({"forget", "retain"})
    forwards_per_step = 6
    Hyperparameters = EraseDiffSISSSettings
    hp: EraseDiffSISSSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget, model = batch["retain"], batch["forget"], self.model
        t, eps = timesteps(model, retain), model.noise(retain.seeds)
        loss_x = squared_errors(model, retain, t, eps).flatten(1).sum(1).sum() / retain.total
        g_x = self.gradient(loss_x)
        output = model.eps(model.add_noise(forget.x, eps, t), t, forget.cond)
        loss_a = (output - self.noise_target(forget)).square().flatten(1).sum(1).sum() / forget.total
        g_a = self.gradient(loss_a, 1)
        dot, x_sq, a_sq = gradients.products(g_x, g_a)
        c = weight(dot, a_sq, self.hp.eta)
        scalars = gradients.scalars(loss_x=loss_x, loss_a=loss_a)
        cosine = gradients.cosine(dot, x_sq, a_sq)
        return g_x.addcmul_(g_a, c), scalars | {"c": c, "cosine": cosine}

    def noise_target(self, rows: Rows) -> torch.Tensor:
        """u for each row, (n, C, H, W)."""
        if self.hp.target == "normal":
            return self.model.noise(rows.second_seeds)
        shape = self.model.shape
        u = self.model.uniform(rows.second_seeds, torch.Size(shape).numel())
        return u.view(-1, *shape).to(self.params[0])


def weight(dot: torch.Tensor, a_sq: torch.Tensor, eta: float) -> torch.Tensor:
    """c' = max(eta - <g_x, g_a>/|g_a|^2, 0), and 0 where g_a vanishes."""
    positive = a_sq > 0
    return torch.where(positive, (eta - dot / torch.where(positive, a_sq, 1)).clamp(min=0), 0)
