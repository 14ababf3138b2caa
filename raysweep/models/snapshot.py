"""Reads the published EDM snapshots, and those that the released training code writes: only tensors, never code.

Such a file is a pickle of objects, each with the source of its class and its state. None of these classes is ever created: a
state is read into an inert record, and any name other than those below is refused before it is looked up. The tensors are renamed
to those of `SongUNet`; all of them must be present, fit, and be used.

Released code: https://github.com/NVlabs/edm (what its files hold; none of it is needed, or imported).
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysweep.models.edm import EDM
from raysweep.models.song import FILTER, SongUNet
from raysweep.storage.unpickle import Restricted, Unsafe

NETWORK = "ema"  # the moving average, the only network in a snapshot
SCALARS = {("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}
PRECONDITIONING = "EDMPrecond"


class Record:
    """The state of a pickled object, without behaviour. kind: the name of its class."""

    kind: str
    state: dict[str, Any]

    def __new__(cls, *args: Any) -> Record:  # pickles may create objects without `__init__`
        record, meta = super().__new__(cls), args[0] if args and isinstance(args[0], dict) else {}
        record.kind, record.state = str(meta.get("class_name", "")), dict(meta.get("state") or {})
        return record

    def __setstate__(self, state: Any) -> None:
        self.state.update(state if isinstance(state, dict) else {})

    def get(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        """Its parameters and buffers and those of all its modules, by their names in a state dict."""
        for holder in ("_parameters", "_buffers"):
            for name, tensor in (self.get(holder) or {}).items():
                if isinstance(tensor, torch.Tensor):
                    yield prefix + name, tensor
        for name, part in (self.get("_modules") or {}).items():
            if isinstance(part, Record):
                yield from part.tensors(f"{prefix}{name}.")


class Settings(dict[str, Any]):
    """A plain dictionary in place of the released code's, whose keys are attributes."""


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _parameter(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor


def _allowed(module: str, name: str) -> Any:
    """The object for a name in the pickle; None: refused, no snapshot has this name."""
    known: dict[tuple[str, str], Any] = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
        ("dnnlib.util", "EasyDict"): Settings,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "device"): torch.device,
        ("torch", "Size"): torch.Size,
    }
    if module.startswith("torch.nn.modules."):
        return Record
    if (module, name) in SCALARS:
        return np.float64(0).__reduce__()[0]  # in whichever module this version of numpy has it
    dtype = getattr(torch, name, None) if module == "torch" else None
    return dtype if isinstance(dtype, torch.dtype) else known.get((module, name))


def read(path: Path) -> EDM:
    """The model in a snapshot, in single precision.

    Raises ValueError if the file is not a snapshot, is of another network, or names anything that could run code.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = Restricted(file, _allowed).load()
    except Unsafe as error:
        raise ValueError(f"{path}: refused: {error}") from error
    except Exception as error:  # bytes that are no pickle raise errors of many classes
        raise ValueError(f"{path}: not a snapshot of EDM ({type(error).__name__}: {error})") from error
    snapshot = content if isinstance(content, dict) else {}
    network = snapshot.get(NETWORK)
    if not isinstance(network, Record):
        raise ValueError(f"{path}: not a snapshot of EDM: it holds no network under {NETWORK}")
    try:
        return _model(network, snapshot.get("loss_fn"))
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _model(outer: Record, loss: Any) -> EDM:
    if outer.kind != PRECONDITIONING:
        raise ValueError(f"its network is under {outer.kind or 'no preconditioning'}; read is {PRECONDITIONING}")
    inner = (outer.get("_modules") or {}).get("model")
    if not isinstance(inner, Record) or inner.kind != "SongUNet":
        kind = inner.kind if isinstance(inner, Record) else "missing"
        raise ValueError(f"its network is {kind}; read are the SongUNets (DDPM++ and NCSN++)")
    tensors = dict(inner.tensors())
    net = SongUNet(**_config(outer, tensors))
    _fill(net, tensors)
    levels = {"sigma_data": float(outer.state["sigma_data"])}
    training = {}
    if isinstance(loss, Record) and {"P_mean", "P_std"} <= loss.state.keys():
        training = {"p_mean": float(loss.state["P_mean"]), "p_std": float(loss.state["P_std"])}
    dropped = float(inner.get("label_dropout") or 0)
    null = net.config.num_class_embeds if net.config.num_class_embeds and dropped else None
    return EDM(net.eval(), levels, training, null)


def _config(outer: Record, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of `SongUNet`, from the names and shapes of the tensors."""
    if any(part in name for name in tensors for part in ("_aux_down", "_aux_skip", "_aux_up")):
        raise ValueError("its encoder or decoder is of the type 'skip'; read are DDPM++ and NCSN++")
    size = int(outer.state["img_resolution"])
    filters = {tuple(t.shape[2:]): t for n, t in tensors.items() if n.endswith("resample_filter")}
    line = torch.tensor(FILTER).float()
    known = {(2, 2): torch.full((2, 2), 0.25), (4, 4): line.outer(line) / line.sum() ** 2}
    if (
        any(k not in known or not torch.allclose(t[0, 0].float(), known[k]) for k, t in filters.items())
        or len(filters) > 1
    ):
        raise ValueError(f"its resample_filter is neither [1, 1] nor {list(FILTER)}")
    first = tensors[f"enc.{size}x{size}_conv.weight"]
    width, noise = tensors["map_layer0.weight"].shape
    channels = int(first.shape[0])
    blocks = {int(m[1]) for n in tensors if (m := re.match(rf"enc\.{size}x{size}_block(\d+)\.", n))}
    sizes = sorted({int(m[1]) for n in tensors if (m := re.match(r"enc\.(\d+)x", n))}, reverse=True)
    last = f"{len(blocks) - 1}.conv1.weight"
    return {
        "sample_size": size,
        "in_channels": int(first.shape[1]),
        "out_channels": int(tensors[f"dec.{size}x{size}_aux_conv.weight"].shape[0]),
        "num_class_embeds": int(tensors["map_label.weight"].shape[1]) if "map_label.weight" in tensors else None,
        "model_channels": channels,
        "channel_mult": tuple(int(tensors[f"enc.{s}x{s}_block{last}"].shape[0]) // channels for s in sizes),
        "emb_width": int(width) // channels,
        "num_blocks": len(blocks),
        "attn_resolutions": tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in tensors),
        "embedding": "fourier" if "map_noise.freqs" in tensors else "positional",
        "noise_width": int(noise) // channels,
        "encoder": "residual" if any("_aux_residual" in n for n in tensors) else "standard",
        "fir": (4, 4) in filters,
    }


