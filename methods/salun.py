"""SalUn: saliency-masked unlearning by random labels.

Source: Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification
and Generation", ICLR 2024, arXiv:2310.12508, and the released DDPM code.
    mask   m = 1 on the `fraction` of weights with the largest |G|, over the whole model, where G is the *signed* sum of
           the forget loss's gradients over one pass of the forget set at the base weights (absolute value taken last)
    loss   L = mean |eps_theta(x_t, c_f) - stopgrad eps_theta(x_t, c')|^2  +  alpha * L_r,   x from the forget set
    update the gradient is multiplied by m; without weight decay the other weights do not change by a bit
The released code takes c' = (c_f + 1) mod 10 for every row ("next"); the teacher is the network being trained. Its L_r is
a sum over the D elements of an image while the first term is a mean. Both are means here, and alpha is D times that of the
release: its 1e-3 is 3.07 for 3x32x32 and 12.29 for 3x64x64. The total is the same, and so is the effect of the clip of 1. The
release for Stable Diffusion takes means in both terms and does not clip.

The released mask differentiates a sum of predictions guided at w = 2 and clips the gradient of every batch to 1 before the
sum; this one differentiates the conditional diffusion loss, unclipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field

from methods import gradients
from methods.base import Data, Descent, Goal, Model, Scalars, Training
from methods.losses import diffusion_loss, squared_errors, timesteps, without_labels
from methods.relabelling import Relabel, relabel_loss, stand_in, without_override
from methods.rows import Batch, Rows


class SalUnSettings(Training):
    """Settings of SalUn."""

    lr: float = Field(1e-4, gt=0, description="learning rate (released code, DDPM)")
    steps: int = Field(1000, ge=0, description="optimiser steps (released code, DDPM)")
    fraction: float = Field(0.5, gt=0, le=1, description="share of weights that may change (released code: 0.5)")
    alpha: float = Field(
        3.07, ge=0, description="weight of the retain loss, both terms means (released: 1e-3 on a sum, at 3x32x32)"
    )
    relabel: Relabel = Field("next", description="the class whose output is imitated")
    label_drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of rows without label, drawn separately for each pass (released code, DDPM: 0.1)",
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="gradient clipping (released, DDPM, before the mask; SD: off)"
    )
    weight_decay: float = Field(0.0, ge=0, le=0, description="fixed at 0: decay would change masked weights")


class SalUn(Descent):
    """Random-label unlearning on the salient weights; arXiv:2310.12508."""

    name = "salun"
    source = "Fan et al., ICLR 2024, arXiv:2310.12508"
    needs = frozenset({"forget", "retain"})
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 7
    copies = 8
    passes = 8  # draws of noise and timestep per forget row when the saliency is summed
    Hyperparameters = SalUnSettings
    hp: SalUnSettings

    def setup(self) -> None:
        super().setup()
        masks = saliency_mask({name: self.prepared[name] for name in self.names}, self.hp.fraction)
        self.mask = torch.cat([masks[name].reshape(-1) for name in self.names]).to(self.params[0])

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: SalUnSettings) -> dict[str, torch.Tensor]:
        """The signed sum of the forget loss's gradients, by parameter name."""
        params = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
        first = next(iter(model.net.parameters()))
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        model.net.eval()
        for k in range(cls.passes):
            rows = task.all_rows("forget", seed + k).to(first.device, first.dtype)
            errors = squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds))
            flat = gradients.local(errors.flatten(1).mean(1).mean(), list(params.values()))
            for sums, g in zip(total.values(), gradients.split(list(params.values()), flat), strict=True):
                sums += g
        model.net.zero_grad()
        return total

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        losses: Scalars = {}

        def each() -> Iterator[torch.Tensor]:  # one graph at a time
            forget = batch["forget"]
            relabel = relabel_loss(self.model, forget, self.stand_in(forget), self.hp.label_drop)
            losses["relabel_loss"] = relabel.detach()
            yield relabel
            retain = diffusion_loss(self.model, without_labels(self.model, batch["retain"], self.hp.label_drop))
            losses["retain_loss"] = retain.detach()
            yield self.hp.alpha * retain

        return self.gradient(each()), gradients.scalars(**losses)

    def constrain(self, flat: torch.Tensor) -> None:
        flat.mul_(self.mask)

    def stand_in(self, rows: Rows) -> torch.Tensor:
        """The condition that each row imitates: a label (n,), or one of the prompts of a class (n, length)."""
        return stand_in(self.model, rows, self.goal, self.hp.relabel)

    @classmethod
    def unsuited(cls, hyperparameters: SalUnSettings, model: Model, goal: Goal) -> list[str]:
        return without_override(goal, hyperparameters.relabel)


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
