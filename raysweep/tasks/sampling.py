"""Random samples of bounded size from image sources of any length, as tensors in [-1, 1]."""

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


@dataclass(frozen=True, eq=False)
class Picked:
    """One image of a sample, the name of its record, and its labels; order: hash of seed and content, by which images are drawn."""

    order: str
    key: str
    x: torch.Tensor
    label: str | None
    caption: str | None
    other: str | None = None


class Sample:
    """Keeps the `size` images with the smallest hashes of seed and content, independent of their order in the source.

    Images that are in the sample already are not added again, unless `repeats`. again: how many repeated an image in the sample;
    beyond: how many were dropped because the sample was full.
    """

    def __init__(self, size: int, seed: int, repeats: bool = False):
        self.size, self.seed, self.repeats = size, seed, repeats
        self._heap: list[tuple[int, int, Picked]] = []
        self._orders: set[str] = set()
        self._count = self.again = self.beyond = 0

    def add(self, record: Record, x: torch.Tensor) -> None:
        """Offers a record's image to the sample."""
        order = hashlib.sha256(f"{self.seed} ".encode() + x.numpy().tobytes()).hexdigest()
        if order in self._orders and not self.repeats:
            self.again += 1
            return
        self._count += 1
        item = (-int(order, 16), -self._count, Picked(order, record.key, x, record.label, record.caption, record.other))
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, item)
        else:
            dropped = heapq.heappushpop(self._heap, item)
            self.beyond += 1
            if dropped is item:
                return
            self._orders.discard(dropped[2].order)
        self._orders.add(order)

    def images(self) -> list[Picked]:
        """The sample, sorted by hash."""
        return [item[2] for item in sorted(self._heap, reverse=True)]


def pixels(
    source: Any, shape: tuple[int, int, int], tally: Tally, required: Collection[str] = ()
) -> Iterator[tuple[Record, torch.Tensor]]:
    """Yields (record, image in [-1, 1] of `shape`) of a source: turned upright, cropped in the centre to the shape, resized.

    required: what a record must have, `label` or `caption`; others are skipped and counted.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    channels, height, width = shape
    last, x = None, None
    for record in source.records(tally):
        if record is not last:  # a repeated record is decoded and counted once
            last, x = record, None
            try:
                _check_complete(record, required, tally)
                image = flat(record.open(), channels, partial(_note, tally, record))
            except Unreadable as error:
                tally.skip(str(error), record.key, location=record.location)
                continue
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            array = np.asarray(fitted, dtype=np.float32).reshape(height, width, channels)
            x = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()
        if x is not None:
            yield record, x


def _check_complete(record: Record, required: Collection[str], tally: Tally) -> None:
    if "caption" in required and record.caption is None:
        raise Unreadable(f"no caption, which the model needs ({tally.hint}; `captioned` gives one to all)")
    if "label" in required and record.label is None:
        raise Unreadable("no label, which the task needs (`label` says where labels are, `labelled` gives one to all)")


def _note(tally: Tally, record: Record, change: str) -> None:
    tally.note(change, record.location or record.key)
