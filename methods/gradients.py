"""Flat gradients, and their sums over the ranks of a data-parallel group.

Each rank differentiates its part of a loss (already divided by the size of the global batch); `flat` returns the sum of
the parts, the same on every rank. A flat gradient is the storage that the backward pass itself writes into, so a method
that combines two of them holds two vectors and nothing else; scalars stay on the device, so no step waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

Products = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def average(averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], decay: float) -> None:
    """Moves averages towards the weights in place, tensor by tensor: average <- decay average + (1 - decay) weight."""
    torch._foreach_lerp_(list(averages), [w.detach() for w in weights], 1 - decay)  # one kernel for all


def ranks() -> int:
    """Number of ranks of the process group; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums in place over all ranks; the identity outside a process group."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The rows (n, ...) of all ranks, in the order of the ranks; the identity outside a process group.

    Gradients flow into this rank's rows, so `flat` of a loss of all rows is its gradient. Every rank must have the same n.
    """
    if ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def local(
    loss: torch.Tensor | Iterable[torch.Tensor],
    params: Sequence[torch.Tensor],
    keep_graph: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's gradient of a loss as one vector; a parameter that the loss does not reach contributes zeros.

    For several losses, such as those of the pieces of a batch, it is the gradient of their sum. They are differentiated one
    after the other as they arrive, so the graphs of two never exist at once. The vector is `out`, overwritten, if that is
    given. Afterwards the `.grad` of `params` are views of it.
    """
    vector = empty(params).zero_() if out is None else out.zero_()
    assign(params, vector)
    for part in [loss] if isinstance(loss, torch.Tensor) else loss:
        torch.autograd.backward(part, inputs=list(params), retain_graph=keep_graph)
    return vector


def flat(
    loss: torch.Tensor | Iterable[torch.Tensor],
    params: Sequence[torch.Tensor],
    keep_graph: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the global loss as one vector: the sum over all ranks of `local`.

    `Method.prepare`, which every rank runs on all rows, takes `local` instead.
    """
    return sum_over_ranks(local(loss, params, keep_graph, out))


def mean_squares(losses: Iterable[torch.Tensor], params: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The mean over losses of the elementwise square of this rank's gradient, as one vector: of losses of single samples, the
    diagonal of the empirical Fisher information. None if there are no losses.

    They are differentiated one after the other as they arrive.
    """
    total, count = empty(params).zero_(), 0
    for loss in losses:
        total, count = total.add_(local(loss, params).square_()), count + 1
    return total.div_(count) if count else None


def empty(params: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised vector for one flat gradient of `params`."""
    return torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)


def assign(params: Sequence[torch.Tensor], vector: torch.Tensor) -> None:
    """Makes the `.grad` of `params` views of consecutive pieces of `vector`."""
    for p, piece in zip(params, split(params, vector), strict=True):
        p.grad = piece


def split(params: Sequence[torch.Tensor], vector: torch.Tensor) -> list[torch.Tensor]:
    """`vector` cut into pieces of the shapes of `params`, in order."""
    pieces = torch.split(vector, [p.numel() for p in params])
    return [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]


def clip(vector: torch.Tensor, norm: torch.Tensor, limit: float) -> None:
    """Scales `vector` of L2 norm `norm` in place to at most `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    vector.mul_((limit / (norm + 1e-6)).clamp(max=1.0))


def scalars(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of this rank's scalar parts over all ranks, float64 and on the device."""
    values = sum_over_ranks(torch.stack([part.detach().double() for part in parts.values()]))
    return dict(zip(parts, values.unbind(), strict=True))


def products(a: torch.Tensor, b: torch.Tensor) -> Products:
    """(<a, b>, <a, a>, <b, b>) of flat vectors, at least in single precision."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)


def cosine(dot: torch.Tensor, a_sq: torch.Tensor, b_sq: torch.Tensor) -> torch.Tensor:
    """Cosine from `products`, 0 where one of the vectors vanishes."""
    scale = a_sq.sqrt() * b_sq.sqrt()
    return torch.where(scale > 0, dot / torch.where(scale > 0, scale, 1), 0)
