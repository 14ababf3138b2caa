"""Power of each check to separate models with the forget set from models without, measured by `benchmarks/meta.py`. No Ray.

The models are of the embedded digits: a figure holds there, not on every task.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

LEAST = 0.9  # AUC below which a check counts as uninformative


@cache
def measured() -> dict[str, dict[str, list[float]]]:
    """Kind of task -> "check.metric" -> [AUC over models, low, high]; below one half if a check points the wrong way."""
    table = files("raysweep.auditing") / "informative.json"
    auc: dict[str, dict[str, list[float]]] = json.loads(table.read_text(encoding="utf-8"))["auc"]
    return auc


def caveat(kind: str, metric: str) -> str:
    """A warning about a check that does not separate the models of the pool; empty if it does or was not measured."""
    auc, low, high = measured().get(kind, {}).get(metric, (1.0, 1.0, 1.0))
    if auc >= LEAST:
        return ""
    return f"uninformative on the digits pool: AUC {auc:.2f} over models (95 % interval {low:.2f} to {high:.2f})"
