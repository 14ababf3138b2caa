"""The log of a run's finished audits, to which the audit manager appends. No Ray: readers of a run need none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysweep.auditing.request import Outcome

LOG = "audits.jsonl"


def read_log(path: Path) -> dict[str, Outcome]:
    """The finished audits of a log, by key.

    Audits that failed, or in which a check failed, are left out: the cause may have been fixed before the run is resumed.
    """
    return {e.pop("key"): e for e in entries(path) if e["status"] == "ok" and not e["failed"]}


def entries(path: Path) -> Iterator[Any]:
    """All entries of a log in their order, outcomes with their `key`; a last line that a crash truncated is ignored."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
