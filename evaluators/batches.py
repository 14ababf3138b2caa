"""Sizes of batches: how many rows go through a network at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

ROWS = 50  # images that a generator puts through its network at once: another number rounds differently

T = TypeVar("T")


class Batches:
    """Runs functions over slices of rows, and halves the slices when memory runs out.

    Whoever measures several subjects gives them the same object, so a size that did not fit is not tried again. Apart from
    rounding, results do not depend on the size, because every row has its own seed.

    size: rows at once; halved: how often memory ran out; generated: images that subjects generated.
    """

    def __init__(self, size: int = 500):
        self.size, self.halved, self.generated = size, 0, 0

    @property
    def rows(self) -> int:
        """Rows at once in a generator: constant while memory suffices, so images are bit-identical for any batch composition."""
        return min(self.size, ROWS)

    def map(self, function: Callable[[slice], T], count: int) -> list[T]:
        """`function(rows)` for consecutive slices of `count` rows, in order."""
        parts, start = [], 0
        while start < count:
            try:
                parts.append(function(slice(start, min(count, start + self.size))))
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size, self.halved = self.size // 2, self.halved + 1
                continue
            start += self.size
        return parts

    @torch.no_grad()
    def evaluate(self, network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> np.ndarray:
        """`network(x)`, float64 (n, ...), for x (n, ...), which is passed on as float32."""
        return torch.cat(self.map(lambda rows: network(x[rows].float()).double().cpu(), len(x))).numpy()