PARTS = {
    "norm0": "resnet.norm1", "conv0": "resnet.conv1", "affine": "resnet.time_emb_proj", "norm1": "resnet.norm2",
    "conv1": "resnet.conv2", "skip": "resnet.conv_shortcut", "norm2": "attention.group_norm", "proj": "attention.to_out.0",
}  # fmt: skip
WHOLE = {
    "map_noise.freqs": "time_proj.weight", "map_label": "class_embedding", "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
}  # fmt: skip
LEFT_OUT = (
    "resample_filter",
    "map_augment.weight",
)  # constants of the architecture, and weights that only training uses


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a `SongUNet` from that of a published one. Raises ValueError at a name that it does not know."""
    state, layers = dict[str, torch.Tensor](), _layers(tensors)
    for name, tensor in tensors.items():
        if name.endswith(LEFT_OUT):
            continue
        for old, new in WHOLE.items():
            if name == old or name.startswith(f"{old}."):
                state[new + name.removeprefix(old)] = tensor
                break
        else:
            side, layer, *rest = name.split(".")
            if side not in ("enc", "dec") or layer not in layers[side]:
                raise ValueError(f"its tensor {name} is not of a SongUNet")
            state |= _part(layers[side][layer], rest, tensor)
    return state


def _layers(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """The module of a `SongUNet` for each layer of encoder and decoder. tensors: in the order of the network."""
    modules: dict[str, dict[str, str]] = {"enc": {}, "dec": {}}
    counts = dict.fromkeys(("down_blocks", "mid_blocks", "up_blocks", "residuals"), 0)
    for name in tensors:
        side, layer = (*name.split("."), "")[:2]
        if side not in modules or layer in modules[side]:
            continue
        ends = {"_conv": "conv_in", "_aux_norm": "conv_norm_out", "_aux_conv": "conv_out"}
        module = next((ends[e] for e in ("_aux_norm", "_aux_conv", "_conv") if layer.endswith(e)), None)
        if module is None:
            group = "residuals" if layer.endswith("_aux_residual") else "down_blocks" if side == "enc" else "up_blocks"
            group = "mid_blocks" if layer.endswith(("_in0", "_in1")) else group
            module = f"{group}.{counts[group]}" + (".Conv2d_0" if group == "residuals" else "")
            counts[group] += 1
        modules[side][layer] = module
    return modules


def _part(module: str, rest: list[str], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of a layer under its new name, or three: snapshots interleave query, key and value channel by channel."""
    *inner, kind = rest
    if not inner:
        return {f"{module}.{kind}": tensor}
    part = ".".join(inner)
    if part == "qkv":
        three = tensor.reshape(-1, 3, *tensor.shape[1:2]).unbind(1)
        return {f"{module}.attention.to_{n}.{kind}": t.contiguous() for n, t in zip("qkv", three, strict=True)}
    if part not in PARTS:
        raise ValueError(f"its tensor {'.'.join(rest)} is not of a block of a SongUNet")
    flat = tensor.flatten(1) if part == "proj" and kind == "weight" else tensor
    return {f"{module}.{PARTS[part]}.{kind}": flat}


def _fill(net: SongUNet, tensors: dict[str, torch.Tensor]) -> None:
    state, needed = renamed(tensors), net.state_dict()
    missing, unknown = sorted(needed.keys() - state.keys()), sorted(state.keys() - needed.keys())
    if missing or unknown:
        raise ValueError(
            f"its tensors are not those of its architecture: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    for name, tensor in state.items():
        if tensor.shape != needed[name].shape:
            raise ValueError(
                f"its tensor for {name} is {tuple(tensor.shape)}, and {tuple(needed[name].shape)} is needed"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"its tensor for {name} is not finite")
    net.load_state_dict({n: t.float() for n, t in state.items()})
