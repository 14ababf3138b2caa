"""GradDiff: ascent on the forget set plus descent on the retain set.

Source: Ko et al., "Boosting Alignment for Post-Unlearning Text-to-Image Generative Models", NeurIPS 2024,
arXiv:2412.07808, baseline GradDiff.
    g_f = gradient of the negated, truncated forget loss;  g_r = gradient of the retain loss
    descend along  g_f + lam * g_r
The truncation stops the ascent where the model is already wrong enough. The released code has two, with different
units, kept here under two names:
    trunc_elem_sq     (CIFAR/EDM code, alpha): w(t) min((x0_hat - x0)^2, alpha) per element, in squared pixels of [-1, 1]
    trunc_batch_loss  (Stable Diffusion code, m): no ascent at all on a batch whose mean loss exceeds m
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from methods import gradients
from methods.base import Batch, Draw, Method, Rows, Training, mean_loss, squared_errors, timesteps


class GradDiffSettings(Training):
    """Settings of GradDiff."""

    lr: float = Field(1e-5, gt=0, description="learning rate (paper, CIFAR-10 on EDM and Stable Diffusion)")
    steps: int = Field(782, ge=0, description="optimiser steps (released script, CIFAR-10: 50k forget images / 64)")
    lam: float = Field(
        5.0, ge=0, description="weight of the retain gradient relative to the ascent (paper: 5 on CIFAR-10)"
    )
    trunc_elem_sq: float | None = Field(None, ge=0, description="truncation alpha in squared pixels; null: off")
    trunc_batch_loss: float | None = Field(None, gt=0, description="truncation m on the batch-mean loss; null: off")


class GradDiff(Method):
    """Descends g_f + lam g_r; arXiv:2412.07808, GradDiff."""

    name = "graddiff"
    source = "Ko et al., NeurIPS 2024, arXiv:2412.07808, baseline GradDiff"
    needs = frozenset({"forget", "retain"})
    forwards_per_step = 2
    Hyperparameters: ClassVar[type[Training]] = GradDiffSettings
    hp: GradDiffSettings

    def draws(self) -> dict[str, Draw]:
        return {"forget": Draw(self.hp.batch_size), "retain": Draw(self.hp.batch_size)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        g_forget, forget_loss, truncated = self.forget_gradient(batch["forget"])
        retain_loss = mean_loss(self.model, batch["retain"])
        g_retain = gradients.flat(retain_loss, self.params)
        cosine = gradients.cosine(g_forget, g_retain)
        scalars = gradients.scalars(forget_loss=forget_loss, retain_loss=retain_loss, truncated=truncated)
        return self.combine(g_forget, g_retain), scalars | {"cosine": cosine}

    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor) -> torch.Tensor:
        """The update direction from the two flat gradients of losses that are both minimised."""
        return g_forget + self.hp.lam * g_retain

    def forget_gradient(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(flat gradient of the negated truncated loss, this rank's part of the loss, of the truncated share)."""
        t = timesteps(self.model, rows)
        errors = squared_errors(self.model, rows, t, self.model.noise(rows.seeds))
        loss = errors.detach().flatten(1).mean(1).sum() / rows.total
        errors, cut = truncate_elements(errors, self.model.x0_error_weight(t), self.hp.trunc_elem_sq)
        truncated = cut.double().flatten(1).mean(1).sum() / rows.total
        gradient = gradients.flat(-errors.flatten(1).mean(1).sum() / rows.total, self.params)
        if self.hp.trunc_batch_loss is not None and gradients.scalars(loss=loss)["loss"] > self.hp.trunc_batch_loss:
            gradient, truncated = torch.zeros_like(gradient), torch.tensor(len(rows.x) / rows.total)
        return gradient, loss, truncated


def truncate_elements(
    errors: torch.Tensor, weight: torch.Tensor, limit: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w min(e/w, limit) and where it binds, for squared errors e = w (x0_hat - x0)^2; no limit: unchanged.

    errors: (n, C, H, W); weight: (n, 1, 1, 1) positive; limit: squared pixels or None.
    """
    if limit is None:
        return errors, torch.zeros_like(errors, dtype=torch.bool)
    cut = errors.detach() > weight * limit
    return torch.where(cut, (weight * limit).expand_as(errors), errors), cut
