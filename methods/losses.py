"""What a model knows of the forget set, by the model itself: losses and accuracies of diffusion and contrastive models.

A contrastive model (CLIP) has `encode_image(x)` and `encode_text(cond)` in place of a noise schedule; its rows carry
images and the tokens of their captions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from methods import gradients
from methods.base import Goal, Model, Reduction, Rows, diffusion_loss, squared_errors, timesteps


def contrastive(model: Any) -> bool:
    """Whether the model compares images with captions instead of denoising."""
    return hasattr(model, "encode_image")


def comparing(model: Any) -> Any:
    """A contrastive model itself, or the one that a text-to-image model's text encoder is of: its `tower`, whose `net` holds
    that encoder under the same names. None where it has none."""
    return model if contrastive(model) else getattr(model, "tower", None)


def forget_loss(model: Any, rows: Rows, reduction: Reduction = "mean") -> torch.Tensor:
    """Mean over rows of what unlearning raises: 1 - cos(image, caption), or the diffusion loss under `reduction`."""
    if not contrastive(model):
        return diffusion_loss(model, rows, reduction)
    return (1 - F.cosine_similarity(model.encode_image(rows.x), model.encode_text(rows.cond))).sum() / rows.total


def retain_loss(model: Any, rows: Rows, reduction: Reduction = "mean") -> torch.Tensor:
    """Mean over rows of what must stay low: symmetric InfoNCE within the global batch, or the diffusion loss under `reduction`.

    With several ranks every one compares all rows, and stands for its share of the loss. Raises ValueError if the global
    batch cannot be shared equally.
    """
    if not contrastive(model):
        return diffusion_loss(model, rows, reduction)
    world = gradients.ranks()
    if rows.total % world:
        raise ValueError(f"batch_size: {rows.total} rows cannot be shared equally by {world} workers")
    v, t = (
        gradients.gathered(F.normalize(e, dim=-1)) for e in (model.encode_image(rows.x), model.encode_text(rows.cond))
    )
    scale = model.logit_scale / world + (model.logit_scale * (1 - 1 / world)).detach()
    logits, own = scale * v @ t.T, torch.arange(len(v), device=v.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss - loss.detach() * (1 - 1 / world)


@torch.no_grad()
def recall(model: Model, forget: Rows, retain: Rows, goal: Goal) -> float:
    """The share of forget rows that the model still knows.

    Contrastive: an image counts if its own caption is the closest of all distinct captions. With classes: if the
    forgotten class's label gives the lowest denoising loss of all labels (a diffusion classifier, arXiv:2303.16203).
    Otherwise: if its denoising loss is below the mean of the retain rows'.
    """
    model.net.eval()
    if contrastive(model):
        assert forget.cond is not None
        assert retain.cond is not None
        captions, own = torch.unique(torch.cat([forget.cond, retain.cond]), dim=0, return_inverse=True)
        v = F.normalize(model.encode_image(forget.x), dim=-1)  # type: ignore[attr-defined]
        t = F.normalize(model.encode_text(captions), dim=-1)  # type: ignore[attr-defined]
        return float(((v @ t.T).argmax(1) == own[: len(v)]).double().mean())
    if goal.kind == "class":
        losses = torch.stack([_losses(model, forget, c) for c in goal.classes], 1)
        return float((losses.argmin(1) == goal.classes.index(goal.forget_class)).double().mean())
    return float((_losses(model, forget) < _losses(model, retain).mean()).double().mean())


def _losses(model: Model, rows: Rows, label: int | None = None, draws: int = 8) -> torch.Tensor:
    """Denoising loss per row, (n,), over a few draws of noise and timestep that every label shares."""
    cond = rows.cond if label is None else torch.full((len(rows.x),), label, device=rows.x.device)
    total = torch.zeros(len(rows.x), dtype=torch.float64, device=rows.x.device)
    for k in range(draws):
        again = Rows(rows.x, cond, rows.reseeded(k).seeds, rows.total)
        errors = squared_errors(model, again, timesteps(model, again), model.noise(again.seeds))
        total += errors.double().flatten(1).mean(1)
    return total / draws
