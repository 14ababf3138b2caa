"""Prints rows as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from raysweep.search.released import shown

WIDE = 150  # columns of a table that goes to a file or another program


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with the names of their columns as headers; long cells wrap between words.

    The columns are those of all rows, in order; those without any content, and of truth values that are all false, are left out.
    """
    cells = [{column: _cell(value) for column, value in row.items()} for row in rows]
    known = dict.fromkeys(column for row in cells for column in row)
    columns = [column for column in known if any(row.get(column) for row in cells)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for row in cells:
        table.add_row(*(row.get(column, "") for column in columns))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def _cell(value: Any) -> str:
    """A value as text: entries of a mapping on a line each, a truth value as yes or nothing."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_inline(entry)}" for key, entry in value.items())
    return _inline(value)


def _inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return " ".join(_inline(entry) for entry in value.values())
    return ", ".join(_inline(v) for v in value) if isinstance(value, list) else shown(value)
