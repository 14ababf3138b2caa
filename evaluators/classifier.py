"""Recognition of the forgotten and the retained classes in samples by the judge, and validity of the samples.

For a class: `recognised` is the share of samples under the forgotten label that the judge takes for it (1 - UA),
`retain_accuracy` is RA, and `leak` the share of samples of the unconditional branch that show the class. Noise would also
reach full unlearning accuracy. Therefore `validity` is the share of retained samples whose energy (log-sum-exp of the logits)
is at least the 5 % quantile of real held-out images; real images score 0.95 by construction, and the destroyed model is the
control. `energy` is the mean energy minus that of real held-out images. `blank` is the share of samples of a single colour,
such as the black ones that a safety checker or an overflow leaves.

`goes_to@c` is the share of samples under the forgotten label that the judge takes for class c. `recognised_corrected` is the
share of the forgotten class behind those shares, given the judge's errors on real held-out images.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from scipy.special import logsumexp

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject
from evaluators.statistics import corrected_shares

REAL_QUANTILE = 0.05
BLANK = 0.01  # standard deviation over the pixels, in [-1, 1], below which an image counts as one colour


class Classifier(Evaluator):
    """UA, RA, leak and validity by the judge; definitions of UnlearnCanvas (Zhang et al., arXiv:2402.11846)."""

    name = "classifier"
    directions: ClassVar[dict[str, Direction]] = {
        "validity": "max",
        "blank": "min",
        "recognised": "target",
        "unlearning_accuracy": "target",
        "retain_accuracy": "max",
        "leak": "target",
        "recognised_corrected": "target",
        "energy": "target",
    }
    needs = "judge; for a class its labels"
    cost = "the shared samples; for a class also `class_samples` under its label and `samples` without a label"

    def scores(self, subject: Subject) -> Scores:
        samples, classes = subject.samples()
        logits = subject.logits(samples)
        scores: Scores = {"energy": logsumexp(logits, axis=1)}
        scores["blank"] = (samples.double().flatten(1).std(1) < BLANK).numpy().astype(float)
        if classes is not None:
            scores["retained_right"] = (logits.argmax(1) == classes.numpy()).astype(float)
            scores["forget_class"] = subject.logits(forget_samples(subject, "class samples")).argmax(1)
            n = subject.sizes["samples"]
            null = subject.model.unconditional(n)
            if null is not None:  # without an unconditional branch there is nothing to leak
                unconditional = subject.generate(null, subject.seeds("unconditional", n), guidance=1.0)
                scores["free_class"] = subject.logits(unconditional).argmax(1)
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        values = {name: float(hits.mean()) for name, hits in _hits(scores, subject).items()}
        values["energy"] = float(scores["energy"].mean() - _real_energy(subject).mean())
        if "forget_class" in scores:
            shares = np.bincount(scores["forget_class"].astype(int), minlength=len(confusion(subject)))
            corrected = corrected_shares(shares / shares.sum(), confusion(subject))
            values["recognised_corrected"] = float(corrected[subject.task.forget_class])
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values = self.values(scores, subject)
        rows = [
            Metric.share(name, values[name], len(hits), direction=self.directions.get(name, "target"))
            for name, hits in _hits(scores, subject).items()
        ]
        real = float(_real_energy(subject).mean())
        rows.append(Metric.mean("energy", values["energy"], scores["energy"], over="samples", offset=-real))
        name = "recognised_corrected"
        if name in values:
            n = len(scores["forget_class"])
            rows.append(Metric.jackknife(name, values[name], n, replicates[name], over="samples", bounds=(0.0, 1.0)))
        return rows


def forget_samples(subject: Subject, stream: str) -> torch.Tensor:
    """`class_samples` images generated under the forgotten label or prompts, (n, C, H, W)."""
    cond = subject.forgotten(subject.sizes["class_samples"])
    return subject.once(f"forget samples {stream}", lambda: subject.generate(cond, subject.seeds(stream, len(cond))))


def confusion(subject: Subject) -> np.ndarray:
    """Shares [i, j] of real held-out images of class j that the judge takes for class i.

    Of a class without such images the judge is assumed to make no errors.
    """

    def make() -> np.ndarray:
        parts = [subject.task.splits[name] for name in ("holdout", "forget_holdout")]
        truth = np.concatenate([p.groups.numpy() for p in parts])
        logits = np.concatenate([subject.logits(p.x) for p in parts])
        taken, classes = logits.argmax(1), logits.shape[1]
        table = np.zeros((classes, classes))
        np.add.at(table, (taken, truth), 1)
        unseen = table.sum(0) == 0
        table[unseen, unseen] = 1
        return table / table.sum(0)

    return subject.keep("confusion", make)


def _real_energy(subject: Subject) -> np.ndarray:
    """Energies (n,) of real held-out images."""
    return subject.keep("energy", lambda: logsumexp(subject.logits(subject.task.splits["holdout"].x), axis=1))


def _hits(scores: Scores, subject: Subject) -> dict[str, np.ndarray]:
    """Metric -> outcome per sample, 0 or 1."""
    threshold = float(np.quantile(_real_energy(subject), REAL_QUANTILE))
    hits = {"validity": scores["energy"] >= threshold, "blank": scores["blank"] > 0}
    if "forget_class" in scores:
        forgotten = scores["forget_class"] == subject.task.forget_class
        hits |= {"recognised": forgotten, "unlearning_accuracy": ~forgotten}
        hits["retain_accuracy"] = scores["retained_right"] > 0
        if "free_class" in scores:
            hits["leak"] = scores["free_class"] == subject.task.forget_class
        hits |= {f"goes_to@{c}": scores["forget_class"] == c for c in range(len(confusion(subject)))}
    return {name: h.astype(float) for name, h in hits.items()}
