"""What a classifier sees in the samples: is the class gone, are the others intact, is it still a picture of anything?

For a class: `recognised` = share of samples under the forgotten label that the judge takes for it (1 - UA),
`retain_accuracy` = RA, `leak` = share of samples of the unconditional branch that show the class. Unlearning accuracy
alone is met by noise, so `validity` = share of the retained samples whose energy (log-sum-exp of the logits) is at least
the 5 % quantile of real held-out images; real images score 0.95 by construction, and the destroyed model is the control.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import logsumexp

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject, judged
from evaluators.statistics import clopper_pearson

REAL_QUANTILE = 0.05


class Classifier(Evaluator):
    """UA, RA, leak and validity by the judge; definitions of UnlearnCanvas (Zhang et al., arXiv:2402.11846)."""

    name = "classifier"
    directions = {
        "validity": "max",
        "recognised": "target",
        "unlearning_accuracy": "target",
        "retain_accuracy": "max",
        "leak": "target",
    }
    needs = "judge; for a class its labels"
    cost = "the shared samples; for a class, `class_samples` under its label and `samples` without a label"

    def scores(self, subject: Subject) -> Scores:
        samples, cond = subject.samples()
        logits = judged(subject.judge, samples)
        scores: Scores = {"energy": logsumexp(logits, axis=1)}
        if subject.task.kind == "class":
            assert cond is not None
            scores["retained_right"] = (logits.argmax(1) == cond.numpy()).astype(float)
            scores["forget_class"] = judged(subject.judge, forget_samples(subject, "class samples")).argmax(1)
            null = torch.full((subject.sizes["samples"],), subject.model.null_label or 0)
            free = subject.generate(null, subject.seeds("unconditional", len(null)), guidance=1.0)
            scores["free_class"] = judged(subject.judge, free).argmax(1)
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        return {name: float(hits.mean()) for name, hits in _hits(scores, subject).items()}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows = []
        for name, hits in _hits(scores, subject).items():
            lo, hi = clopper_pearson(int(hits.sum()), len(hits))
            direction: Direction = self.directions[name]
            rows.append(Metric(name, float(hits.mean()), len(hits), None, lo, hi, "clopper-pearson", direction))
        return rows


def forget_samples(subject: Subject, stream: str) -> torch.Tensor:
    """`class_samples` images generated under the forgotten label, (n, C, H, W)."""
    cond = subject.forgotten(subject.sizes["class_samples"])
    return subject.generate(cond, subject.seeds(stream, len(cond)))


def _hits(scores: Scores, subject: Subject) -> dict[str, np.ndarray]:
    """Metric -> outcome (0 or 1) per sample."""

    def threshold() -> float:
        real = judged(subject.judge, subject.task.splits["holdout"].x)
        return float(np.quantile(logsumexp(real, axis=1), REAL_QUANTILE))

    hits = {"validity": scores["energy"] >= subject.once("energy threshold", threshold)}
    if "forget_class" in scores:
        forgotten = scores["forget_class"] == subject.task.forget_class
        hits |= {"recognised": forgotten, "unlearning_accuracy": ~forgotten}
        hits["retain_accuracy"] = scores["retained_right"] > 0
        hits["leak"] = scores["free_class"] == subject.task.forget_class
    return {name: h.astype(float) for name, h in hits.items()}
