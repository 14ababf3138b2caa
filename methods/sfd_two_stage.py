"""Two-stage SFD: distil first, forget afterwards.

Source: Chen, Zhang, Zhou, "Score Forgetting Distillation", ICLR 2025, arXiv:2409.11219, two-stage variant, and the released
code. Stage 1 is plain score identity distillation of the base model (`methods.sfd` with both weights of the forgotten
class 0); stage 2 is SFD from the moving average of its generator, with a larger weight of forgetting and no moving average
(paper; the released file keeps both as in one stage). Stage 1 is prepared once and shared by all trials.

The teacher of stage 2 is the base model. In the released code it is loaded from the slot that holds stage 1's fake score,
so there the teacher is not the original one. The fake score continues from stage 1.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from methods.base import Data, Goal, Model
from methods.sfd import SFD, SFDSettings


class SFDTwoStageSettings(SFDSettings):
    """Settings of two-stage SFD."""

    forget: float = Field(
        0.1, ge=0, description="weight of the forgotten class for the generator (value not published)"
    )
    fake_forget: float = Field(
        0.1, ge=0, description="weight of the forgotten class for the fake score (not published)"
    )
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the moving average of stage 2; 0: off (paper)")
    lr_fake: float = Field(3e-5, gt=0, description="learning rate of the fake score (released: 3e-5)")
    stage1_steps: int = Field(50_000, ge=1, description="steps of stage 1 (released: 50k)")
    stage1_lr: float = Field(1e-5, gt=0, description="learning rate of stage 1's generator (released: 1e-5)")
    stage1_lr_fake: float = Field(3e-5, gt=0, description="learning rate of stage 1's fake score (released: 3e-5)")
    stage1_ema: float = Field(0.9999, ge=0, lt=1, description="decay of stage 1's moving average (released: 0.9999)")
    stage1_batch_size: int = Field(128, ge=1, description="rows of a step of stage 1 (released: 128)")


class SFDTwoStage(SFD):
    """Forgets from a distilled generator, with the original teacher; arXiv:2409.11219, two stages."""

    name = "sfd_two_stage"
    source = "Chen, Zhang, Zhou, ICLR 2025, arXiv:2409.11219, two stages"
    copies = 14
    prepared_by = (
        "stage1_steps", "stage1_lr", "stage1_lr_fake", "stage1_ema", "stage1_batch_size", "sigma_init", "t_min", "t_max",
        "cond_scale",
    )  # fmt: skip
    Hyperparameters = SFDTwoStageSettings

    def __init__(
        self,
        model: Model,
        hyperparameters: SFDTwoStageSettings,
        prepared: dict[str, torch.Tensor] | None = None,
        goal: Goal | None = None,
    ):
        super().__init__(model, hyperparameters, prepared, goal)  # copies the teacher before the generator changes
        with torch.no_grad():
            for name, p, average, fake in zip(self.names, self.params, self.ema, self.fake_params, strict=True):
                p.copy_(self.prepared[f"generator/{name}"])
                average.copy_(p)
                fake.copy_(self.prepared[f"fake/{name}"])

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: Any) -> dict[str, torch.Tensor]:
        """Stage 1: `generator/NAME`, the moving average of the generator, and `fake/NAME`, the fake score."""
        hp = hyperparameters
        settings = SFDSettings(
            forget=0, fake_forget=0, steps=hp.stage1_steps, lr=hp.stage1_lr, lr_fake=hp.stage1_lr_fake, ema=hp.stage1_ema,
            batch_size=hp.stage1_batch_size, forget_batch_size=1, sigma_init=hp.sigma_init, t_min=hp.t_min,
            t_max=hp.t_max, cond_scale=hp.cond_scale,
        )  # fmt: skip
        student = model.with_net(copy.deepcopy(model.net))
        stage = SFD(student, settings, {}, replace(task.goal, forget_class=None, override_class=None))
        for step in range(settings.steps):
            stage.step(task.batch(stage.draws(), seed, step))
        stage.finish()
        tensors = {f"generator/{n}": p.detach() for n, p in zip(stage.names, stage.params, strict=True)}
        return tensors | {f"fake/{n}": p.detach() for n, p in zip(stage.names, stage.fake_params, strict=True)}
