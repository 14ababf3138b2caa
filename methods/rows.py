"""Rows of a batch, and requests for them: what a method reads of a task's data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SEEDS = "seeds"  # a split without images: each row is a seed alone


@dataclass(frozen=True)
class Rows:
    """This rank's share of a global batch.

    x: (n, C, H, W) in [-1, 1], or (n, 0) in rows of seeds alone; cond: class labels (n,), tokens (n, length), or None;
    seeds: (n,) int64, one per row; total: rows of the global batch over all ranks, the denominator of every mean;
    ranks: the number of ranks that share the global batch, 1 where these rows are all of it.
    """

    x: torch.Tensor
    cond: torch.Tensor | None
    seeds: torch.Tensor
    total: int
    ranks: int = 1

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """The same rows on the network's device and in its dtype; seeds stay on the CPU as they are."""
        return replace(self, x=self.x.to(device, dtype), cond=None if self.cond is None else self.cond.to(device))

    def piece(self, part: slice) -> Rows:
        """Some of the rows. `total` stays, so that the losses of all pieces add up to the loss of the whole."""
        cond = None if self.cond is None else self.cond[part]
        return replace(self, x=self.x[part], cond=cond, seeds=self.seeds[part])

    def reseeded(self, k: int) -> Rows:
        """The same rows with other random numbers, for the k-th use of a batch within one step."""
        return replace(self, seeds=self.seeds ^ (k * 0x5851F42D4C957F2D % 2**63))

    @property
    def second_seeds(self) -> torch.Tensor:
        """Seeds (n,) of numbers that must not depend on the row's noise and timestep."""
        return self.seeds ^ 0x2545F4914F6CDD1D


Batch = dict[str, Rows]


@dataclass(frozen=True)
class Draw:
    """A request for rows at every step.

    size: rows of the global batch; None: the whole split, once.
    balanced: equally many rows of each group (class).
    per_group: at most this many rows of each group take part; None: all.
    groups: only these groups take part; None: all.
    split: the source of the rows; None: the split that the request is named after; SEEDS: seeds without images.
    stream, number: batch `number` of the endless shuffled passes that all requests of this stream share; None: the
    request's stream, and the number of the step.
    """

    size: int | None
    balanced: bool = False
    per_group: int | None = None
    groups: tuple[int, ...] | None = None
    split: str | None = None
    stream: str | None = None
    number: int | None = None
