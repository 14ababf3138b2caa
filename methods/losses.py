"""Losses and accuracies of diffusion and contrastive models, and the random choices of each row that they depend on.

A contrastive model (CLIP) has `encode_image(x)` and `encode_text(cond)` instead of a noise schedule; its rows hold images and
the tokens of their captions.

Losses are means over rows and, unless a method says otherwise, means over the elements of an image. The reduction matters
where a gradient is clipped to a norm or weighed against another term: a released clip of 1.0 binds the loss that the released
code sums. Where released codes differ, it is a setting, `reduction`.

Each row draws its own timestep; the releases of the DDPM family draw half of them and take T - 1 - t for the other half.
Images are used as the task holds them, without random flips, and latents are the mean of the autoencoder's posterior; the
releases flip at random and sample the posterior.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol, TypeGuard

import torch
import torch.nn.functional as F

from methods import gradients
from methods.base import Goal, Model
from methods.rows import Rows

Reduction = Literal["sum", "mean"]  # of a row's squared errors over the elements of its image


class Contrastive(Protocol):
    """The parts that methods use of a model that compares images with captions. Embeddings have the shape (n, d)."""

    net: Any

    @property
    def logit_scale(self) -> torch.Tensor: ...
    def encode_image(self, x: torch.Tensor) -> torch.Tensor: ...
    def encode_text(self, cond: torch.Tensor | None, /) -> torch.Tensor: ...


def is_contrastive(model: Any) -> TypeGuard[Contrastive]:
    """Whether the model compares images with captions instead of denoising."""
    return hasattr(model, "encode_image")


def contrastive_part(model: Any) -> Any:
    """The contrastive model behind a model, or None where there is none: a contrastive model itself, or the `tower` of a
    text-to-image model, whose `net` holds the same text encoder under the same names."""
    return model if is_contrastive(model) else getattr(model, "tower", None)


def timesteps(model: Model, rows: Rows, low: int = 0, high: int | None = None) -> torch.Tensor:
    """Uniform integer timesteps in [low, high), (n,); `high` defaults to the length of the schedule."""
    high = len(model.alphas) if high is None else high
    u = model.uniform(rows.seeds, 1)[:, 0]
    return (low + (u * (high - low)).long()).clamp(max=high - 1)


def pick(model: Model, rows: Rows, pool: torch.Tensor, column: int = 1) -> torch.Tensor:
    """An element of `pool` (k, ...) for each row, all equally likely, (n, ...); column: the uniform number that decides."""
    u = model.uniform(rows.seeds, column + 1)[:, column].to(pool.device)
    return pool[(u * len(pool)).long().clamp(max=len(pool) - 1)]


def without_labels(model: Model, rows: Rows, share: float, column: int = 1) -> Rows:
    """`rows` with a share of the conditions replaced by the unconditional one; column: the uniform number that decides.

    Unchanged if share is 0, if the rows have no condition, or if the model has no unconditional branch.
    """
    null = model.unconditional(len(rows.x))
    if share == 0 or rows.cond is None or null is None:
        return rows
    drop = (model.uniform(rows.seeds, column + 1)[:, column] < share).to(rows.cond.device)
    drop = drop.view(-1, *[1] * (rows.cond.dim() - 1))
    return replace(rows, cond=torch.where(drop, null, rows.cond))


def squared_errors(model: Model, rows: Rows, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """(predict - target)^2 per element, in the model's own parameterisation, shape of rows.x."""
    output = model.predict(model.add_noise(rows.x, eps, t), t, rows.cond)
    return (output - model.target(rows.x, eps, t)).square()


def diffusion_loss(model: Model, rows: Rows, reduction: Reduction = "mean") -> torch.Tensor:
    """This rank's part of the plain diffusion loss: mean or sum over elements, sum over its rows, divided by the total."""
    errors = squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds)).flatten(1)
    return (errors.mean(1) if reduction == "mean" else errors.sum(1)).sum() / rows.total


def forget_loss(model: Any, rows: Rows, reduction: Reduction = "mean") -> torch.Tensor:
    """This rank's part of the loss that unlearning raises: the mean over rows of 1 - cos(image, caption), or the diffusion
    loss under `reduction`."""
    if not is_contrastive(model):
        return diffusion_loss(model, rows, reduction)
    return (1 - F.cosine_similarity(model.encode_image(rows.x), model.encode_text(rows.cond))).sum() / rows.total


def retain_loss(model: Any, rows: Rows, reduction: Reduction = "mean") -> torch.Tensor:
    """This rank's part of the loss that must stay low: symmetric InfoNCE within the global batch, or the diffusion loss under
    `reduction`.

    Where several ranks share a batch, each compares all of its rows and contributes an equal share of the loss. Raises
    ValueError if the global batch cannot be shared equally.
    """
    if not is_contrastive(model):
        return diffusion_loss(model, rows, reduction)
    if rows.total % rows.ranks:
        raise ValueError(f"batch_size: {rows.total} rows cannot be shared equally by {rows.ranks} workers")
    v, t = (F.normalize(e, dim=-1) for e in (model.encode_image(rows.x), model.encode_text(rows.cond)))
    if rows.ranks > 1:
        v, t = gradients.gathered(v), gradients.gathered(t)
    share = 1 / rows.ranks
    scale = model.logit_scale / rows.ranks + (model.logit_scale * (1 - share)).detach()
    logits, partner = scale * v @ t.T, torch.arange(len(v), device=v.device)
    loss = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
    return loss - loss.detach() * (1 - share)


@torch.no_grad()
def recall(model: Any, forget: Rows, retain: Rows, goal: Goal) -> float:
    """Share of the forget rows that the model still knows, in [0, 1].

    Contrastive: an image counts if its own caption is the closest of all distinct captions. With classes: if the
    forgotten class's label gives the lowest denoising loss of all labels (a diffusion classifier, arXiv:2303.16203).
    Otherwise: if its denoising loss is below the mean of the retain rows'.
    """
    model.net.eval()
    if is_contrastive(model):
        assert forget.cond is not None
        assert retain.cond is not None
        captions, caption_of = torch.unique(torch.cat([forget.cond, retain.cond]), dim=0, return_inverse=True)
        v = F.normalize(model.encode_image(forget.x), dim=-1)
        t = F.normalize(model.encode_text(captions), dim=-1)
        return float(((v @ t.T).argmax(1) == caption_of[: len(v)]).double().mean())
    if goal.kind == "class":
        losses = torch.stack([denoising_losses(model, forget, c) for c in goal.classes], 1)
        return float((losses.argmin(1) == goal.classes.index(goal.forgotten_class)).double().mean())
    return float((denoising_losses(model, forget) < denoising_losses(model, retain).mean()).double().mean())


def denoising_losses(model: Model, rows: Rows, label: int | None = None, draws: int = 8) -> torch.Tensor:
    """Denoising loss per row, (n,), float64: the mean over draws of noise and timestep that are the same for every label."""
    cond = rows.cond if label is None else torch.full((len(rows.x),), label, device=rows.x.device)
    total = torch.zeros(len(rows.x), dtype=torch.float64, device=rows.x.device)
    for k in range(draws):
        drawn = replace(rows.reseeded(k), cond=cond)
        errors = squared_errors(model, drawn, timesteps(model, drawn), model.noise(drawn.seeds))
        total += errors.double().flatten(1).mean(1)
    return total / draws
