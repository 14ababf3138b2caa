"""SalUn: saliency-masked unlearning by random labels.

Source: Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification
and Generation", ICLR 2024, arXiv:2310.12508, and the released DDPM code.
    mask   m = 1 on the `fraction` of weights with the largest |G|, over the whole model, where G is the *signed* sum of
           the forget loss's gradients over one pass of the forget set at the base weights (absolute value last)
    loss   L = mean |eps_theta(x_t, c_f) - stopgrad eps_theta(x_t, c')|^2  +  alpha * L_r,   x from the forget set
    update the gradient is multiplied by m; with no weight decay the other weights stay bitwise as they are
The released code takes c' = (c_f + 1) mod 10 for every row ("next"); the teacher is the network being trained. Its L_r is
a sum over elements while the first term is a mean: alpha = 1e-3 there is about 3.07 here for 3x32x32 images, because
both terms here are means. The released mask differentiates classifier-free-guided predictions at w = 2; this one
differentiates the conditional diffusion loss itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Batch, Data, Draw, Method, Model, Rows, Training, mean_loss, squared_errors, timesteps


class SalUnSettings(Training):
    """Settings of SalUn."""

    lr: float = Field(1e-4, gt=0, description="learning rate (released code, DDPM)")
    steps: int = Field(1000, ge=0, description="optimiser steps (released code, DDPM)")
    fraction: float = Field(0.5, ge=0, le=1, description="share of weights that may move (released code: 0.5)")
    alpha: float = Field(3.07, ge=0, description="weight of the retain loss, both terms means (released 1e-3 on a sum)")
    relabel: Literal["override", "next", "random"] = Field("next", description="the class whose output is imitated")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released code, before the mask)")
    weight_decay: float = Field(0.0, ge=0, le=0, description="fixed at 0: decay would move masked weights")


class SalUn(Method):
    """Random-label unlearning on the salient weights; arXiv:2310.12508."""

    name = "salun"
    source = "Fan et al., ICLR 2024, arXiv:2310.12508"
    needs = frozenset({"forget", "retain"})
    kinds = frozenset({"class"})
    forwards_per_step = 3
    passes = 8  # draws of noise and timestep per forget row when the saliency is summed
    Hyperparameters = SalUnSettings
    hp: SalUnSettings

    def __init__(self, model: Model, hyperparameters: SalUnSettings, prepared: dict[str, torch.Tensor] | None = None):
        super().__init__(model, hyperparameters, prepared)
        names = [name for name, p in model.net.named_parameters() if p.requires_grad]
        saliency = {name: self.prepared[name] for name in names}
        masks = saliency_mask(saliency, hyperparameters.fraction)
        self.mask = torch.cat([masks[name].reshape(-1) for name in names]).to(self.params[0])
        self.labels = self.prepared["labels"]

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int) -> dict[str, torch.Tensor]:
        """The signed sum of gradients by parameter name, and `labels` = (forgotten class, stand-in class, classes)."""
        assert task.forget_class is not None
        assert task.override_class is not None
        params = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        model.net.eval()
        for k in range(cls.passes):
            rows = task.all_rows("forget", seed + k)
            errors = squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds))
            grads = torch.autograd.grad(errors.flatten(1).mean(1).mean(), list(params.values()), allow_unused=True)
            for name, g in zip(params, grads, strict=True):
                if g is not None:
                    total[name] += g
        labels = task.all_rows("train", seed).cond
        assert labels is not None
        classes = int(labels.max()) + 1
        return total | {"labels": torch.tensor([task.forget_class, task.override_class, classes])}

    def draws(self) -> dict[str, Draw]:
        return {"forget": Draw(self.hp.batch_size), "retain": Draw(self.hp.batch_size)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        forget, model = batch["forget"], self.model
        t = timesteps(model, forget)
        x_t = model.add_noise(forget.x, model.noise(forget.seeds), t)
        with torch.no_grad():
            teacher = model.predict(x_t, t, self.stand_in(forget))
        errors = (model.predict(x_t, t, forget.cond) - teacher).square()
        relabel_loss = errors.flatten(1).mean(1).sum() / forget.total
        retain_loss = mean_loss(model, batch["retain"])
        gradient = gradients.flat(relabel_loss + self.hp.alpha * retain_loss, self.params)
        return gradient, gradients.scalars(relabel_loss=relabel_loss, retain_loss=retain_loss)

    def step(self, batch: Batch) -> dict[str, float]:
        hook = self.optimizer.register_step_pre_hook(lambda *_: self._apply_mask())
        try:
            return super().step(batch)
        finally:
            hook.remove()

    def stand_in(self, rows: Rows) -> torch.Tensor:
        """The class imitated for each row, (n,)."""
        assert rows.cond is not None
        forgotten, override, classes = self.labels.tolist()
        if self.hp.relabel == "override":
            return torch.full_like(rows.cond, override)
        if self.hp.relabel == "next":
            return torch.full_like(rows.cond, (forgotten + 1) % classes)
        shift = 1 + (self.model.uniform(rows.seeds, 2)[:, 1] * (classes - 1)).long()
        return (forgotten + shift) % classes

    def _apply_mask(self) -> None:
        for p, m in zip(self.params, gradients.split(self.params, self.mask), strict=True):
            p.grad.mul_(m)


def saliency_mask(grads: dict[str, torch.Tensor], fraction: float) -> dict[str, torch.Tensor]:
    """0/1 tensors of the shapes of `grads`: ones on the int(fraction N) largest |g| over all of them.

    Ties go to the earlier weight, so masks are nested in `fraction`.
    """
    flat = torch.cat([g.reshape(-1).abs() for g in grads.values()])
    order = torch.argsort(flat, descending=True, stable=True)
    mask = torch.zeros_like(flat)
    mask[order[: int(fraction * len(flat))]] = 1
    pieces = torch.split(mask, [g.numel() for g in grads.values()])
    return {name: piece.view_as(g) for (name, g), piece in zip(grads.items(), pieces, strict=True)}
