"""A candidate as the tensors that differ from its base, in one safetensors file; applied and reverted bit for bit.

The file holds each changed tensor before and after, and in its header the hashes of base and candidate, so it applies only to
the model that it was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raysweep.config.schema import ConfigError
from raysweep.models import families, samplers
from raysweep.storage.files import StoreError, write_bytes, write_folder

KIND = "raysweep delta 1"


def write(path: Path, base: Path, candidate: Path) -> dict[str, Any]:
    """Writes the delta between two model folders; returns its header with the number of tensors and of bytes.

    Raises ConfigError if the two differ in their architecture.
    """
    from safetensors.torch import save

    start, end = families.load(base), families.load(candidate)
    before, after = start.net.state_dict(), end.net.state_dict()
    if {n: t.shape for n, t in before.items()} != {n: t.shape for n, t in after.items()}:
        raise ConfigError(f"{candidate}: has another architecture than {base}")
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    tensors = {
        f"{when}/{n}": state[n].contiguous() for n in changed for when, state in (("before", before), ("after", after))
    }
    header = {
        "kind": KIND,
        "base": start.digest,
        "candidate": end.digest,
        "sampler": json.dumps(samplers.plain_data(end)),
    }
    write_bytes(path, save(tensors, header))
    return header | {"tensors": len(changed), "bytes": path.stat().st_size}


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(header, tensors) of a delta; raises ConfigError if the file is not a delta."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error
    if header.get("kind") != KIND:
        raise ConfigError(f"{path}: not a delta that `raysweep export --delta` wrote")
    return header, tensors


def apply(path: Path, model: Path, out: Path, revert: bool = False) -> str:
    """Writes the model with the delta applied, or reverted; returns the hash of the result.

    Raises ConfigError if the model is not the one that the delta starts from, StoreError if the result has another hash than the
    delta's end.
    """
    header, tensors = read(path)
    start, end = ("candidate", "base") if revert else ("base", "candidate")
    handle = families.load(model)
    if handle.digest != header[start]:
        raise ConfigError(
            f"{model}: its weights have the hash {handle.digest}, but the delta goes from {header[start]} to {header[end]}"
        )
    state, when = handle.net.state_dict(), "before" if revert else "after"
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(f"{when}/"):
                state[name.removeprefix(f"{when}/")].copy_(tensor)
    sampler = None if revert else json.loads(header["sampler"])
    handle.sampler = handle.default_sampler if sampler is None else samplers.parse(sampler, handle, str(path))
    digest: str = handle.digest
    if digest != header[end]:
        raise StoreError(f"{path}: the result has the hash {digest} instead of {header[end]}; nothing was written")
    write_folder(out, handle.save)
    return digest
