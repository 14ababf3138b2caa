"""Retained classes one by one, and those nearest to the forgotten one, which unlearning hurts first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject, judged
from evaluators.statistics import clopper_pearson, jackknife_interval, kid

NEAREST = 2


class PerClass(Evaluator):
    """Accuracy and KID (arXiv:1801.01401; unbiased, so small classes are not punished) of every retained class.

    `accuracy@c` is the share of samples under label c that the judge takes for c, `kid@c` their distance to the real images of
    c. `nearest_*` are means over the two classes whose real images lie nearest to the forgotten one's in the judge's features,
    a choice that no model can influence; `worst_accuracy` is the lowest.
    """

    name = "per_class"
    kinds = frozenset({"class", "concept"})
    directions: ClassVar[dict[str, Direction]] = {
        "nearest_accuracy": "max", "nearest_kid": "min", "worst_accuracy": "max",
    }  # fmt: skip
    needs = "judge; retain set with labels, forget set"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        samples, asked = subject.samples()
        assert asked is not None
        classes = len(torch.unique(asked))
        blocks = len(samples) // classes  # samples come as blocks of one per class: a block is a unit
        logits = subject.once("logits", lambda: judged(subject.judge, samples))
        right = (logits.argmax(1) == asked.numpy()).astype(float)
        return {
            "features": subject.features()[: blocks * classes].reshape(blocks, classes, -1),
            "right": right[: blocks * classes].reshape(blocks, classes),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        retain, reference = subject.task.splits["retain"], subject.reference_features()
        labels = retain.groups.numpy()
        classes, near = np.unique(labels), self._nearest(subject)
        found: dict[str, float] = {}
        for k, c in enumerate(classes):
            found[f"accuracy@{c}"] = float(scores["right"][:, k].mean())
            found[f"kid@{c}"] = kid(scores["features"][:, k], reference[labels == c])
        for kind in ("accuracy", "kid"):
            found[f"nearest_{kind}"] = float(np.mean([found[f"{kind}@{c}"] for c in near]))
        found["worst_accuracy"] = min(found[f"accuracy@{c}"] for c in classes)
        return found

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows, blocks = [], len(scores["right"])
        near = ", ".join(map(str, self._nearest(subject)))
        for name, value in self.values(scores, subject).items():
            kind = name.partition("@")[0].removeprefix("nearest_").removeprefix("worst_")
            direction: Direction = "min" if kind == "kid" else "max"
            if "@" in name and kind == "accuracy":
                lo, hi = clopper_pearson(round(value * blocks), blocks)
                rows.append(Metric(name, value, blocks, None, lo, hi, "clopper-pearson", direction))
            else:
                reason = f"classes {near}" if name.startswith("nearest") else ""
                se, lo, hi = jackknife_interval(value, replicates[name])
                rows.append(Metric(name, value, blocks, se, lo, hi, "jackknife over blocks", direction, reason=reason))
        return rows

    def _nearest(self, subject: Subject) -> list[int]:
        def make() -> np.ndarray:
            labels, reference = subject.task.splits["retain"].groups.numpy(), subject.reference_features()
            gone = judged(subject.judge.features, subject.task.splits["forget"].x).mean(0)
            classes = np.unique(labels)
            away = [np.linalg.norm(reference[labels == c].mean(0) - gone) for c in classes]
            return classes[np.argsort(away)[:NEAREST]].astype(float)

        return [int(c) for c in subject.keep("nearest classes", make)]
