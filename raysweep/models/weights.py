"""Reads a network's folder and compares what its files hold with what the network has.

A library fills what a file lacks with random numbers and warns, so the same folder would be another model at each load. Here a
tensor that is missing, unknown, of another shape or not finite refuses the folder by name. Two things are put right instead, each
with a `ReadOtherwise` warning: names that a wrapper (`torch.compile`, DDP, FSDP, PEFT) has put something before, and a folder
that holds nothing but a variant of the weights, such as half precision.
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

INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # put before any part of a network
BEFORE = ("base_model.model.", "module.")  # put before the whole
ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|hada_w\w+|oft_\w+)\b")
CONSTANTS = ("position_ids",)  # of older releases' files; they follow from the architecture
STEMS = ("diffusion_pytorch_model", "model")
WEIGHTS = re.compile(
    r"(?P<stem>.+?)(\.(?P<one>[\w-]+?))?(-\d{5}-of-\d{5})?(\.(?P<two>[\w-]+))?\.safetensors"
)  # NAME, with a variant before or behind the number of a shard
LFS = b"version https://git-lfs"
SHOWN = 3  # names in a message


class ReadOtherwise(UserWarning):
    """A folder was not read as it stands; the message says what was done."""


def read(kind: Any, folder: Path, **how: Any) -> Any:
    """A network of class `kind` (of diffusers or transformers) from its folder, safetensors only.

    how: more arguments of the library's `from_pretrained`. Raises ValueError, naming the folder, and the tensors where there are
    some to name, unless its configuration is one of `kind` and its files hold the tensors of the network, all and alone.
    """
    config = read_json(folder / "config.json")
    named = config.get("_class_name", kind.__name__)
    if named != kind.__name__:
        raise ValueError(f"{folder / 'config.json'}: describes a {named}, and a {kind.__name__} is needed here")
    files, variant = _files(folder)
    shapes = shapes_of(files)
    wrapped = check_names(folder, shapes)
    with reading(folder):
        if wrapped:
            net, found = _unwrapped(kind, folder, files, how)
        else:
            net, found = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True,
                ignore_mismatched_sizes=True, **_of_library(kind), **how,
            )  # fmt: skip
    other = {name: (tuple(a), tuple(b)) for name, a, b in found.get("mismatched_keys", ())}
    refuse_others(folder, kind.__name__, len(net.state_dict()), found["missing_keys"], found["unexpected_keys"], other)
    check_finite(folder, net)
    if len({p.dtype for p in net.parameters() if p.is_floating_point()}) > 1:
        net = net.float()  # some tensors were stored in half precision, and passes need one type
    if variant is not None:
        tell(f"{folder}: holds the variant {variant!r} of the weights alone, which is read")
    return net


def _of_library(kind: Any) -> dict[str, Any]:
    """Arguments that only diffusers' `from_pretrained` knows."""
    return {"low_cpu_mem_usage": False} if kind.__module__.split(".")[0] != "transformers" else {}


def _unwrapped(kind: Any, folder: Path, files: list[Path], how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network and what did not fit, from files whose names a wrapper has changed."""
    state = {plain_name(n): t for n, t in tensors_of(files).items()}
    if kind.__module__.split(".")[0] == "transformers":
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        return kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    net = kind.from_config(kind.load_config(folder, local_files_only=True))
    return net, fill(net, state)


def fill(net: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Copies the tensors that fit into a network; tells of the others as the libraries do."""
    own = net.state_dict()
    odd = [(n, t.shape, own[n].shape) for n, t in state.items() if n in own and own[n].shape != t.shape]
    fitting = {n: t for n, t in state.items() if n not in {name for name, *_ in odd}}
    left = net.load_state_dict(fitting, strict=False)
    missing = [n for n in left.missing_keys if n not in state]
    return {"missing_keys": missing, "unexpected_keys": left.unexpected_keys, "mismatched_keys": odd}


def _files(folder: Path) -> tuple[list[Path], str | None]:
    """The files of a folder's weights, and the variant that they are (None: the usual one)."""
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
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path}: a link to {path.readlink()}, which is not there")
        try:
            with path.open("rb") as file:
                if file.read(len(LFS)) == LFS:
                    raise ValueError(f"{path}: a pointer of Git LFS, not the weights: run `git lfs pull` in its clone")
            with safe_open(path, "pt") as content:
                found |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read, it is cut short or no safetensors file ({error})") from error
    return found


def tensors_of(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors in files."""
    from safetensors.torch import load_file

    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def check_names(folder: Path, names: Collection[str]) -> bool:
    """Whether names are a wrapper's, which is told; raises ValueError where they are an adapter's, or become ambiguous."""
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
    odd = sorted(n for n in names if plain_name(n) != n)
    tell(
        f"{folder}: the names of its tensors are those of a wrapped model ({odd[0]}) and are read as {plain_name(odd[0])}"
    )
    return True


def plain_name(name: str) -> str:
    """The name of a tensor without what wrappers put before it."""
    for part in INSIDE:
        name = name.replace(part, "")
    while name.startswith(BEFORE):
        name = name.removeprefix(next(b for b in BEFORE if name.startswith(b)))
    return name


def refuse_others(
    folder: Path,
    kind: str,
    count: int,
    missing: Iterable[str],
    unknown: Iterable[str],
    other: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raises ValueError unless all three are empty. other: name -> (shape in the file, shape in the network)."""
    lacking, foreign = sorted(missing), sorted(n for n in unknown if n.split(".")[-1] not in CONSTANTS)
    faults = []
    if lacking:
        faults.append(f"{len(lacking)} of {count} are missing ({_some(lacking)})")
    if foreign:
        faults.append(f"{len(foreign)} are unknown to it ({_some(foreign)})")
    if other:
        name, (held, needed) = min(other.items())
        faults.append(f"{len(other)} have another shape ({name}: {held} in the file, {needed} in the network)")
    if faults:
        raise ValueError(f"{folder}: its tensors are not those of the {kind} that it describes: {'; '.join(faults)}")


def check_finite(folder: Path, net: torch.nn.Module) -> None:
    """Raises ValueError, naming them, if weights are not finite."""
    odd = [n for n, t in net.state_dict().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if odd:
        raise ValueError(f"{folder}: {len(odd)} of its tensors hold numbers that are not finite ({_some(odd)})")


def tell(text: str) -> None:
    """Warns of what was not read as it stands."""
    warnings.warn(text, ReadOtherwise, stacklevel=2)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
