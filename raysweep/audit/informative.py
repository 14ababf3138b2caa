"""How well each check tells models with the forget set from models without, as `benchmarks/meta.py` measured it. No Ray.

The pools are of the embedded digits: a figure says what a check can do there, not on every task.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

LEAST = 0.9


@cache
def measured() -> dict[str, dict[str, list[float]]]:
    """Kind of task -> "check.metric" -> [AUC over models, low, high]; under one half where a check is the wrong way round."""
    table = files("raysweep.audit") / "informative.json"
    return json.loads(table.read_text(encoding="utf-8"))["auc"] if table.is_file() else {}


def caveat(kind: str, metric: str) -> str:
    """A warning about a check that does not tell the models of the pool apart; empty if it does or was not measured."""
    found = measured().get(kind, {}).get(metric)
    if found is None or found[0] >= LEAST:
        return ""
    return f"uninformative on the digits pool: AUC {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f}) over models"
