"""SISS without importance sampling: the two scores on two noised images.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034, variant "No IS"
(`double_forward_with_neg_del` in the released code).
    L_x = E |eps_theta(x_t, t) - eps|^2,  L_a = E |eps_theta(a_t, t) - eps|^2,  same eps and t for both
    descend along  g_x - c g_a,  c as in `methods.siss`
Two forward passes per row; losses are sums over the elements of an image and means over rows.
"""

from __future__ import annotations

import torch

from methods import gradients
from methods.base import Scalars
from methods.losses import squared_errors
from methods.rows import Batch
from methods.siss import SubtractedScores, SubtractSettings


class SISSNoIS(SubtractedScores):
    """Subtracted scores with two forward passes; arXiv:2503.01034, SISS (No IS)."""

    name = "siss_no_is"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, SISS (No IS)"
    forwards_per_step = 6
    Hyperparameters = SubtractSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget = batch["retain"], batch["forget"]
        t, eps = self.draw_t(self.model.uniform(retain.seeds, 2)[:, 0]), self.model.noise(retain.seeds)
        losses: list[torch.Tensor] = []
        flats: list[torch.Tensor] = []
        for k, rows in enumerate((retain, forget)):  # one graph at a time
            loss = squared_errors(self.model, rows, t, eps).flatten(1).sum(1).sum() / rows.total
            flats.append(self.gradient(loss, k))
            losses.append(loss.detach())
            del loss
        g_x, g_a = flats
        stats = gradients.scalars(loss_x=losses[0], loss_a=losses[1])
        direction, scalars = self.combine(g_x, g_a)
        return direction, stats | scalars
