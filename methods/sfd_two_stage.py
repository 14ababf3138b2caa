"""Two-stage SFD: distil first, forget afterwards.

Source: Chen, Zhang, Zhou, "Score Forgetting Distillation", ICLR 2025, arXiv:2409.11219, two-stage variant, and the released
code. Stage 1 is plain score identity distillation of the base model (`methods.sfd` with both weights of the forgotten
class 0); stage 2 is SFD from the moving average of its generator, with a larger weight of forgetting and no moving average
(paper; the released file has the one-stage values of both: 0.01 and 0.9999). Stage 1 shares the settings of stage 2, except
those of forgetting and those with a separate value `stage1_*`; it is prepared once for each combination and shared by all
trials.

The teacher of stage 2 is the base model. The released code loads it from the slot that holds stage 1's fake score, so there
the teacher is not the original one. The fake score continues from stage 1.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from pydantic import Field

from methods.base import Data, Model
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
    lr_fake: float = Field(3e-5, gt=0, description="learning rate of the fake score of stage 2 (released: 3e-5)")
    stage1_steps: int = Field(50_000, ge=1, description="steps of stage 1 (released: 50k)")
    stage1_lr: float = Field(1e-5, gt=0, description="learning rate of stage 1's generator (released: 1e-5)")
    stage1_lr_fake: float = Field(3e-5, gt=0, description="learning rate of stage 1's fake score (released: 3e-5)")
    stage1_ema: float = Field(0.9999, ge=0, lt=1, description="decay of stage 1's moving average (released: 0.9999)")
    stage1_batch_size: int = Field(128, ge=1, description="rows of a step of stage 1 (released: 128)")


FORGETTING = ("forget", "fake_forget", "forget_batch_size", "override")
SEPARATE = ("steps", "lr", "lr_fake", "ema", "batch_size")  # stage 1 has its value of each, `stage1_NAME`
SHARED = tuple(name for name in SFDSettings.model_fields if name not in (*FORGETTING, *SEPARATE))


class SFDTwoStage(SFD):
    """Forgets from a distilled generator, with the original teacher; arXiv:2409.11219, two stages."""

    name = "sfd_two_stage"
    source = "Chen, Zhang, Zhou, ICLR 2025, arXiv:2409.11219, two stages"
    copies = 14
    prepared_by = (*(f"stage1_{name}" for name in SEPARATE), *SHARED)
    quick = {"stage1_steps": 1}
    Hyperparameters = SFDTwoStageSettings
    hp: SFDTwoStageSettings

    def setup(self) -> None:
        super().setup()  # copies the teacher, before the generator changes below
        with torch.no_grad():
            for name, p, average, fake in zip(self.names, self.params, self.ema, self.fake_params, strict=True):
                p.copy_(self.prepared[f"generator/{name}"])
                average.copy_(p)
                fake.copy_(self.prepared[f"fake/{name}"])

    @classmethod
    def prepare(
        cls, model: Model, task: Data, seed: int, hyperparameters: SFDTwoStageSettings
    ) -> dict[str, torch.Tensor]:
        """Stage 1: `generator/NAME`, the moving average of the generator, and `fake/NAME`, the fake score."""
        separate = {name: getattr(hyperparameters, f"stage1_{name}") for name in SEPARATE}
        shared = {name: getattr(hyperparameters, name) for name in SHARED}
        settings = SFDSettings(forget=0, fake_forget=0, forget_batch_size=1, **separate, **shared)
        student = model.with_net(copy.deepcopy(model.net))
        stage = SFD(student, settings, {}, replace(task.goal, forget_class=None, override_class=None))
        for step in range(settings.steps):
            stage.step(task.batch(stage.draws(), seed, step))
        stage.finish()
        tensors = {f"generator/{n}": p.detach() for n, p in zip(stage.names, stage.params, strict=True)}
        return tensors | {f"fake/{n}": p.detach() for n, p in zip(stage.names, stage.fake_params, strict=True)}
