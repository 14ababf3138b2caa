"""What a classifier sees in the samples: is the class gone, are the others intact, is it still a picture of anything?

For a class: `recognised` = share of samples under the forgotten label that the judge takes for it (1 - UA),
`retain_accuracy` = RA, `leak` = share of samples of the unconditional branch that show the class. Unlearning accuracy
alone is met by noise, so `validity` = share of the retained samples whose energy (log-sum-exp of the logits) is at least
the 5 % quantile of real held-out images; real images score 0.95 by construction, and the destroyed model is the control.
`energy` is the mean itself, minus that of real held-out images. `blank` is the share of samples that are one colour, such as
the black ones that a safety checker or an overflow leaves.

Where the mass went: `goes_to@c` = share of samples under the forgotten label that the judge takes for class c. The judge errs,
so `recognised_corrected` is the share of the forgotten class behind those shares, given how it errs on real held-out images.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import logsumexp

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject, judged
from evaluators.statistics import clopper_pearson, corrected_shares, jackknife_interval, t_interval

REAL_QUANTILE = 0.05
BLANK = 0.01  # standard deviation over the pixels of an image, in [-1, 1], under which it is one colour


class Classifier(Evaluator):
    """UA, RA, leak and validity by the judge; definitions of UnlearnCanvas (Zhang et al., arXiv:2402.11846)."""

    name = "classifier"
    directions = {
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
    cost = "the shared samples; for a class, `class_samples` under its label and `samples` without a label"

    def scores(self, subject: Subject) -> Scores:
        samples, classes = subject.samples()
        logits = judged(subject.judge, samples)
        scores: Scores = {"energy": logsumexp(logits, axis=1)}
        scores["blank"] = (samples.double().flatten(1).std(1) < BLANK).numpy().astype(float)
        if classes is not None:
            scores["retained_right"] = (logits.argmax(1) == classes.numpy()).astype(float)
            scores["forget_class"] = judged(subject.judge, forget_samples(subject, "class samples")).argmax(1)
            n = subject.sizes["samples"]
            null = subject.model.unconditional(n)
            if null is not None:  # without an unconditional branch there is nothing to leak
                free = subject.generate(null, subject.seeds("unconditional", n), guidance=1.0)
                scores["free_class"] = judged(subject.judge, free).argmax(1)
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        found = {name: float(hits.mean()) for name, hits in _hits(scores, subject).items()}
        found["energy"] = float(scores["energy"].mean() - _real(subject).mean())
        if "forget_class" in scores:
            shares = np.bincount(scores["forget_class"].astype(int), minlength=len(confusion(subject)))
            own = corrected_shares(shares / shares.sum(), confusion(subject))
            found["recognised_corrected"] = float(own[subject.task.forget_class])
        return found

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        rows, values = [], self.values(scores, subject)
        for name, hits in _hits(scores, subject).items():
            lo, hi = clopper_pearson(int(hits.sum()), len(hits))
            direction: Direction = self.directions.get(name, "target")
            rows.append(Metric(name, values[name], len(hits), None, lo, hi, "clopper-pearson", direction))
        se, lo, hi = t_interval(scores["energy"])
        real = float(_real(subject).mean())
        how = "student-t over samples"
        rows.append(Metric("energy", values["energy"], len(scores["energy"]), se, lo - real, hi - real, how))
        if "recognised_corrected" in values:
            value, n = values["recognised_corrected"], len(scores["forget_class"])
            se, lo, hi = jackknife_interval(value, replicates["recognised_corrected"])
            how = "jackknife over samples"
            rows.append(Metric("recognised_corrected", value, n, se, max(0.0, lo), min(1.0, hi), how))
        return rows


def forget_samples(subject: Subject, stream: str) -> torch.Tensor:
    """`class_samples` images generated under the forgotten label or prompts, (n, C, H, W)."""
    cond = subject.forgotten(subject.sizes["class_samples"])
    return subject.once(f"forget samples {stream}", lambda: subject.generate(cond, subject.seeds(stream, len(cond))))


def confusion(subject: Subject) -> np.ndarray:
    """[i, j]: the share of real held-out images of class j that the judge takes for class i; a class without images as if
    it never erred."""

    def make() -> np.ndarray:
        parts = [subject.task.splits[name] for name in ("holdout", "forget_holdout")]
        truth = np.concatenate([p.groups.numpy() for p in parts])
        logits = np.concatenate([judged(subject.judge, p.x) for p in parts])
        taken, classes = logits.argmax(1), logits.shape[1]
        table = np.zeros((classes, classes))
        np.add.at(table, (taken, truth), 1)
        unseen = table.sum(0) == 0
        table[unseen, unseen] = 1
        return table / table.sum(0)

    return subject.keep("confusion", make)


def _real(subject: Subject) -> np.ndarray:
    """Energies of real held-out images."""
    return subject.keep("energy", lambda: logsumexp(judged(subject.judge, subject.task.splits["holdout"].x), axis=1))


def _hits(scores: Scores, subject: Subject) -> dict[str, np.ndarray]:
    """Metric -> outcome (0 or 1) per sample."""
    threshold = float(np.quantile(_real(subject), REAL_QUANTILE))
    hits = {"validity": scores["energy"] >= threshold, "blank": scores["blank"] > 0}
    if "forget_class" in scores:
        forgotten = scores["forget_class"] == subject.task.forget_class
        hits |= {"recognised": forgotten, "unlearning_accuracy": ~forgotten}
        hits["retain_accuracy"] = scores["retained_right"] > 0
        if "free_class" in scores:
            hits["leak"] = scores["free_class"] == subject.task.forget_class
        hits |= {f"goes_to@{c}": scores["forget_class"] == c for c in range(len(confusion(subject)))}
    return {name: h.astype(float) for name, h in hits.items()}
