"""Reads a network's folder and compares the tensors of its files with those of the network.

The libraries fill missing tensors with random numbers and only warn, so the same folder would be another model at each load. Here a
folder with a tensor that is missing, unknown, of another shape or not finite is refused, and the tensor named. Two things are
corrected instead, each with a `ReadOtherwise` warning: the prefixes that wrappers (`torch.compile`, DDP, FSDP, PEFT) put before
names, and a folder that holds only a variant of the weights, such as half precision.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raysweep.models.folders import no_pickles, read_json, reading

PREFIXES_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of any part of a network
PREFIXES = ("base_model.model.", "module.")  # of the whole network
ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|hada_w\w+|oft_\w+)\b")
CONSTANTS = ("position_ids",)  # in files of older releases; the architecture determines them
STEMS = ("diffusion_pytorch_model", "model")
WEIGHTS = re.compile(
    r"(?P<stem>.+?)(\.(?P<one>[\w-]+?))?(-\d{5}-of-\d{5})?(\.(?P<two>[\w-]+))?\.safetensors"
)  # NAME, with a variant before or after the number of a shard
LFS = b"version https://git-lfs"
SHOWN = 3  # names in a message


class ReadOtherwise(UserWarning):
    """Something in a folder was corrected when it was read; the message says what."""


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """A network of class `kind` (of diffusers or transformers) from its folder, safetensors only.

    options: further arguments of the library's `from_pretrained`. Raises ValueError, naming the folder and the tensors at fault,
    unless its configuration is one of `kind` and its files hold exactly the tensors of the network.
    """
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name", kind.__name__)
    if class_name != kind.__name__:
        raise ValueError(f"{folder / 'config.json'}: describes a {class_name}, and a {kind.__name__} is needed here")
    files, variant = weight_files(folder)
    shapes = shapes_of(files)
    wrapped = check_names(folder, shapes)
    with reading(folder):
        if wrapped:
            net, report = _read_unwrapped(kind, folder, files, options)
        else:
            net, report = kind.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                variant=variant,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_library_options(kind),
                **options,
            )
    reshaped = {name: (tuple(a), tuple(b)) for name, a, b in report.get("mismatched_keys", ())}
    check_tensors(
        folder, kind.__name__, len(net.state_dict()), report["missing_keys"], report["unexpected_keys"], reshaped
    )
    check_finite(folder, net)
    if len({p.dtype for p in net.parameters() if p.is_floating_point()}) > 1:
        net = net.float()  # some tensors are stored in half precision, and a forward pass needs one type
    if variant is not None:
        warn(f"{folder}: holds the variant {variant!r} of the weights alone, which is read")
    return net


def _library_options(kind: Any) -> dict[str, Any]:
    """Arguments that only diffusers' `from_pretrained` knows."""
    return {"low_cpu_mem_usage": False} if kind.__module__.split(".")[0] != "transformers" else {}


