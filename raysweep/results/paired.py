"""Differences of every audited model to the base and to the oracles, paired by group of units. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluators.statistics import jackknife_interval
from raysweep.auditing.objectives import Measured
from raysweep.context import Context, load_measured
from raysweep.rundir import RunDir
from raysweep.storage.schemas import ROWS, write_table


def write_paired(folder: RunDir, context: Context, subjects: Mapping[str, str], methods: Mapping[str, str]) -> None:
    """Writes, for every audited subject, each metric's difference to the base and to the oracles' mean.

    The same seeds and images served all subjects, so groups of units are left out of both at once and what they share
    cancels. subjects: name -> key of its audit; methods: name of a candidate -> its method.
    """
    anchors, _ = context.load_anchors("audit")
    references = {"base": [anchors.base], "oracle": list(anchors.oracles)}
    for subject, key in subjects.items():
        measured = load_measured(folder.path, key)
        rows = [
            {"subject": subject, "method": methods.get(subject, ""), "paired_with": reference}
            | _difference(metric, measured, models)
            for reference, models in references.items()
            for metric in measured.values
            if all(metric in model.values for model in models)
        ]
        write_table(folder.rows / f"paired-{key}.parquet", rows, ROWS)


def _difference(metric: str, measured: Measured, references: Sequence[Measured]) -> dict[str, Any]:
    """A metric minus its mean over `references`, as the rest of a row of `storage.schemas.ROWS`."""
    delta = measured.values[metric] - float(np.mean([model.values[metric] for model in references]))
    replicates = measured.replicates[metric] - np.mean([model.replicates[metric] for model in references], axis=0)
    se = lo = hi = None
    if (
        np.ptp(replicates) > 0
    ):  # else there are fewer units than groups, or all are equal, and an error of 0 would be wrong
        se, lo, hi = jackknife_interval(delta, replicates)
    check, name = metric.split(".", 1)  # a strength, as in weight_noise.presence@0.02, also has a dot
    return {
        "tier": "audit",
        "check": check,
        "metric": name,
        "value": delta,
        "n": len(replicates),
        "se": se,
        "lo": lo,
        "hi": hi,
        "level": 0.95,
        "interval": "paired jackknife",
        "direction": "target",
        "status": "ok",
        "reason": "" if se is not None else "no interval: leaving groups of units out does not change it",
        "replicates": replicates.tolist(),
    }
