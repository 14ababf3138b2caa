"""Reads rows of text files: CSV and TSV, JSON in several shapes, JSON Lines, and plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from raysweep.storage.texts import read_text
from raysweep.tasks.records import SourceError, Tally

Format = Literal["csv", "tsv", "json", "jsonl", "txt"]


def records(
    path: Path, prompt: str, label: str, tally: Tally, stated: Format | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, row) of every prompt of a file.

    prompt, label: names of the columns; texts without columns become the column `prompt`. stated: the format, None for that of the
    suffix. location: file and line or row, for messages. Raises SourceError or TextError for a file that is not in its format.
    """
    form = stated or path.suffix.lower().removeprefix(".")
    if form not in get_args(Format):
        suffixes = ", ".join(f".{name}" for name in get_args(Format))
        raise SourceError(f"{path}: must be one of {suffixes}, or have a `format`")
    text = read_text(path)
    if form in ("csv", "tsv"):
        yield from table(path, text, "\t" if form == "tsv" else ",", prompt)
    elif form == "json":
        yield from _json(path, text, prompt, label)
    else:
        # not splitlines(): prompts may contain Unicode's other line separators
        for number, line in enumerate(text.split("\n"), 1):
            location = f"{path}:{number}"
            if not line.strip():
                continue
            if form == "jsonl":
                yield location, _row(location, _loads(location, line), prompt)
            elif line.lstrip().startswith("#"):
                tally.ignore("a comment", location)
            else:
                yield location, {prompt: line}


def table(path: Path, text: str, separator: str, needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, row) of a table with a header.

    If the header lacks the column `needed`, other separators are tried: Excel writes semicolons in locales with a decimal
    comma. A row that is longer than the header has the rest under None. Raises SourceError for unclosed quotes.
    """
    first_line = next(iter(io.StringIO(text, newline="")), "")  # newline="" splits as csv does, at a lone \r, too
    header = first_line.rstrip("\r\n")
    if needed not in next(csv.reader([header], delimiter=separator), []):
        separator = next((s for s in ";\t" if needed in next(csv.reader([header], delimiter=s), [])), separator)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise SourceError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _json(path: Path, text: str, prompt: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    data = _loads(str(path), text)
    if isinstance(data, dict) and data and all(isinstance(v, list) for v in data.values()):
        data = [_row(f"{path}: {k}", v, prompt) | {label: k} for k, values in data.items() for v in values]
    if not isinstance(data, list) or not data:
        raise SourceError(
            f"{path}: must be a list of texts, a list of objects such as {{{prompt!r}: ..., {label!r}: ...}}, or an object of classes "
            "with lists of texts"
        )
    for number, row in enumerate(data, 1):
        yield f"{path}: row {number}", _row(f"{path}: row {number}", row, prompt)


def _row(location: str, value: Any, prompt: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {prompt: value}
    if not isinstance(value, dict):
        raise SourceError(f"{location}: must be a text or an object, not {value!r:.60}")
    return value


def _loads(location: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = location if error.lineno == 1 and ":" in location else f"{location}:{error.lineno}"
        raise SourceError(f"{line}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; lists nested too deep
        raise SourceError(f"{location}: not valid JSON: {error}") from error