def _read_unwrapped(kind: Any, folder: Path, files: list[Path], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network and the report of tensors that did not fit, from files whose names have a wrapper's prefixes."""
    state = {plain_name(n): t for n, t in tensors_of(files).items()}
    if kind.__module__.split(".")[0] == "transformers":
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        return kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    net = kind.from_config(kind.load_config(folder, local_files_only=True))
    return net, fill(net, state)


def fill(net: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Copies the tensors that fit into a network; reports the others as the libraries do."""
    current = net.state_dict()
    reshaped = [
        (n, t.shape, current[n].shape) for n, t in state.items() if n in current and current[n].shape != t.shape
    ]
    fitting = {n: t for n, t in state.items() if n not in {name for name, *_ in reshaped}}
    keys = net.load_state_dict(fitting, strict=False)
    missing = [n for n in keys.missing_keys if n not in state]
    return {"missing_keys": missing, "unexpected_keys": keys.unexpected_keys, "mismatched_keys": reshaped}


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The files of a folder's weights, and their variant (None: the usual one)."""
    no_pickles(folder)
    groups: dict[str | None, list[Path]] = {}
    others = []
    for path in sorted(folder.glob("*.safetensors")):
        match = WEIGHTS.fullmatch(path.name)
        if match is None or match["stem"] not in STEMS:
            others.append(path.name)
        else:
            groups.setdefault(match["one"] or match["two"], []).append(path)
    if not groups:
        reason = "that is an adapter: merge it into its base first" if any(map(_is_adapter, others)) else "rename it"
        raise ValueError(
            f"{folder}: weights are missing: they must be called {' or '.join(f'{s}.safetensors' for s in STEMS)}; found "
            f"{', '.join(others)} ({reason})"
        )
    if None in groups:
        return groups[None], None
    if len(groups) > 1:
        raise ValueError(
            f"{folder}: holds the variants {', '.join(sorted(map(str, groups)))} of the weights, and not the weights themselves: "
            "take the variant's name out of the file names of the one that you mean"
        )
    ((variant, files),) = groups.items()
    return files, variant


def _is_adapter(name: str) -> bool:
    return "lora" in name.lower() or "adapter" in name.lower()


def shapes_of(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in files, from their headers alone; raises ValueError, naming the file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: a link to {path.readlink()}, which is not there")
        try:
            with path.open("rb") as file:
                if file.read(len(LFS)) == LFS:
                    raise ValueError(f"{path}: a pointer of Git LFS, not the weights: run `git lfs pull` in its clone")
            with safe_open(path, "pt") as content:
                shapes |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read, it is cut short or no safetensors file ({error})") from error
    return shapes


def tensors_of(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors in files."""
    from safetensors.torch import load_file

    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def check_names(folder: Path, names: Collection[str]) -> bool:
    """Whether names have a wrapper's prefixes, with a warning; raises ValueError for an adapter's names and for ambiguous ones."""
    adapters = sorted(n for n in names if ADAPTER.search(f".{n}"))
    if adapters:
        raise ValueError(
            f"{folder}: holds the tensors of an adapter ({_some(adapters)}): merge it into the weights (PEFT: merge_and_unload(); "
            "diffusers: fuse_lora(), then unload_lora_weights()) and save the model again"
        )
    plain = {plain_name(n) for n in names}
    if plain == set(names):
        return False
    if len(plain) < len(names):
        raise ValueError(f"{folder}: holds some tensors twice, with and without what a wrapper puts before their names")
    first = min(n for n in names if plain_name(n) != n)
    warn(
        f"{folder}: the names of its tensors are those of a wrapped model ({first}) and are read as {plain_name(first)}"
    )
    return True


def plain_name(name: str) -> str:
    """The name of a tensor without the prefixes of wrappers."""
    for prefix in PREFIXES_ANYWHERE:
        name = name.replace(prefix, "")
    while name.startswith(PREFIXES):
        name = name.removeprefix(next(p for p in PREFIXES if name.startswith(p)))
    return name


def check_tensors(
    folder: Path,
    kind: str,
    count: int,
    missing: Iterable[str],
    unknown: Iterable[str],
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raises ValueError unless nothing is missing, unknown or reshaped (name -> shape in the file, shape in the network).

    count: tensors of the network, which is of class `kind`.
    """
    missing, unknown = sorted(missing), sorted(n for n in unknown if n.split(".")[-1] not in CONSTANTS)
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {count} are missing ({_some(missing)})")
    if unknown:
        faults.append(f"{len(unknown)} are unknown to it ({_some(unknown)})")
    if reshaped:
        name, (stored, needed) = min(reshaped.items())
        faults.append(f"{len(reshaped)} have another shape ({name}: {stored} in the file, {needed} in the network)")
    if faults:
        raise ValueError(f"{folder}: its tensors are not those of the {kind} that it describes: {'; '.join(faults)}")


def check_finite(folder: Path, net: torch.nn.Module) -> None:
    """Raises ValueError, naming them, if weights are not finite."""
    bad = [n for n, t in net.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"{folder}: {len(bad)} of its tensors hold numbers that are not finite ({_some(bad)})")


def warn(text: str) -> None:
    """Warns of a correction with `ReadOtherwise`."""
    warnings.warn(text, ReadOtherwise, stacklevel=2)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
