"""Reads rows of Parquet files: one file, or a folder in the layout of the Hugging Face hub or of a Hive-partitioned table."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from raysweep.tasks.decoding import LFS
from raysweep.tasks.records import SourceError, Tally, Unreadable, listed

if TYPE_CHECKING:
    from pyarrow import DataType, Schema
    from pyarrow.dataset import ParquetFileFragment
    from pyarrow.fs import FileSystem

BATCH_ROWS = 64  # rows that are decoded at once
SUFFIXES = (".parquet", ".pq", ".parq")
USUAL = "train|test|validation|valid|val|dev"  # names of splits
# train-00000-of-00002.parquet, train.parquet, train/0000.parquet
SPLIT = re.compile(
    rf"(?:.*/)?(?:([\w.]+)-\d{{5}}-of-\d{{5}}(?:-\w+)?\.\w+|({USUAL})(?:[-_.]\d+)?\.\w+|({USUAL})/[^/]+)"
)
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # Hive's folder name for rows without a value
UNCLASSED = -1  # the hub's class number for rows without a class


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; other: labels of a second domain."""

    image: str
    caption: str | None
    label: str | None
    other: str | None

    def names(self) -> list[str]:
        """The names of all columns, each once."""
        return list(dict.fromkeys(c for c in (self.image, self.caption, self.label, self.other) if c is not None))


@dataclass(frozen=True)
class Row:
    """The encoded image of a row, and its text columns. location: file and row number, for messages."""

    number: int
    location: str
    content: bytes
    caption: str | None
    label: str | None
    other: str | None


@dataclass(frozen=True)
class _File:
    """A file and the column values that its folders give, such as label=cat."""

    path: str
    name: str
    partition: dict[str, str | None]


def rows(source: str, split: str | None, columns: Columns, tally: Tally) -> Iterator[Row]:
    """Yields the rows of a file, a folder or a URI that have an image; holds one row group in memory at most.

    Raises SourceError if there is nothing to read, or a column is missing or of a type that cannot hold text or images.
    """
    filesystem, files = _files(source, split, tally)
    numbers, orders = 0, set[tuple[str, ...]]()
    for file in files:
        tally.parts += 1
        fragment = _opened(filesystem, file, tally)
        if fragment is None:
            continue
        schema = fragment.physical_schema
        _check_columns(source, file, schema, columns)
        classes = _class_names(schema)
        orders.add(classes.get(columns.label or "", ()))
        in_file = [c for c in columns.names() if c in schema.names]
        # one row group at a time: scanning a whole file reads ahead and keeps what it has read until the end
        for group in fragment.split_by_row_group():
            expected, read = group.row_groups[0].num_rows, 0
            batches = group.to_batches(columns=in_file, batch_size=BATCH_ROWS, batch_readahead=0, fragment_readahead=0)
            while (batch := _next(batches, tally, file.name, numbers, expected - read)) is not None:
                for cells in batch.to_pylist():
                    location = f"{file.name}: row {numbers}"
                    row = _row(numbers, location, file.partition | cells, columns, classes, tally)
                    numbers, read = numbers + 1, read + 1
                    if row is not None:
                        yield row
            numbers += expected - read
    tally.orders |= orders or {()}


