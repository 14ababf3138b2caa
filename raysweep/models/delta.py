"""A model as the tensors in which it differs from a base, in one safetensors file: base and file together give it bit for bit.

The file's header has the hashes of base and model and the model's sampler, so what it gives is checked as a whole. A delta with the
values of both can be taken back; without those of the base it is half as large.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raysweep.models import samplers

KIND = "raysweep delta 1"
BEFORE, AFTER = "before/", "after/"  # before the names of tensors


def changed(base: Any, model: Any) -> list[str]:
    """The names of the tensors whose bytes differ, one of those that are tied; raises ValueError if a delta cannot hold the
    difference between two models."""
    before, after = base.net.state_dict(), model.net.state_dict()
    if {n: (t.shape, t.dtype) for n, t in before.items()} != {n: (t.shape, t.dtype) for n, t in after.items()}:
        raise ValueError("it has another architecture")
    one, other = base.settings, model.settings
    differing = sorted(k for k in {*one, *other} - {"sampler"} if one.get(k) != other.get(k))
    if differing:
        raise ValueError(f"it differs in its settings: {', '.join(differing)}")
    distinct: dict[tuple[int, int], str] = {}  # tensors that share their memory (tied weights) are one
    for name, tensor in before.items():
        distinct.setdefault((tensor.data_ptr(), after[name].data_ptr()), name)
    return [name for name in distinct.values() if not torch.equal(_bytes(before[name]), _bytes(after[name]))]


def between(
    base: Any, model: Any, base_digest: str, digest: str, revertible: bool = False
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(header, tensors) of the delta from a base to a model, whose hashes are given; raises ValueError as `changed`.

    revertible: include the base's values.
    """
    names = changed(base, model)
    parts = ((BEFORE, base), (AFTER, model)) if revertible else ((AFTER, model),)
    tensors = {f"{when}{n}": _copy(state[n]) for when, m in parts for state in (m.net.state_dict(),) for n in names}
    header = {"kind": KIND, "base": base_digest, "candidate": digest, "sampler": json.dumps(samplers.plain_data(model))}
    return header, tensors


def header_of(path: Path) -> dict[str, str]:
    """The header of a delta, without its tensors; raises ValueError as `read`."""
    return _read(path, tensors=False)[0]


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(header, tensors) of a delta; raises ValueError if the file is not a delta."""
    return _read(path, tensors=True)


def _read(path: Path, tensors: bool) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, list(file.keys()) if tensors else []
            content = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if header.get("kind") != KIND:
        raise ValueError(f"{path}: not a delta that raysweep wrote")
    return header, content


def apply(
    model: Any, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor], source: str, revert: bool = False
) -> str:
    """Turns a base in place into the model of a delta, or back, and returns its hash, for comparison with the header's.

    source: names the delta in messages. Raises ValueError if the delta does not fit the model, or has no values to take it back.
    """
    when = BEFORE if revert else AFTER
    values = {n.removeprefix(when): t for n, t in tensors.items() if n.startswith(when)}
    if revert and tensors and not values:
        raise ValueError(f"{source}: holds no values of the base, so it cannot be taken back")
    state = model.net.state_dict()
    foreign = [n for n, t in values.items() if n not in state or (t.shape, t.dtype) != (state[n].shape, state[n].dtype)]
    if foreign:
        raise ValueError(
            f"{source}: does not fit this model, which has no tensor {min(foreign)} of this shape and type"
        )
    with torch.no_grad():
        for name, tensor in values.items():
            state[name].copy_(tensor)
    sampler = None if revert else json.loads(header["sampler"])
    model.sampler = model.default_sampler if sampler is None else samplers.parse(sampler, model, source)
    digest: str = model.digest
    return digest


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: as numbers, 0 and -0 would be equal, and not-a-number different from itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares memory with no other, as the file format asks for."""
    return tensor.detach().to("cpu", copy=True).contiguous()
