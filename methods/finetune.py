"""Naive deletion: fine-tuning on the retained data.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034 (baseline "naive deletion",
the loss L over X without A).
    minimise  L_r = E_{x ~ retain, t, eps} |eps_theta(x_t, t) - eps|^2
The squared norm is a sum over the elements of an image, as released, and the clip of 1 binds its gradient. The gradient of the
mean over D elements is 1/D of it, so `reduction: mean` with clip_norm/D and Adam's epsilon/D takes the same steps.

A contrastive model descends its own loss, the symmetric InfoNCE of retained pairs (baseline FT of arXiv:2407.11867), which
`reduction` does not change. The defaults are those of SISS; SLUG's release trains its baselines with AdamW (0.9, 0.98,
epsilon 1e-6) at 1e-7 in batches of 32 for 10 epochs, with weight decay 0.1 of matrices alone, a cosine decay and no clip.

Naive deletion forgets only what training on the other data overwrites. It is the control that every method has to beat.
"""

from __future__ import annotations

import torch
from pydantic import Field

from methods import gradients
from methods.base import Descent, Scalars, Training
from methods.losses import Reduction, retain_loss
from methods.rows import Batch


class FinetuneSettings(Training):
    """Settings of naive deletion."""

    lr: float = Field(5e-6, gt=0, description="learning rate (released code, CelebA-HQ)")
    steps: int = Field(60, ge=0, description="optimiser steps (released code, CelebA-HQ)")
    reduction: Reduction = Field(
        "sum", description="of a diffusion loss over the elements of an image (released code: sum)"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released code, of a sum)")
    weight_decay: float = Field(1e-6, ge=0, description="AdamW weight decay (released code, pixel models)")
    beta1: float = Field(0.95, ge=0, lt=1, description="AdamW (released code, pixel models)")


class Finetune(Descent):
    """Descends the diffusion loss of the retain set; arXiv:2503.01034, naive deletion."""

    name = "finetune"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, naive deletion"
    needs = frozenset({"retain"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    forwards_per_step = 3
    copies = 5
    Hyperparameters = FinetuneSettings
    hp: FinetuneSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        loss = retain_loss(self.model, batch["retain"], self.hp.reduction)
        return self.gradient(loss), gradients.scalars(retain_loss=loss)
