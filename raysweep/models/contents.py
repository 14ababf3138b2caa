"""What of a model's folder is not read, so that nobody takes a hash of the model for one of everything in the folder."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from raysweep.models import families, stored
from raysweep.models.folders import read_json
from raysweep.models.validation import SCHEDULE
from raysweep.models.weights import weight_files


def not_read(folder: Path) -> tuple[str, ...]:
    """Files, whole subfolders (NAME/) and settings of the scheduler in a model's folder that have no influence on the model.

    Of a run's candidate, what is not read of its base, too. Raises ValueError if the folder holds no model. Of a family that does not
    state what it reads, the one entry says so.
    """
    base = stored.base_of(folder)
    if base is not None:
        return (*_unread(folder, folder, {folder / stored.FILE}), *(f"{base}/{entry}" for entry in not_read(base)))
    kind = families.handle(families.family_of(folder))
    if not kind.reads:
        return (f"not known: models of the family {kind.family} do not state which files they read",)
    read = {path for path in folder.rglob("*") if path.is_file() and _matches(path.relative_to(folder), kind.reads)}
    for part in {path.parent for path in read if path.name == "config.json"}:
        variants = {path for path in read if path.parent == part and ".safetensors" in path.name}
        used = weight_files(part)[0]
        read -= {p for p in variants if p not in used and not _is_index(p, used)}
    return (*_unread(folder, folder, read), *_unused_settings(folder, kind.schedule_keys))


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    name = path.as_posix()
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _is_index(path: Path, used: list[Path]) -> bool:
    """Whether a file is the index of the shards that are used."""
    stem = path.name.removesuffix(".safetensors.index.json")
    return stem != path.name and any(file.name.startswith(f"{stem}-") for file in used)


def _unread(root: Path, folder: Path, read: set[Path]) -> Iterator[str]:
    """The files and whole subfolders below `folder` without those in `read`, relative to `root`."""
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and any(path in file.parents for file in read):
            yield from _unread(root, path, read)
        elif path.is_dir():
            yield f"{name}/"
        elif path not in read:
            yield name


def _unused_settings(folder: Path, keys: frozenset[str]) -> Iterator[str]:
    """What the scheduler's file says and models are not sampled by."""
    path = folder / "scheduler" / SCHEDULE
    if not keys or not path.is_file():
        return
    config = read_json(path)
    unused = sorted(key for key in config if not key.startswith("_") and key not in keys)
    kind = config.get("_class_name", "DDIMScheduler")
    if kind not in ("DDIMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        unused.insert(0, f"its class {kind} (only its noise schedule is used)")
    if unused:
        yield f"scheduler/{SCHEDULE}: {', '.join(unused)}"
