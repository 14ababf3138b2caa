"""Reads pickles of plain data and arrays, and refuses anything that could run code before it is loaded."""

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
    ("_codecs", "encode"),  # how older protocols write the bytes of arrays
}


class Unsafe(ValueError):
    """A pickle refers to something other than data; the message says to what."""


class Restricted(pickle.Unpickler):
    """Unpickles builtin containers and NumPy arrays.

    also: gives the class to use for another (module, name), or None to refuse it; options: those of pickle.Unpickler.
    """

    def __init__(self, file: Any, also: Callable[[str, str], Any] = lambda module, name: None, **options: Any):
        super().__init__(file, **options)
        self.also = also

    def find_class(self, module: str, name: str) -> Any:
        allowed = self.also(module, name)
        if allowed is not None:
            return allowed
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        raise Unsafe(f"it names {module}.{name}, which could run code")


def check(path: Path) -> None:
    """Raises Unsafe, with the file's name, unless it is a pickle of plain data and arrays."""
    try:
        with path.open("rb") as file:
            Restricted(file, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise IndexError, TypeError, MemoryError, ...
        raise Unsafe(f"{path}: not a pickle of plain data: {str(error) or type(error).__name__}") from error
