"""The cache folder, and the safetensors files in which prepared tensors, latents and references are kept.

Artifacts are content-addressed: a key hashes everything that the artifact is computed from, source code included
(`raysweep.storage.code_digests`), so a stale one is never read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.storage.files import StoreError, write_bytes
from raysweep.storage.places import absolute

if TYPE_CHECKING:
    import torch


def cache_folder(configured: Path | None) -> Path:
    """The folder of artifacts that outlive a run: the configured one, else RAYSWEEP_CACHE, else ~/.cache/raysweep."""
    return absolute(configured or os.environ.get("RAYSWEEP_CACHE") or Path("~") / ".cache" / "raysweep")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors atomically in safetensors format."""
    from safetensors.torch import save

    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; raises StoreError if it is missing, truncated or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path}: not a readable safetensors file ({error})") from error
