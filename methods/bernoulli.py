"""Bernoulli: SISS without importance weights, each row in one term only.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034, ablation
(`subscore_bernoulli` in the released code). A row is noised from the forget set with probability lam, else from X \\ A:
    L_x = 1/(1 - lam) * E |eps_theta(x_t, t) - eps|^2  over the rows from x
    L_a =               E |eps_theta(a_t, t) - eps|^2  over the rows from a
    descend along  g_x - c g_a,  c as in `methods.siss`
The factor 1/lam of L_a is left out, as released: renormalising g_a cancels it. Where x and a hardly overlap (low t, many
pixels) SISS becomes this. Losses are sums over the elements of an image and means over all rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from methods import gradients
from methods.base import Scalars
from methods.losses import squared_errors
from methods.rows import Batch
from methods.siss import SubtractedScores, SubtractSettings


class BernoulliSettings(SubtractSettings):
    """Settings of the Bernoulli variant."""

    lam: float = Field(0.5, gt=0, lt=1, description="share of rows noised from the forget set (released: 0.5)")


class Bernoulli(SubtractedScores):
    """Subtracted scores with one term per row and one forward pass; arXiv:2503.01034, Bernoulli ablation."""

    name = "bernoulli"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, Bernoulli ablation"
    forwards_per_step = 5
    tape = 1.2  # the graph stays for the second backward pass
    Hyperparameters = BernoulliSettings
    hp: BernoulliSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget = batch["retain"], batch["forget"]
        u = self.model.uniform(retain.seeds, 2)
        t, from_forget = self.draw_t(u[:, 0]), u[:, 1] < self.hp.lam
        x = torch.where(from_forget.view(-1, 1, 1, 1), forget.x, retain.x)
        cond = None
        if retain.cond is not None and forget.cond is not None:
            shape = (-1,) + (1,) * (forget.cond.dim() - 1)
            cond = torch.where(from_forget.view(shape), forget.cond, retain.cond)
        rows = replace(retain, x=x, cond=cond)
        errors = squared_errors(self.model, rows, t, self.model.noise(rows.seeds)).flatten(1).sum(1)
        loss_x = torch.where(from_forget, 0, errors).sum() / (1 - self.hp.lam) / rows.total
        loss_a = torch.where(from_forget, errors, 0).sum() / rows.total
        g_x = self.gradient(loss_x, 0, keep_graph=True)
        g_a = self.gradient(loss_a, 1)
        stats = gradients.scalars(loss_x=loss_x, loss_a=loss_a, share_a=from_forget.sum() / rows.total)
        direction, scalars = self.combine(g_x, g_a)
        return direction, stats | scalars
