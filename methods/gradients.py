"""Flat gradients, and their sums over the ranks of a data-parallel group.

Each rank differentiates its part of a loss (already divided by the size of the global batch); `flat` returns the sum of
the parts, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums in place over all ranks; the identity outside a process group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def flat(loss: torch.Tensor, params: Sequence[torch.Tensor], keep_graph: bool = False) -> torch.Tensor:
    """The gradient of the global loss as one vector; a parameter that the loss does not reach contributes zeros."""
    parts = torch.autograd.grad(loss, params, retain_graph=keep_graph, allow_unused=True)
    vector = torch.cat([_zeros(p) if g is None else g.reshape(-1) for g, p in zip(parts, params, strict=True)])
    return sum_over_ranks(vector)


def assign(params: Sequence[torch.Tensor], vector: torch.Tensor) -> None:
    """Writes consecutive pieces of `vector` into the `.grad` of `params`."""
    for p, piece in zip(params, split(params, vector), strict=True):
        p.grad = piece


def split(params: Sequence[torch.Tensor], vector: torch.Tensor) -> list[torch.Tensor]:
    """`vector` cut into pieces of the shapes of `params`, in order."""
    pieces = torch.split(vector, [p.numel() for p in params])
    return [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]


def scalars(**parts: torch.Tensor) -> dict[str, float]:
    """Sums of this rank's scalar parts over all ranks."""
    values = sum_over_ranks(torch.stack([part.detach().double() for part in parts.values()]))
    return dict(zip(parts, values.tolist(), strict=True))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two flat vectors, 0 where one of them vanishes."""
    scale = float(a.norm() * b.norm())
    return float(torch.dot(a, b)) / scale if scale > 0 else 0.0


def _zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
