"""Seeded mutations of user input: nested settings, text, bytes, folders. The same seed gives the same mutation."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ANSWER_S = 120
MEMORY = 12 << 30  # bytes of address space
# values that a field may hold by mistake: none, another type, extremes, numbers or switches as text, odd text
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 10**30, 0.0, -0.5, 0.37, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"),
    "", " ", "0", "1e-5", "1e400", "yes", "null", ".", "..", "~", "/", "/nowhere/at/all", "~nobody/x", "s3://bucket/key",
    "a\nb", "\0", "\u2028", "\ufeffx", "\U0001f600", "é" * 300, "a" * 5000, "{made}", "%s", "${HOME}", "$x$", "[", "<b>&",
    [], [[]], [None], ["a", 1], [1, 2, 3], [float("nan")], {}, {"": 1}, {"a": {"b": None}}, {"log": [0, 1]}, {"choice": []},
    {"uniform": [1, 0]}, {"log": ["1e-5", "1e-3"]}, {"choice": [[1], {"a": 1}]}, {"int": [0.5, 2]},
)  # fmt: skip


def seeds(count: int, shard: int, shards: int) -> list[int]:
    """The seeds of one of several shards, or those asked for by FUZZ_SEEDS (in the first shard)."""
    asked = os.environ.get("FUZZ_SEEDS")
    if asked:
        return [int(s) for s in asked.split(",")] if shard == 0 else []
    return list(range(shard, count, shards))


def wrong_of(error: BaseException) -> str:
    """An exception that no user should see, and the last frames of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    frames_shown = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:200]} ({frames_shown})"


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer than `ANSWER_S`: it counts as hung."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"no answer within {ANSWER_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(ANSWER_S)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A block that allocates more than `MEMORY` raises MemoryError, before the system kills this or another process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(failures: dict[int, str], answers: list[int]) -> None:
    """Fails if the answer of a seed was wrong, or if no mutation was refused, which would mean that nothing was tested."""
    assert not failures, "\n".join(f"seed {seed}: {wrong}" for seed, wrong in failures.items())
    if len(answers) > 20:
        assert 2 in answers


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below the root of a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def misspell(text: str, rng: np.random.Generator) -> str:
    """A letter left out, doubled or exchanged."""
    if not text:
        return "x"
    i = int(rng.integers(len(text)))
    return (text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:], text[:i] + "q" + text[i + 1 :])[rng.integers(3)]


def mutated_tree(tree: Any, rng: np.random.Generator, times: int = 1) -> Any:
    """A copy of a tree in which up to `times` values are replaced, removed, renamed, moved, doubled or made another type."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, times + 1))):
        every = list(places(tree))
        if not every:
            return tree
        *parents, last = every[rng.integers(len(every))]
        parent = at(tree, tuple(parents))
        value = parent[last]
        action = rng.integers(7)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[misspell(str(last), rng)] = parent.pop(last)
        elif action == 2:
            parent[last] = copy.deepcopy(at(tree, every[rng.integers(len(every))]))
        elif action == 3:
            parent[last] = [value] if rng.integers(2) else {str(last): value}
        elif action == 4 and isinstance(value, int | float) and not isinstance(value, bool):
            parent[last] = (-value, value * 1000, value / 1000, str(value), value + 0.5)[rng.integers(5)]
        elif action == 4 and isinstance(value, str):
            parent[last] = misspell(value, rng)
        elif action == 4 and isinstance(value, list):
            parent[last] = value * 2 if rng.integers(2) else value[::-1]
        else:
            parent[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    return tree


def mutated_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with some changed, cut out, put in or cut off, or with another encoding's marks."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        i = int(rng.integers(len(data) + 1))
        action = rng.integers(8)
        if action == 0:
            del data[i:]
        elif action == 1:
            del data[i : i + int(rng.integers(1, 20))]
        elif action == 2:
            data[i:i] = rng.bytes(int(rng.integers(1, 20)))
        elif action == 3:
            data[:0] = (b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r\n")[rng.integers(4)]
        elif action == 4:
            data[i:i] = (
                b"\t",
                b"\xe9",
                b"\xe2\x80\xa8",
                b"\r",
                b'"',
                b"'",
                b": ",
                b"- ",
                b"\n",
                b"{",
                b"&a ",
                b"*a",
                b"!!",
            )[rng.integers(13)]
        elif action == 5 and data:
            data[min(i, len(data) - 1)] ^= 1 << int(rng.integers(8))
        elif action == 6:
            data += data[: int(rng.integers(len(data) + 1))]
        elif data:
            j = int(rng.integers(len(data)))
            data[i : i + 16] = data[j : j + 16]
    return bytes(data)


def mutated_tensors(tensors: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Tensors of a file with one missing, added, renamed, of another shape or type, or not finite; or all renamed."""
    import torch

    tensors = dict(tensors)
    names = sorted(tensors)
    name = names[rng.integers(len(names))]
    action = rng.integers(9)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[f"{name}.more"] = torch.zeros(2)
    elif action == 2:
        tensors[misspell(name, rng)] = tensors.pop(name)
    elif action == 3:
        prefix = ("_orig_mod.", "module.", "base_model.model.", "model.", "unet.")[rng.integers(5)]
        tensors = {prefix + n: t for n, t in tensors.items()}
    elif action == 4:
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    elif action == 5:
        kind = (torch.float16, torch.bfloat16, torch.float64, torch.int8)[rng.integers(4)]
        tensors[name] = tensors[name].to(kind)
    elif action == 6:
        bad = tensors[name].clone().float()
        bad.view(-1)[:1] = (float("nan"), float("inf"))[rng.integers(2)]
        tensors[name] = bad
    elif action == 7:
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    else:
        del tensors[name], names
        tensors = dict(list(tensors.items())[: len(tensors) // 2])
    return tensors


def mutate_folder(folder: Path, rng: np.random.Generator, removing: bool = True) -> str:
    """Changes one file of a folder, in a way that suits its format; returns a description.

    removing: files and folders may also be removed.
    """
    from safetensors.torch import load_file, save_file

    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = files[rng.integers(len(files))]
    action = rng.integers(0 if removing else 1, 16)
    if action == 0:
        file.unlink()
    elif action == 1:
        file.rename(file.with_name(misspell(file.name, rng)))
    elif action == 2:
        file.write_bytes(b"")
    elif action == 3:
        other = files[rng.integers(len(files))]
        file.write_bytes(other.read_bytes())
    elif action == 4 and removing:
        file.unlink()
        file.mkdir()
    elif action == 5 and removing and file.parent != folder:
        shutil.rmtree(file.parent)
    elif file.suffix == ".safetensors" and rng.integers(4):
        save_file(mutated_tensors(load_file(file), rng), file)
    elif file.suffix == ".json" and rng.integers(4):
        file.write_text(json.dumps(mutated_tree(json.loads(file.read_text()), rng, 2)))
    else:
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))
    return f"{action} {file.relative_to(folder)}"
