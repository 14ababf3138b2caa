"""Atomic writes of files and folders, and content hashes.

Every file is written under a temporary name in its own folder, flushed to disk and renamed: a reader sees either nothing
or all of it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import random
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

TEMPORARY = ".*.tmp"  # names of files and folders that are being written
CHECKPOINT = ".*.partial.pt"  # names of the checkpoints of unfinished training
DAY_S = 24 * 3600.0
RENAMES = 20  # attempts to move a folder to its final name
APART_S = (
    0.01  # longest wait before the second attempt, by which writers at once come apart; more before each further one
)
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # why a folder cannot take the name of what is there


class StoreError(RuntimeError):
    """A file could not be written or read; the message names it and the cause."""


def temporary_path(path: Path) -> Path:
    """A name beside `path` for an unfinished write, matched by `TEMPORARY`.

    Random, because process ids repeat across the hosts and containers that share a storage.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")


def checkpoint_path(path: Path) -> Path:
    """Path of the last checkpoint of unfinished training whose result will be saved at `path`."""
    return path.with_name(f".{path.name}.partial.pt")


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically and durably; `fill` writes its content into the open file.

    If the system refuses, raises StoreError and leaves the old file as it was.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes to a file, as `write_file` does."""
    write_file(path, lambda file: file.write(data))


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON, atomically."""
    write_bytes(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def write_folder(path: Path, fill: Callable[[Path], None], stands: Callable[[Path], bool] = lambda _: False) -> None:
    """Writes a folder atomically: `fill` writes into a temporary folder, which is then renamed to `path`.

    stands: whether a folder is a finished result of the same work, which then stays, even if it appears while this one is written:
    of several writers of it, on one host or many, the first to finish wins. Any other folder is replaced, so without `stands` the
    last to finish wins. Leftovers of killed writers are removed after a day.
    """
    temporary = temporary_path(path)
    _clear(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"), DAY_S)
    try:
        if stands(path):
            return
        temporary.mkdir(parents=True)
        fill(temporary)
        _share(temporary)
        _move_into_place(temporary, path, stands)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Lets those read a folder's files who may read the folder: libraries write some for their owner alone."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _move_into_place(new: Path, path: Path, stands: Callable[[Path], bool]) -> None:
    """Renames a folder to `path`, unless a folder that `stands` is there.

    The rename itself finds out whether one is there: what this host remembers of a shared storage may be out of date. Another
    folder is renamed out of the way first, so that no reader sees it half deleted, and put back if it has become one that stands.
    """
    for attempt in range(RENAMES):
        time.sleep(random.uniform(0, APART_S * attempt))
        try:
            os.replace(new, path)
            return
        except OSError as error:
            if error.errno not in OCCUPIED or attempt == RENAMES - 1:
                raise
        if stands(path):
            return
        old = temporary_path(path)
        try:
            os.replace(path, old)
            if stands(old):
                os.replace(old, path)
                return
        except OSError as error:  # another writer was faster: it renamed the folder, or put its own there
            if error.errno not in (errno.ENOENT, *OCCUPIED):
                raise
        finally:
            _remove(old)


def clear_temporaries(folder: Path, age_s: float = 0.0, pattern: str = TEMPORARY) -> None:
    """Removes leftovers of killed writers below `folder` that were last written at least `age_s` seconds ago."""
    _clear([*folder.rglob(pattern)], age_s)


def _clear(leftovers: Iterable[Path], age_s: float) -> None:
    before = time.time() - age_s
    for leftover in leftovers:
        with contextlib.suppress(OSError):  # its writer was alive after all and has just renamed it
            if _last_written(leftover) <= before:
                _remove(leftover)


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _last_written(path: Path) -> float:
    """Unix time of the last change to a file, or to anything in a folder (a folder's own time ignores writes to its files)."""
    return max(p.lstat().st_mtime for p in (path, *path.rglob("*")))


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal after rounding to half precision, in which weights are often stored."""
    import torch

    return one.shape == other.shape and torch.equal(one.detach().half().cpu(), other.detach().half().cpu())


def digest_state(state: dict[str, Any]) -> str:
    """Hash of named tensors: names, types, shapes and bytes."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return sha.hexdigest()[:16]


def rounded_digests(state: dict[str, Any]) -> tuple[str, ...]:
    """Hashes of named tensors after rounding to each half precision, in which weights are often stored.

    Two networks that share one of them have the same tensors, in the same or in another type.
    """
    import torch

    return tuple(
        f"{kind}-{digest_state({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()})}"
        for kind, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16))
    )


def digest_of(*parts: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest_of_files(path: Path) -> str:
    """Hash of a file, or of all files below a folder, by name and content."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return _digest_of_contents(path, tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=64)
def _digest_of_contents(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files (path, time of change, size) by name and content; read again only if times or sizes differ."""
    sha = hashlib.sha256()
    for file, _, size in files:
        sha.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]
