"""Differences of every audited model to the base and to the oracles, paired by unit. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluators.statistics import LEVEL, jackknife_interval
from raysweep.auditing.anchors import Anchors
from raysweep.auditing.terms import Measured, columns_of, term
from raysweep.context import Context, load_measured
from raysweep.rundir import RunDir
from raysweep.storage.schemas import ROWS, write_table


def write_paired(folder: RunDir, context: Context, subjects: Mapping[str, str], methods: Mapping[str, str]) -> None:
    """Writes, for every audited subject, each metric's difference to the base and to the oracles' mean.

    The same seeds and images served all subjects, so what the sampling of units shares cancels. An oracle is compared with the
    others. subjects: name -> key of its audit; methods: name of a candidate -> its method.
    """
    anchors, _ = context.load_anchors("audit")
    for subject, key in subjects.items():
        measured = load_measured(folder.path, key)
        common = {"subject": subject, "method": methods.get(subject, "")}
        rows = [common | row for row in paired_rows(measured, anchors, subject)]
        write_table(folder.rows / f"paired-{key}.parquet", rows, ROWS)


def paired_rows(measured: Measured, anchors: Anchors, subject: str) -> list[dict[str, Any]]:
    """The differences of a model to the base and to the oracles, as rows of `storage.schemas.ROWS` without the subject's columns."""
    oracles = [model for name, model in anchors.by_name().items() if name.startswith("oracle") and name != subject]
    rows = []
    for metric in measured.values:
        if metric in anchors.base.values:
            rows.append(_to_base(metric, measured, anchors.base))
        if oracles and all(metric in model.values for model in oracles):
            rows.append(_to_oracles(metric, measured, oracles))
    return rows


def _to_base(metric: str, measured: Measured, base: Measured) -> dict[str, Any]:
    """The difference to the base, which is one model: its error is that of the sampling of units."""
    delta = measured.values[metric] - base.values[metric]
    replicates = measured.replicates[metric] - base.replicates[metric]
    interval: dict[str, Any] = {}
    if (
        np.ptp(replicates) > 0
    ):  # else there are fewer units than groups, or all are equal, and an error of 0 would be wrong
        interval = dict(zip(("se", "lo", "hi"), jackknife_interval(delta, replicates), strict=True))
    return _row(metric, "base", delta, replicates, "paired jackknife", interval)


def _to_oracles(metric: str, measured: Measured, oracles: Sequence[Measured]) -> dict[str, Any]:
    """The difference to the oracles' mean, with the interval of the difference to one further oracle."""
    comparison = term(measured, oracles, metric).comparison
    replicates = measured.replicates[metric] - np.mean([model.replicates[metric] for model in oracles], axis=0)
    method = "paired jackknife, one oracle" if comparison.spread is None else "prediction of a further oracle"
    interval: dict[str, Any] = {}
    if comparison.se > 0:
        lo, hi = comparison.interval()
        interval = {"se": comparison.se, "lo": lo, "hi": hi} | columns_of(comparison)
    return _row(metric, "oracle", comparison.difference, replicates, method, interval)


def _row(
    metric: str, reference: str, delta: float, replicates: np.ndarray, method: str, interval: Mapping[str, Any]
) -> dict[str, Any]:
    check, name = metric.split(".", 1)  # a strength, as in weight_noise.presence@0.02, also has a dot
    return {
        "tier": "audit",
        "check": check,
        "metric": name,
        "paired_with": reference,
        "value": delta,
        "n": len(replicates),
        **interval,
        "level": LEVEL,
        "interval": method,
        "direction": "target",
        "status": "ok",
        "reason": "" if interval else "no interval: nothing that was measured varies",
        "replicates": replicates.tolist(),
    }
