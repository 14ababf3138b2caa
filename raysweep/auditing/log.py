"""The log of a run's finished audits, to which the audit manager appends. No Ray: readers of a run need none."""

from __future__ import annotations

import json
from pathlib import Path

from raysweep.auditing.request import Outcome

LOG = "audits.jsonl"


def read_log(path: Path) -> dict[str, Outcome]:
    """The finished audits of a log, by key; a last line that a crash truncated is ignored.

    Audits that failed, or in which a check failed, are left out: the cause may have been fixed before the run is resumed.
    """
    done = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["status"] == "ok" and not entry["failed"]:
                done[entry.pop("key")] = entry
    return done
