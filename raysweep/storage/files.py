"""What a run keeps on disk: the declared schema of its tables, atomic writes, and content hashes.

Every file is written under a temporary name in its own folder, flushed to disk and renamed, so that a reader sees either
nothing or all of it. Tables are parts, each written as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = "4"
TEMPORARY = ".*.tmp"  # what is being written
CHECKPOINT = ".*.partial.pt"  # checkpoints of training that has not ended
DAY_S = 24 * 3600.0
RENAMES = 10  # attempts to put a folder in its place


class StoreError(RuntimeError):
    """A file could not be written or read; the message names it and the cause."""


def _field(name: str, kind: pa.DataType, comment: str) -> pa.Field:
    return pa.field(name, kind, metadata={"comment": comment})


ROWS = pa.schema(
    [
        _field(
            "subject", pa.string(), "trial id; base, oracle-K, destroyed; or FOLDER@HASH, a model audited by itself"
        ),
        _field("method", pa.string(), "method of the trial; empty for anchors"),
        _field("subject_digest", pa.string(), "hash of the audited weights"),
        _field("tier", pa.string(), "probe (steers the search) or audit (reported)"),
        _field("check", pa.string(), "evaluator"),
        _field("metric", pa.string(), "metric of the evaluator"),
        _field("paired_with", pa.string(), "empty, or the reference that value is the difference to (base, oracle)"),
        _field("value", pa.float64(), "point estimate; null where status is not ok"),
        _field("n", pa.int64(), "independent units behind the value"),
        _field("se", pa.float64(), "standard error, where the interval has one"),
        _field("lo", pa.float64(), "lower end of the interval"),
        _field("hi", pa.float64(), "upper end of the interval"),
        _field("level", pa.float64(), "confidence level of the interval"),
        _field("interval", pa.string(), "method of the interval"),
        _field("direction", pa.string(), "min, max, or target (like the oracle)"),
        _field("status", pa.string(), "ok, failed or skipped"),
        _field("reason", pa.string(), "why a value is missing, or what limits it"),
        _field("replicates", pa.list_(pa.float64()), "the value without each group of units in turn"),
        _field("seed", pa.int64(), "seed of the tier"),
        _field("judge_digest", pa.string(), "hash of the judge's weights"),
        _field("task_digest", pa.string(), "hash of the task's data and settings"),
        _field("tier_digest", pa.string(), "hash of the tier's settings"),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)

SCORES = pa.schema(
    [
        _field(
            "subject", pa.string(), "trial id; base, oracle-K, destroyed; or FOLDER@HASH, a model audited by itself"
        ),
        _field("tier", pa.string(), "probe or audit"),
        _field("score", pa.string(), "evaluator.score"),
        _field("unit", pa.int32(), "independent unit: a seed or an image; the same unit in every subject of a tier"),
        _field("values", pa.list_(pa.float64()), "the unit's score or scores"),
        _field("shape", pa.list_(pa.int32()), "shape of the unit's scores; empty for a single one"),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)

TRIALS = pa.schema(
    [
        _field("trial", pa.string(), "trial id"),
        _field("number", pa.int64(), "number in the Optuna study"),
        _field("method", pa.string(), "method"),
        _field("source", pa.string(), "where enqueued settings come from; empty if sampled"),
        _field("state", pa.string(), "COMPLETE, PRUNED, FAIL or RUNNING"),
        _field("hyperparameters", pa.string(), "JSON"),
        _field("seed", pa.int64(), "seed of the trial"),
        _field("residue", pa.float64(), "probe estimate; 0 like the oracle, 1 like the base"),
        _field("damage", pa.float64(), "probe estimate; 0 like the oracle, 1 like a destroyed model"),
        _field("residue_se", pa.float64(), "standard error"),
        _field("damage_se", pa.float64(), "standard error"),
        _field("train_s", pa.float64(), "seconds of training"),
        _field("audit_s", pa.float64(), "seconds of the probe"),
        _field("digest", pa.string(), "hash of the candidate's weights"),
        _field("probe", pa.string(), "key of its probe, whose rows are in rows/KEY.parquet; empty without one"),
        _field("reason", pa.string(), "why the trial failed or was stopped"),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)

FRONT = pa.schema(
    [
        _field("trial", pa.string(), "trial id, or base, oracle-K, destroyed"),
        _field("method", pa.string(), "method; empty for anchors"),
        _field("kind", pa.string(), "candidate or anchor"),
        _field("residue", pa.float64(), "audited residue"),
        _field("residue_se", pa.float64(), "standard error by the jackknife"),
        _field("damage", pa.float64(), "audited damage"),
        _field("damage_se", pa.float64(), "standard error by the jackknife"),
        _field("over_forgetting", pa.float64(), "largest distance beyond the oracle over the views, counted as damage"),
        _field("probe_residue", pa.float64(), "what the search saw"),
        _field("probe_damage", pa.float64(), "what the search saw"),
        _field("on_front", pa.bool_(), "not dominated by any audited candidate"),
        _field("on_method_front", pa.bool_(), "not dominated by any audited candidate of its method"),
        _field("p_dominated", pa.float64(), "probability that some other candidate dominates it"),
        _field("audits", pa.int32(), "audits on fresh seeds behind the values; more where the front was uncertain"),
        _field("verdict", pa.string(), "what became of the forgotten thing by the attacks; empty if not attacked"),
        _field("views", pa.string(), "JSON: anchored value of each view of the residue"),
        _field("hyperparameters", pa.string(), "JSON"),
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)


def temporary_path(path: Path) -> Path:
    """A name beside `path` for what is not finished yet. No other process, thread or host on the same storage has it, which a
    process id would not promise, and `clear_temporaries` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")