def _files(source: str, split: str | None, tally: Tally) -> tuple[FileSystem, list[_File]]:
    import pyarrow as pa
    from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

    try:
        filesystem, path = FileSystem.from_uri(source) if "://" in source else (LocalFileSystem(), source)
        kind = filesystem.get_file_info(path).type
        if kind == FileType.NotFound:
            raise SourceError(f"{source}: not readable Parquet: no such file or folder")
        if kind == FileType.File:
            return filesystem, [_File(path, posixpath.basename(path), {})]
        infos = filesystem.get_file_info(FileSelector(path, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{source}: not readable Parquet ({str(error).splitlines()[0]})") from error
    names = sorted((i.path[len(path) :].strip("/"), i.path) for i in infos if i.type == FileType.File)
    shown = [(n, p) for n, p in names if not any(part.startswith((".", "_")) for part in n.split("/"))]
    tables = [(n, p) for n, p in shown if n.lower().endswith(SUFFIXES)]
    for name, _ in shown:
        if not name.lower().endswith(SUFFIXES):
            tally.ignore("no Parquet file", name)
    if not tables:
        raise SourceError(
            f"{source}: not readable Parquet: no file ends with {', '.join(SUFFIXES)}; there are: {listed(n for n, _ in shown)}"
        )
    return filesystem, [_File(p, n, _partition(n)) for n, p in _of_split(source, split, tables, tally)]


def _of_split(source: str, split: str | None, tables: list[tuple[str, str]], tally: Tally) -> list[tuple[str, str]]:
    """The files of one split, by the hub's file names: train-00000-of-00002.parquet, or train/0000.parquet."""
    matches = {name: SPLIT.fullmatch(name) for name, _ in tables}
    splits = {n: next(filter(None, m.groups()), "") if m else "" for n, m in matches.items()}
    known = {s for s in splits.values() if s}
    if split is None:
        if len(known) > 1:
            raise SourceError(
                f"{source}: holds the splits {listed(known)}: choose one with `split`, or several with `mix`"
            )
        return tables
    if split not in known:
        raise SourceError(f"{source}: split: no file is of the split {split!r}; there are: {listed(known) or 'none'}")
    for name, _ in tables:
        if splits[name] != split:
            tally.ignore("a file of another split", name)
    return [(name, path) for name, path in tables if splits[name] == split]


def _partition(name: str) -> dict[str, str | None]:
    """Column values from Hive's folder names: {"label": "cat"} for label=cat/0.parquet."""
    pairs = [part.partition("=") for part in name.split("/")[:-1] if "=" in part]
    return {unquote(k): None if v == NO_PARTITION else unquote(v) for k, _, v in pairs}


def _opened(filesystem: FileSystem, file: _File, tally: Tally) -> ParquetFileFragment | None:
    import pyarrow as pa
    from pyarrow.dataset import ParquetFileFormat

    try:
        fragment = ParquetFileFormat().make_fragment(file.path, filesystem)
        _ = fragment.physical_schema, fragment.num_row_groups  # reads the footer
        return fragment
    except (OSError, pa.ArrowException) as error:
        reason = f"not readable Parquet ({str(error).splitlines()[0]})"
        with filesystem.open_input_stream(file.path) as stream:
            if stream.read(len(LFS)) == LFS:
                reason = "a Git LFS pointer instead of the file (run `git lfs pull`)"
        tally.lose(reason, file.name)
        return None


def _check_columns(source: str, file: _File, schema: Schema, columns: Columns) -> None:
    """Raises SourceError if a column is missing, or of a type that cannot hold what it should."""
    import pyarrow.types as types

    known = [*schema.names, *(k for k in file.partition if k not in schema.names)]
    missing = [c for c in columns.names() if c not in known]
    if missing:
        raise SourceError(
            f"{source}: no column {', '.join(map(repr, missing))}; there are: {', '.join(known)} (in {file.name})"
        )
    kind = schema.field(columns.image).type if columns.image in schema.names else None
    has_bytes = kind is not None and types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not has_bytes and (kind is None or not _is_binary(kind)):
        raise SourceError(f"{source}: column {columns.image!r} holds {kind or 'text'}, not the bytes of images")
    for name in columns.names():
        if name != columns.image and name in schema.names and not _is_plain(schema.field(name).type):
            raise SourceError(
                f"{source}: column {name!r} holds {schema.field(name).type}, and must hold text or numbers"
            )


def _is_binary(kind: DataType) -> bool:
    import pyarrow.types as types

    checks = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(check(kind) for check in checks)


def _is_plain(kind: DataType) -> bool:
    """Whether a column holds text or numbers, or lists of them."""
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_decimal,
        types.is_null,
        _is_binary,
    )
    return any(check(kind) for check in checks)


def _class_names(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Class names of each ClassLabel column, from the metadata that the Hugging Face datasets library adds to a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {k: f["names"] for k, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
        return {name: tuple(map(str, names)) for name, names in labels.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _next(batches: Iterator[Any], tally: Tally, name: str, number: int, left: int) -> Any:
    """The next batch, or None at the end; a damaged row group ends early, and its `left` remaining rows are counted as lost."""
    import pyarrow as pa

    try:
        return next(batches, None)
    except (OSError, pa.ArrowException) as error:
        tally.seen += left
        tally.skip(f"a damaged row group ({str(error).splitlines()[0][:100]})", f"{name}: row {number}", left)
        return None


def _row(
    number: int,
    location: str,
    cells: dict[str, Any],
    columns: Columns,
    classes: dict[str, tuple[str, ...]],
    tally: Tally,
) -> Row | None:
    """A row with an image and readable texts; counts any other as skipped and gives None."""
    tally.seen += 1

    def text(field: str, column: str | None) -> str | None:
        if column is None:
            return None
        value = cells[column]
        if isinstance(value, list) and field == "caption" and len(value) > 1:
            tally.note(f"several captions in column {column!r}, of which the first is used", location)
        return _cell_text(field, column, value, classes.get(column, ()))

    try:
        content = _content(cells[columns.image])
        texts = text("caption", columns.caption), text("label", columns.label), text("other", columns.other)
    except Unreadable as error:
        tally.skip(str(error), f"row {number}", location=location)
        return None
    return Row(number, location, content, *texts)


def _content(cell: Any) -> bytes:
    """The encoded image of a cell: its bytes, or those of a struct of bytes and path; raises Unreadable."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        has_path = isinstance(cell, dict) and cell.get("path")
        raise Unreadable("no image bytes" + (", only the path of a file" if has_path else ""))
    return content


def _cell_text(field: str, column: str, value: Any, class_names: tuple[str, ...]) -> str | None:
    """A cell as text: the first of several captions, the name of a class number; raises Unreadable."""
    if isinstance(value, list):
        if field != "caption" and len(value) != 1:
            raise Unreadable(f"{len(value) or 'no'} values in column {column!r}, where one is needed")
        value = value[0] if value else None
    if class_names and isinstance(value, int):
        if value >= len(class_names) or value < UNCLASSED:
            raise Unreadable(f"class number {value} in column {column!r}, which has {len(class_names)} names")
        value = None if value == UNCLASSED else class_names[value]
    try:
        return _text(value)
    except UnicodeDecodeError as error:
        raise Unreadable(f"a {field} that is not UTF-8 text") from error


def _text(value: Any) -> str | None:
    """A value as text; whole floats without a point, because pandas turns integer columns with gaps into floats."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return None if value is None else str(value)
