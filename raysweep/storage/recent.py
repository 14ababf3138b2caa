"""A few things kept by key, so that what a long-lived process keeps between two pieces of work cannot grow without end."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The `most` entries that were asked for last."""

    def __init__(self, most: int):
        self.most = most
        self.entries: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry of `key`, made if it is not there. The oldest goes before a new one is made: both may not fit."""
        if key not in self.entries:
            while len(self.entries) >= self.most:
                self.entries.popitem(last=False)
                gc.collect()  # models refer to themselves in circles, and hold a device's memory until they are found
            self.entries[key] = make()
        self.entries.move_to_end(key)
        return self.entries[key]
