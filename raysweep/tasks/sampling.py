"""Samples of bounded size from sources of any length, as images in [-1, 1]."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from raysweep.tasks.decoding import flat
from raysweep.tasks.records import Record, Tally, Unreadable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Picked:
    """One image of a sample: its content's place in the seed's order, and what is known of it."""

    order: str
    x: torch.Tensor
    label: str | None
    caption: str | None
    other: str | None = None


class Sample:
    """The `size` images whose content comes first in the order of a seed; the rest is let go at once. A picture that is
    there already is not taken again, unless `repeats`.

    again: pictures that were there already; beyond: those that found no room.
    """

    def __init__(self, size: int, seed: int, repeats: bool = False):
        self.size, self.seed, self.repeats = size, seed, repeats
        self._heap: list[tuple[int, int, Picked]] = []
        self._orders: set[str] = set()
        self._count = self.again = self.beyond = 0

    def add(self, x: torch.Tensor, label: str | None, caption: str | None, other: str | None = None) -> None:
        order = hashlib.sha256(f"{self.seed} ".encode() + x.numpy().tobytes()).hexdigest()
        if order in self._orders and not self.repeats:
            self.again += 1
            return
        self._count += 1
        item = (-int(order, 16), -self._count, Picked(order, x, label, caption, other))
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, item)
        else:
            gone = heapq.heappushpop(self._heap, item)
            self.beyond += 1
            if gone is item:
                return
            self._orders.discard(gone[2].order)
        self._orders.add(order)

    def images(self) -> list[Picked]:
        """The sample, in its order."""
        return [item[2] for item in sorted(self._heap, reverse=True)]


def pixels(
    source: Any, shape: tuple[int, int, int], tally: Tally, required: Collection[str] = ()
) -> Iterator[tuple[Record, torch.Tensor]]:
    """(record, image in [-1, 1] of `shape`) of a source: upright, the largest centred part of its proportions, resized.

    required: `label`, `caption`; a record without one is left out.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    channels, height, width = shape
    last, x = None, None
    for record in source.records(tally):
        if record is not last:  # a repeated record is read, and counted, once
            last, x = record, None
            try:
                _check(record, required, tally)
                image = flat(record.open(), channels, partial(_note, tally, record))
            except Unreadable as error:
                tally.skip(str(error), record.key, place=record.place)
                continue
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            array = np.asarray(fitted, dtype=np.float32).reshape(height, width, channels)
            x = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()
        if x is not None:
            yield record, x


def _check(record: Record, required: Collection[str], tally: Tally) -> None:
    if "caption" in required and record.caption is None:
        raise Unreadable(f"no caption, which the model needs ({tally.hint}; `captioned` gives one to all)")
    if "label" in required and record.label is None:
        raise Unreadable("no label, which the task needs (`label` says where labels are, `labelled` gives one to all)")


def _note(tally: Tally, record: Record, what: str) -> None:
    tally.note(what, record.place or record.key)
