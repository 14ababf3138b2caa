"""Hands over a candidate as what differs from its base, with the values of both: applied and taken back bit for bit.

The hashes in the file's header say which model it applies to, and what it gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysweep.config.schema import ConfigError
from raysweep.models import delta, families
from raysweep.storage.files import StoreError, write_bytes, write_folder


def write(path: Path, base: Path, candidate: Path) -> dict[str, Any]:
    """Writes the delta between two model folders; returns its header with the number of tensors and of bytes.

    Raises ConfigError if a folder cannot be read, or if the two differ in more than tensors and sampler.
    """
    from safetensors.torch import save

    try:
        start, end = families.load(base), families.load(candidate)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        header, tensors = delta.between(start, end, start.digest, end.digest, revertible=True)
    except ValueError as error:
        raise ConfigError(f"{candidate}: cannot be a delta over {base}: {error}") from error
    write_bytes(path, save(tensors, header))
    return header | {"tensors": len(tensors) // 2, "bytes": path.stat().st_size}


def apply(path: Path, model: Path, out: Path, revert: bool = False) -> str:
    """Writes the model with the delta applied, or taken back; returns the hash of the result.

    Raises ConfigError if the model is not the one that the delta starts from, StoreError if the result has another hash than the
    delta's end.
    """
    try:
        header, tensors = delta.read(path)
        handle = families.load(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    start, end = ("candidate", "base") if revert else ("base", "candidate")
    if handle.digest != header[start]:
        raise ConfigError(
            f"{model}: its weights have the hash {handle.digest}, but the delta goes from {header[start]} to {header[end]}"
        )
    try:
        digest = delta.apply(handle, header, tensors, str(path), revert)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if digest != header[end]:
        raise StoreError(f"{path}: the result has the hash {digest} instead of {header[end]}; nothing was written")
    write_folder(out, handle.save)
    return digest
