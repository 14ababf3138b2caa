"""Retraining: the model trained from scratch, with or without the forget set.

On the retain set this is exact unlearning, the gold reference of the field ("oracle" here); on the whole training set it
trains the embedded base models. The recipe is the usual one for diffusion models: Ho et al., "Denoising Diffusion
Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (simple loss, exponential moving average of the weights), with
dropped labels for classifier-free guidance (Ho & Salimans, arXiv:2207.12598), a linear warm-up and a cosine decay. A
contrastive model is trained as CLIP is (Radford et al., arXiv:2103.00020): symmetric InfoNCE within the batch.

`reduction` decides what `clip_norm` binds: the released CIFAR-10 and STL-10 code of Selective Amnesia, SalUn and SFD clips
the gradient of a sum over elements to 1, which always binds, and SISS's MNIST code clips that of a mean. The moving average
starts with the decay 1 - (1 + step)^-0.75 (SISS's MNIST code, by diffusers); the decay of the CIFAR-10 code is constant,
which makes no difference after a long training.
"""

from __future__ import annotations

import torch
from pydantic import Field

from methods import gradients
from methods.base import Descent, Scalars, Training
from methods.losses import Reduction, retain_loss, without_labels
from methods.rows import Batch, Draw


class RetrainSettings(Training):
    """Settings of retraining; defaults are the embedded recipe."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    steps: int = Field(900, ge=1, description="optimiser steps")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    floor: float = Field(0.05, ge=0, le=1, description="end of the cosine decay, as a share of lr")
    ema: float = Field(0.995, ge=0, lt=1, description="largest decay of the moving average of the weights")
    label_drop: float = Field(0.1, ge=0, lt=1, description="share of rows trained without their label")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping, of the loss under `reduction`")
    reduction: Reduction = Field("mean", description="of a diffusion loss over the elements of an image")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's second-moment decay")
    split: str = Field("retain", description="the split that is trained on")
    modules: tuple[str, ...] = Field((), description="text-to-image models: what is trained (unet, ...); empty: all")


class Retrain(Descent):
    """Trains a new model on `split`; exact unlearning on the retain set, after arXiv:2006.11239."""

    name = "retrain"
    source = "Ho et al., NeurIPS 2020, arXiv:2006.11239"
    needs = frozenset({"retain"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    abilities = frozenset({"retraining"})
    forwards_per_step = 3
    copies = 5
    Hyperparameters = RetrainSettings
    hp: RetrainSettings

    def trains(self, name: str) -> bool:
        return not self.hp.modules or name.split(".")[0] in self.hp.modules

    def ema_decay(self, step: int) -> float:
        return min(self.hp.ema, 1 - float((1 + step) ** -0.75))

    def draws(self) -> dict[str, Draw]:
        return {self.hp.split: Draw(self.hp.batch_size)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        rows = without_labels(self.model, batch[self.hp.split], self.hp.label_drop)
        loss = retain_loss(self.model, rows, self.hp.reduction)
        return self.gradient(loss), gradients.scalars(loss=loss)