def checkpoint_path(path: Path) -> Path:
    """Where the last checkpoint of what will be made at `path` is kept until it is made."""
    return path.with_name(f".{path.name}.partial.pt")


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes what `fill` puts into an open file, atomically and durably; raises StoreError and leaves the old file in place if
    the system refuses."""
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
    """Writes a file atomically and durably; raises StoreError and leaves the old file in place on failure."""
    write_file(path, lambda file: file.write(data))


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON, atomically."""
    write_bytes(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes one Parquet part; every key of a row must be a column of `schema`."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue())


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads one part, or all parts of a folder, and checks the schema version."""
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    tables = []
    for part in parts:
        try:
            table = pq.read_table(part, partitioning=None)
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"cannot read {part}: {error}") from error
        version = (table.schema.metadata or {}).get(b"schema_version", b"?").decode()
        if version != SCHEMA_VERSION:
            raise StoreError(f"{part}: schema version {version}, but this raysweep reads {SCHEMA_VERSION}")
        tables.append(table.select(schema.names))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder atomically: `fill` writes into a temporary one, which then takes its place.

    Where several processes make the same folder at once, on one host or on many, the last one to end wins. What one that was
    killed has left goes after a day.
    """
    temporary = temporary_path(path)
    _clear(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"), DAY_S)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _take_place(temporary, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Renames a folder to `path`. One that is there is renamed first, so that nobody finds it half deleted."""
    for attempt in range(RENAMES):
        old = temporary_path(path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError as error:  # another writer was quicker between the two renames
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == RENAMES - 1:
                raise
        else:
            return
        finally:
            _remove(old)


def clear_temporaries(folder: Path, age_s: float = 0.0, pattern: str = TEMPORARY) -> None:
    """Removes what writes that were killed have left below `folder`, if nothing in it was written for `age_s` seconds."""
    _clear([*folder.rglob(pattern)], age_s)


def _clear(leftovers: Iterable[Path], age_s: float) -> None:
    before = time.time() - age_s
    for leftover in leftovers:
        with contextlib.suppress(OSError):  # its writer was alive after all, and has just ended
            if _last_written(leftover) <= before:
                _remove(leftover)


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _last_written(path: Path) -> float:
    """Unix time of the last change to a file, or to anything in a folder: writing into a file does not touch its folder."""
    return max(p.lstat().st_mtime for p in (path, *path.rglob("*")))


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values as far as half precision, in which weights are often kept, tells them apart."""
    import torch

    return one.shape == other.shape and torch.equal(one.detach().half().cpu(), other.detach().half().cpu())


def digest_state(state: dict[str, Any]) -> str:
    """Hash of named tensors: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


def digest_of(*parts: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
