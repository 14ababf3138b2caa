"""The tables of a run: their schemas, with every column described, and how they are written and read.

A table is a Parquet file, or a folder of them (its parts), each written as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysweep.storage.files import StoreError, write_bytes

SCHEMA_VERSION = "5"


def _field(name: str, kind: pa.DataType, comment: str) -> pa.Field:
    return pa.field(name, kind, metadata={"comment": comment})


def _schema(*fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"schema_version": SCHEMA_VERSION})


_SUBJECT = _field(
    "subject", pa.string(), "trial id; base, oracle-K, destroyed; or FOLDER@HASH, a model audited by itself"
)


ROWS = _schema(
    _SUBJECT,
    _field("method", pa.string(), "method of the trial; empty for anchors"),
    _field("subject_digest", pa.string(), "hash of the audited weights"),
    _field("tier", pa.string(), "probe (steers the search) or audit (reported)"),
    _field("check", pa.string(), "evaluator"),
    _field("metric", pa.string(), "metric of the evaluator"),
    _field("paired_with", pa.string(), "empty, or the reference (base, oracle) that is subtracted"),
    _field("value", pa.float64(), "point estimate; null unless status is ok"),
    _field("n", pa.int64(), "number of independent units (samples, images) behind the value"),
    _field("se", pa.float64(), "standard error; null if the interval method gives none"),
    _field("lo", pa.float64(), "lower end of the interval"),
    _field("hi", pa.float64(), "upper end of the interval"),
    _field(
        "oracles",
        pa.int32(),
        "of a difference to the oracles: their number; null for all other values, as in the next three",
    ),
    _field("spread", pa.float64(), "standard deviation of the oracles; null for one oracle"),
    _field(
        "se_mean",
        pa.float64(),
        "standard error of the difference to the mean of all possible oracles; se is to a further one",
    ),
    _field("df", pa.float64(), "degrees of freedom of both"),
    _field("level", pa.float64(), "confidence level of the interval, 0 to 1"),
    _field("interval", pa.string(), "method of the interval"),
    _field("direction", pa.string(), "min, max, or target (like the oracle)"),
    _field("status", pa.string(), "ok, failed or skipped"),
    _field("reason", pa.string(), "why a value is missing, or what limits its validity"),
    _field("replicates", pa.list_(pa.float64()), "jackknife: the value without each group of units in turn"),
    _field("seed", pa.int64(), "seed of the tier"),
    _field("judge_digest", pa.string(), "hash of the judge's weights"),
    _field("task_digest", pa.string(), "hash of the task's data and settings"),
    _field("tier_digest", pa.string(), "hash of the tier's settings"),
)

SCORES = _schema(
    _SUBJECT,
    _field("tier", pa.string(), "probe or audit"),
    _field("score", pa.string(), "evaluator.score"),
    _field("unit", pa.int32(), "independent unit: a seed or an image; the same unit in every subject of a tier"),
    _field("values", pa.list_(pa.float64()), "the unit's score or scores"),
    _field("shape", pa.list_(pa.int32()), "shape of the unit's scores; empty for a single one"),
)

TRIALS = _schema(
    _field("trial", pa.string(), "trial id"),
    _field("number", pa.int64(), "number in the Optuna study"),
    _field("method", pa.string(), "method"),
    _field("source", pa.string(), "source of enqueued settings; empty if sampled"),
    _field("state", pa.string(), "COMPLETE, PRUNED, FAIL or RUNNING"),
    _field("hyperparameters", pa.string(), "JSON: name to value"),
    _field("seed", pa.int64(), "seed of the trial"),
    _field("residue", pa.float64(), "probe estimate; 0 like the oracle, 1 like the base"),
    _field("damage", pa.float64(), "probe estimate; 0 like the oracle, 1 like a destroyed model"),
    _field("residue_se", pa.float64(), "standard error of the difference to one further oracle"),
    _field("damage_se", pa.float64(), "standard error of the difference to one further oracle"),
    _field("train_s", pa.float64(), "seconds of training"),
    _field("audit_s", pa.float64(), "seconds of the probe"),
    _field("digest", pa.string(), "hash of the candidate's weights"),
    _field("probe", pa.string(), "key of its probe, whose rows are in rows/KEY.parquet; empty without one"),
    _field("reason", pa.string(), "why the trial failed or was stopped"),
)

FRONT = _schema(
    _field("trial", pa.string(), "trial id, or base, oracle-K, destroyed"),
    _field("method", pa.string(), "method; empty for anchors"),
    _field("kind", pa.string(), "candidate or anchor"),
    _field("residue", pa.float64(), "audited residue; of an oracle, by the other oracles"),
    _field("residue_lo", pa.float64(), "lower end of the 95 % interval of the difference to one further oracle"),
    _field("residue_hi", pa.float64(), "upper end of that interval"),
    _field("residue_upper", pa.float64(), "one-sided 95 % upper limit against the mean of all possible oracles"),
    _field("damage", pa.float64(), "audited damage; of an oracle, by the other oracles"),
    _field("damage_lo", pa.float64(), "lower end of the 95 % interval of the difference to one further oracle"),
    _field("damage_hi", pa.float64(), "upper end of that interval"),
    _field("over_forgetting", pa.float64(), "largest distance below the oracle over the views, counted as damage"),
    _field("probe_residue", pa.float64(), "estimate of the probe, which the search saw"),
    _field("probe_damage", pa.float64(), "estimate of the probe, which the search saw"),
    _field("on_front", pa.bool_(), "not dominated by any audited candidate"),
    _field("on_method_front", pa.bool_(), "not dominated by any audited candidate of its method"),
    _field("p_dominated", pa.float64(), "probability that another candidate dominates it, 0 to 1"),
    _field(
        "audits",
        pa.int32(),
        "number of audits on fresh seeds behind the values; more if its place on the front was uncertain",
    ),
    _field("verdict", pa.string(), "outcome of the attacks (whether the forgotten came back); empty if not attacked"),
    _field("views", pa.string(), "JSON: anchored value of each view of the residue"),
    _field("hyperparameters", pa.string(), "JSON: name to value"),
)

PROFILE = _schema(
    _field("part", pa.string(), "phase (of the run) or check (of its audits)"),
    _field("name", pa.string(), "phase; or evaluator, and `pictures` for those of the report"),
    _field(
        "seconds",
        pa.float64(),
        "of a phase: by the clock, of all attempts at the run; of a check: of all auditors; what several checks use counts for the first",
    ),
    _field(
        "audits",
        pa.int64(),
        "of a check: the audits that it was part of; null for a phase, as the next four for a check",
    ),
    _field(
        "train_s",
        pa.float64(),
        "seconds that slots had a job, of all slots; null if no slots train (train.executor=isolated)",
    ),
    _field("audit_s", pa.float64(), "seconds that auditors had an audit or a judge to train, of all auditors"),
    _field(
        "busy_s",
        pa.float64(),
        "seconds that CPUs, or on a cluster with GPUs these, had one of both to do, of all; null as train_s",
    ),
    _field("available_s", pa.float64(), "seconds that there were such CPUs or GPUs, of all; null as train_s"),
)

_OF_METRICS = ("check", "metric", "value", "n", "se", "lo", "hi", "interval", "direction", "status", "reason")
METRICS = pa.schema([ROWS.field(name) for name in _OF_METRICS])
TABLES = {"trials": TRIALS, "front": FRONT, "rows": ROWS, "scores": SCORES, "metrics": METRICS, "profile": PROFILE}


def describe(table: str) -> dict[str, str]:
    """Column -> description of a table; raises ValueError for a name that is not in `TABLES`."""
    if table not in TABLES:
        raise ValueError(f"{table!r} is not a table; valid: {', '.join(TABLES)}")
    return {field.name: field.metadata[b"comment"].decode() for field in TABLES[table]}


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes one Parquet part, atomically; every key of a row must be a column of `schema`."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue())


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one part, or all parts of a folder.

    columns: those to read, which a reader of many parts names for its time and memory; None for all. Raises StoreError if a part
    is unreadable or of another schema version.
    """
    names = schema.names if columns is None else columns
    tables = [_read_part(part, names) for part in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    return pa.concat_tables(tables) if tables else pa.schema([schema.field(name) for name in names]).empty_table()


def _read_part(part: Path, columns: Sequence[str]) -> pa.Table:
    try:
        with pq.ParquetFile(part) as file:
            version = (file.schema_arrow.metadata or {}).get(b"schema_version", b"?").decode()
            if version != SCHEMA_VERSION:
                raise StoreError(f"{part}: schema version {version}, but this raysweep reads {SCHEMA_VERSION}")
            return file.read(columns, use_threads=False).select(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"cannot read {part}: {error}") from error
