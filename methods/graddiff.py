"""GradDiff: ascent on the forget set plus descent on the retain set.

Source: Ko et al., "Boosting Alignment for Post-Unlearning Text-to-Image Generative Models", NeurIPS 2024,
arXiv:2412.07808, baseline GradDiff.
    g_f = gradient of the negated, truncated forget loss;  g_r = gradient of the retain loss
    descend along  g_f + lam * g_r
The truncation stops the ascent where the model is already wrong enough. The released code has two, with different
units, kept here under two names:
    trunc_elem_sq     (CIFAR/EDM code, alpha): w(t) min((x0_hat - x0)^2, alpha) per element, in squared pixels of [-1, 1]
    trunc_batch_loss  (Stable Diffusion code, m): no ascent at all on a batch whose mean loss exceeds m
The retain rows of a step are a minibatch, a minibatch balanced over the groups (classes), or all of the retain set in pieces
of `batch_size`; with the latter two this is the paper's GradDiffD. Their groups may be chosen (the paper's ablation: two
classes near the forgotten one against all nine, at equal size). Neither release clips the norm of a gradient. The CIFAR
release sums losses over elements, which scales both terms alike; m is in units of a mean, as in the Stable Diffusion release.

A contrastive model ascends 1 - cos(image, caption) of forgotten pairs and descends the symmetric InfoNCE of retained ones
(baseline GAFT of arXiv:2407.11867, with both gradients in one step); nothing is truncated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field

from methods import gradients
from methods.base import Descent, Goal, Model, Scalars, Training
from methods.losses import forget_loss, is_contrastive, retain_loss, squared_errors, timesteps
from methods.rows import Batch, Draw, Rows


class AscentSettings(Training):
    """Settings of a method with the gradients of an ascent on the forget set and a descent on the retain set."""

    lr: float = Field(1e-5, gt=0, description="learning rate (paper, CIFAR-10 on EDM and Stable Diffusion)")
    steps: int = Field(782, ge=0, description="optimiser steps (released script, CIFAR-10: 50k forget images / 64)")
    trunc_elem_sq: float | None = Field(None, ge=0, description="truncation alpha in squared pixels; null: off")
    trunc_batch_loss: float | None = Field(None, gt=0, description="truncation m on the batch-mean loss; null: off")
    retain_pass: Literal["minibatch", "balanced", "full"] = Field("minibatch", description="retain rows per step")
    retain_per_group: int | None = Field(None, ge=1, description="rows kept of each group; null: all (paper: 50)")
    retain_groups: tuple[int, ...] | None = Field(None, min_length=1, description="groups (classes) kept; null: all")


class GradDiffSettings(AscentSettings):
    """Settings of GradDiff."""

    lam: float = Field(
        5.0, ge=0, description="weight of the retain gradient relative to the ascent (paper: 5 on CIFAR-10)"
    )


class TwoGradients(Descent):
    """A method that combines the gradient of an ascent on the forget set with that of a descent on the retain set."""

    needs = frozenset({"forget", "retain"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    forwards_per_step = 6
    hp: AscentSettings

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        if is_contrastive(model) and (hyperparameters.trunc_elem_sq, hyperparameters.trunc_batch_loss) != (None, None):
            return [
                "trunc_elem_sq, trunc_batch_loss: a contrastive loss is bounded and not truncated; set both to null"
            ]
        if goal.kind != "class" or hyperparameters.retain_groups is None:
            return []
        unknown = sorted(set(hyperparameters.retain_groups) - set(goal.kept))
        return [f"retain_groups: {unknown} are not among the retained classes {list(goal.kept)}"] if unknown else []

    def draws(self) -> dict[str, Draw]:
        hp = self.hp
        retain = Draw(
            None if hp.retain_pass == "full" else hp.batch_size,
            balanced=hp.retain_pass == "balanced",
            per_group=hp.retain_per_group,
            groups=hp.retain_groups,
        )
        return super().draws() | {"retain": retain}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        g_forget, lost, truncated = self.forget_gradient(batch["forget"])
        g_retain, retain = self.retain_gradient(batch["retain"])
        scalars = gradients.scalars(forget_loss=lost, retain_loss=retain, truncated=truncated)
        products = gradients.products(g_forget, g_retain)
        return self.combine(g_forget, g_retain, products), scalars | {"cosine": gradients.cosine(*products)}

    @abstractmethod
    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor, products: gradients.Products) -> torch.Tensor:
        """The update direction for the flat gradients of two losses that are minimised, in the storage of `g_forget`."""

    def retain_gradient(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(flat gradient of the retain loss, this rank's part of the loss).

        A full pass is split into pieces of `batch_size` rows over all ranks: the gradient is that of the mean over all rows,
        and the memory that of a batch. A contrastive loss compares all rows with each other, so they stay together.
        """
        pieces = self.hp.retain_pass == "full" and not is_contrastive(self.model)
        size = max(1, self.hp.batch_size // rows.ranks) if pieces else max(1, len(rows.x))
        losses = [torch.zeros((), dtype=self.params[0].dtype, device=self.params[0].device)]

        def parts() -> Iterator[torch.Tensor]:
            for start in range(0, len(rows.x), size):
                loss = retain_loss(self.model, rows.piece(slice(start, start + size)))
                losses.append(loss.detach())
                yield loss

        return self.gradient(parts(), 1), torch.stack(losses).sum()

    def forget_gradient(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(flat gradient of the negated truncated loss, this rank's part of the loss, its part of the truncated share)."""
        if is_contrastive(self.model):
            loss = forget_loss(self.model, rows)
            return self.gradient(-loss), loss, torch.zeros_like(loss)
        t = timesteps(self.model, rows)
        errors = squared_errors(self.model, rows, t, self.model.noise(rows.seeds))
        loss = errors.detach().flatten(1).mean(1).sum() / rows.total
        errors, cut = truncate_elements(errors, self.model.x0_error_weight(t), self.hp.trunc_elem_sq)
        truncated = cut.double().flatten(1).mean(1).sum() / rows.total
        gradient = self.gradient(-errors.flatten(1).mean(1).sum() / rows.total)
        if self.hp.trunc_batch_loss is not None:
            stop = gradients.scalars(loss=loss)["loss"] > self.hp.trunc_batch_loss
            gradient.masked_fill_(stop, 0.0)
            truncated = torch.where(stop, len(rows.x) / rows.total, truncated)
        return gradient, loss, truncated


class GradDiff(TwoGradients):
    """Descends g_f + lam g_r; arXiv:2412.07808, GradDiff."""

    name = "graddiff"
    source = "Ko et al., NeurIPS 2024, arXiv:2412.07808, baseline GradDiff"
    Hyperparameters: ClassVar[type[BaseModel]] = GradDiffSettings
    hp: GradDiffSettings

    def combine(self, g_forget: torch.Tensor, g_retain: torch.Tensor, products: gradients.Products) -> torch.Tensor:
        return g_forget.add_(g_retain, alpha=self.hp.lam)


def truncate_elements(
    errors: torch.Tensor, weight: torch.Tensor, limit: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w min(e/w, limit), a mask of the elements where the limit binds) for squared errors e = w (x0_hat - x0)^2.

    errors: (n, C, H, W); weight: (n, 1, 1, 1), positive; limit: in squared pixels; None leaves the errors unchanged.
    """
    if limit is None:
        return errors, torch.zeros_like(errors, dtype=torch.bool)
    cut = errors.detach() > weight * limit
    return torch.where(cut, (weight * limit).expand_as(errors), errors), cut
