"""A small cache by key, for long-lived processes whose memory must not grow."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps the `most` entries that were used last."""

    def __init__(self, most: int):
        self.most = most
        self.entries: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry of `key`, made on first use. The oldest entry is dropped before: there may be no memory for both."""
        if key not in self.entries:
            while len(self.entries) >= self.most:
                self.entries.popitem(last=False)
                gc.collect()  # models contain reference cycles, and hold device memory until they are collected
            self.entries[key] = make()
        self.entries.move_to_end(key)
        return self.entries[key]
