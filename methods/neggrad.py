"""NegGrad: gradient ascent on the forget set.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034 (baseline "NegGrad").
    minimise  - s * E_{a ~ forget, t, eps} |eps_theta(a_t, t) - eps|^2
s is the released code's `superfactor`. The squared norm is a sum over the elements of an image, as released, and the clip of
1 binds its gradient. Where it does, s cancels out, so the settings that matter are the learning rate and the number of steps.
For a contrastive model the loss is 1 - cos(image, caption) of forgotten pairs (baseline GA of arXiv:2407.11867), which
`reduction` does not change; see `methods.finetune` for that release's optimiser.
"""

from __future__ import annotations

import torch
from pydantic import Field

from methods import gradients
from methods.base import Descent, Scalars, Training
from methods.losses import Reduction, forget_loss
from methods.rows import Batch


class NegGradSettings(Training):
    """Settings of NegGrad."""

    lr: float = Field(5e-6, gt=0, description="learning rate (released code, CelebA-HQ)")
    steps: int = Field(60, ge=0, description="optimiser steps (released code, CelebA-HQ)")
    superfactor: float = Field(1.0, gt=0, description="factor s on the ascent loss; no effect while clipping binds")
    reduction: Reduction = Field(
        "sum", description="of a diffusion loss over the elements of an image (released code: sum)"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released code, of a sum)")
    weight_decay: float = Field(1e-6, ge=0, description="AdamW weight decay (released code, pixel models)")
    beta1: float = Field(0.95, ge=0, lt=1, description="AdamW (released code, pixel models)")


class NegGrad(Descent):
    """Ascends the diffusion loss of the forget set; arXiv:2503.01034, NegGrad."""

    name = "neggrad"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, NegGrad"
    needs = frozenset({"forget"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    forwards_per_step = 3
    copies = 5
    Hyperparameters = NegGradSettings
    hp: NegGradSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        loss = forget_loss(self.model, batch["forget"], self.hp.reduction)
        return self.gradient(-self.hp.superfactor * loss), gradients.scalars(forget_loss=loss)
