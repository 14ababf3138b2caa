"""Reads pickles that hold plain data and arrays alone; anything that could run code is refused before it can."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # bytes of arrays, as older protocols write them
}


class Unsafe(ValueError):
    """A pickle names something else than data; the message says what."""


class Restricted(pickle.Unpickler):
    """Unpickles builtin containers and NumPy arrays; `also` gives more classes, by (module, name), or None."""

    def __init__(self, file: Any, also: Callable[[str, str], Any] = lambda module, name: None, **how: Any):
        super().__init__(file, **how)
        self.also = also

    def find_class(self, module: str, name: str) -> Any:
        found = self.also(module, name)
        if found is not None:
            return found
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        raise Unsafe(f"it names {module}.{name}, which could run code")


def check(path: Path) -> None:
    """Raises Unsafe, naming the file, unless it is a pickle of plain data and arrays."""
    try:
        with path.open("rb") as file:
            Restricted(file, encoding="latin1").load()
    except Exception as error:  # damaged opcodes raise IndexError, TypeError, MemoryError, ...
        raise Unsafe(f"{path}: not a pickle of plain data: {str(error) or type(error).__name__}") from error
