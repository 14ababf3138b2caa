"""Distances between samples and the real retained images, in the judge's feature space, by torch-fidelity.

torch-fidelity's own caches and extractors stay out of it: features are computed once, by the judge, and handed to its
functions. The spread that it prints for KID is over random subsets, not a standard error, and a bootstrap of the Frechet
distance is biased by duplicates: both errors are by the delete-a-group jackknife. All values depend on the number of
samples; compare them at equal n only.
"""

from __future__ import annotations

import numpy as np

from evaluators.base import Evaluator, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, frechet, jackknife_se, kid, normal_interval, precision_recall


class Fidelity(Evaluator):
    """Frechet distance (Heusel et al., arXiv:1706.08500), KID (arXiv:1801.01401), precision and recall (1904.06991)."""

    name = "fidelity"
    directions = {"frechet": "min", "kid": "min", "precision": "max", "recall": "max"}
    needs = "retain set"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        return {"features": subject.features()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        reference = subject.reference_features()
        result = {"frechet": frechet(scores["features"], reference)}
        if subject.sizes["full_fidelity"]:
            result["kid"] = kid(scores["features"], reference)
        return result

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        n = len(scores["features"])
        values = self.values(scores, subject)
        if subject.sizes["full_fidelity"]:
            values |= dict(
                zip(
                    ("precision", "recall"),
                    precision_recall(scores["features"], subject.reference_features()),
                    strict=True,
                )
            )
        rows = []
        for name in ("frechet", "kid"):
            if name in values:
                se = jackknife_se(replicates[name])
                lo, hi = normal_interval(values[name], se)
                rows.append(Metric(name, values[name], n, se, lo, hi, "jackknife over samples", "min"))
        if "precision" in values:
            low, high = clopper_pearson(round(values["precision"] * n), n)
            rows.append(Metric("precision", values["precision"], n, None, low, high, "clopper-pearson", "max"))
            m = len(subject.reference_features())
            low, high = clopper_pearson(round(values["recall"] * m), m)
            method = "clopper-pearson over real images"
            rows.append(Metric("recall", values["recall"], m, None, low, high, method, "max"))
        return rows
