"""Retraining: the model trained from scratch, with or without the forget set.

On the retain set this is exact unlearning, the gold reference of the field ("oracle" here); on the whole training set it
makes the embedded base models. The recipe is the usual one for diffusion models: Ho et al., "Denoising Diffusion
Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (simple loss, exponential moving average of the weights), with
dropped labels for classifier-free guidance (Ho & Salimans, arXiv:2207.12598), a linear warm-up and a cosine decay. A
contrastive model is trained as CLIP is (Radford et al., arXiv:2103.00020): symmetric InfoNCE within the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from pydantic import Field

from methods import gradients
from methods.base import DIFFUSION, Batch, Descent, Draw, Goal, Model, Rows, Scalars, Training
from methods.recall import retain_loss


class RetrainSettings(Training):
    """Settings of retraining; defaults are the embedded recipe."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    steps: int = Field(900, ge=1, description="optimiser steps")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    floor: float = Field(0.05, ge=0, le=1, description="end of the cosine decay, as a share of lr")
    ema: float = Field(0.995, ge=0, lt=1, description="largest decay of the moving average of the weights")
    label_drop: float = Field(0.1, ge=0, lt=1, description="share of rows trained without their label")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's second-moment decay")
    split: str = Field("retain", description="the split that is trained on")
    modules: tuple[str, ...] = Field((), description="text-to-image models: what is trained (unet, ...); empty: all")


class Retrain(Descent):
    """Trains a new model on `split`; exact unlearning on the retain set, after arXiv:2006.11239."""

    name = "retrain"
    source = "Ho et al., NeurIPS 2020, arXiv:2006.11239"
    needs = frozenset({"retain"})
    families = DIFFUSION | {"clip"}  # the language model of a vision-language one would not be retrained
    forwards_per_step = 3
    Hyperparameters = RetrainSettings
    hp: RetrainSettings

    def __init__(
        self,
        model: Model,
        hyperparameters: RetrainSettings,
        prepared: dict[str, torch.Tensor] | None = None,
        goal: Goal | None = None,
    ):
        super().__init__(model, hyperparameters, prepared, goal)
        self.ema = EMAModel(self.params, decay=hyperparameters.ema, use_ema_warmup=True, power=0.75)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def trains(self, name: str) -> bool:
        return not self.hp.modules or name.split(".")[0] in self.hp.modules

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of its peak."""
        hp = self.hp
        if step < hp.warmup:
            return (step + 1) / hp.warmup
        progress = (step - hp.warmup) / max(1, hp.steps - hp.warmup)
        return hp.floor + (1 - hp.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def draws(self) -> dict[str, Draw]:
        return {self.hp.split: Draw(self.hp.batch_size)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        loss = retain_loss(self.model, self.drop_labels(batch[self.hp.split]))
        return self.gradient(loss), gradients.scalars(loss=loss)

    def drop_labels(self, rows: Rows) -> Rows:
        """`rows` with the unconditional label or prompt in place of a share `label_drop` of them."""
        null = self.model.unconditional(len(rows.x))
        if rows.cond is None or null is None:
            return rows
        drop = self.model.uniform(rows.seeds, 2)[:, 1] < self.hp.label_drop
        drop = drop.view(-1, *[1] * (rows.cond.dim() - 1))
        return Rows(rows.x, torch.where(drop, null, rows.cond), rows.seeds, rows.total)

    def step(self, batch: Batch) -> Scalars:
        scalars = super().step(batch)
        self.schedule.step()
        self.ema.step(self.params)
        return scalars

    def finish(self) -> dict[str, float]:
        self.ema.copy_to(self.params)
        return super().finish()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ema": self.ema.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ema.load_state_dict(state["ema"])
        self.schedule.load_state_dict(state["schedule"])
