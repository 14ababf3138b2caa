"""Quality of the retained classes one by one, and of those nearest to the forgotten one, which unlearning hurts first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from evaluators import statistics
from evaluators.base import Direction, Evaluator, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, kid

NEAREST = 2


class PerClass(Evaluator):
    """Accuracy and KID of every retained class; KID (arXiv:1801.01401) is unbiased, so small classes are not at a disadvantage.

    `accuracy@c` is the share of samples under label c that the judge takes for c, `kid@c` their distance to the real images of
    c. `nearest_*` are means over the two classes whose real images are nearest to the forgotten one's in the judge's features,
    a choice that no model can influence; `worst_accuracy` is the lowest.
    """

    name = "per_class"
    kinds = frozenset({"class", "concept"})
    directions: ClassVar[dict[str, Direction]] = {
        "nearest_accuracy": "max",
        "nearest_kid": "min",
        "worst_accuracy": "max",
    }
    needs = "judge; retain set with labels, forget set"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        samples, labels = subject.samples()
        assert labels is not None
        classes = len(torch.unique(labels))
        blocks = len(samples) // classes  # samples come as blocks of one per class: a block is a unit
        logits = subject.once("logits", lambda: subject.logits(samples))
        right = (logits.argmax(1) == labels.numpy()).astype(float)
        return {
            "features": subject.features()[: blocks * classes].reshape(blocks, classes, -1),
            "right": right[: blocks * classes].reshape(blocks, classes),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        retain, reference = subject.task.splits["retain"], subject.reference_features()
        labels = retain.groups.numpy()
        classes, nearest = np.unique(labels), self.nearest(subject)
        values: dict[str, float] = {}
        for k, c in enumerate(classes):
            values[f"accuracy@{c}"] = float(scores["right"][:, k].mean())
            values[f"kid@{c}"] = kid(scores["features"][:, k], reference[labels == c])
        for kind in ("accuracy", "kid"):
            values[f"nearest_{kind}"] = float(np.mean([values[f"{kind}@{c}"] for c in nearest]))
        values["worst_accuracy"] = min(values[f"accuracy@{c}"] for c in classes)
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows, blocks, right = [], len(scores["right"]), scores["right"]
        nearest = self.nearest(subject)
        reason = f"classes {', '.join(map(str, nearest))}"
        for name, value in self.values(scores, subject).items():
            if name == "worst_accuracy":
                rows.append(_worst(value, right))
            elif name == "nearest_accuracy":
                rows.append(Metric.share(name, value, blocks * len(nearest), direction="max", reason=reason))
            elif name.startswith("accuracy@"):
                rows.append(Metric.share(name, value, blocks, direction="max"))
            else:
                limit = reason if name.startswith("nearest") else ""
                rows.append(
                    Metric.jackknife(
                        name, value, blocks, replicates[name], over="blocks", direction="min", reason=limit
                    )
                )
        return rows

    def nearest(self, subject: Subject) -> list[int]:
        """The retained classes nearest to the forgotten one, the nearest first."""

        def make() -> np.ndarray:
            labels, reference = subject.task.splits["retain"].groups.numpy(), subject.reference_features()
            forgotten = subject.judge_features(subject.task.splits["forget"].x).mean(0)
            classes = np.unique(labels)
            distances = [np.linalg.norm(reference[labels == c].mean(0) - forgotten) for c in classes]
            return classes[np.argsort(distances)[:NEAREST]].astype(float)

        return [int(c) for c in subject.keep("nearest classes", make)]


def _worst(value: float, right: np.ndarray) -> Metric:
    """The lowest accuracy over classes, for outcomes (blocks, classes), 0 or 1.

    The interval lies between the lowest of the lower and the lowest of the upper ends of the classes' exact intervals, which
    hold for all classes at once (Bonferroni).
    """
    blocks, classes = right.shape
    level = 1 - (1 - statistics.LEVEL) / classes
    ends = np.array([clopper_pearson(int(hits), blocks, level) for hits in right.sum(0)])
    lo, hi = ends.min(0)
    method = "clopper-pearson for all classes at once"
    return Metric("worst_accuracy", value, blocks, lo=float(lo), hi=float(hi), interval=method, direction="max")
