"""Does a vision-language model still name what it must forget, and what it must not?

Source: the evaluation of Cai et al., SLUG, ICML 2025, arXiv:2407.11867, on LLaVA: pictures of people with a question after who
they are; an answer counts if it holds the name. Forget accuracy is the share of right answers for the forgotten name, and
retained accuracy the mean over other names of that share. The question is the tier's own, so search and audit differ.
"""

from __future__ import annotations

import numpy as np

from evaluators.base import Evaluator, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, jackknife_interval


class Questions(Evaluator):
    """Forget accuracy and retained accuracy of the answers; the share of wrong ones for other names, (wrong + 1/2)/(n + 1), so
    that it has a logarithm; and the share of answers that hold any name."""

    name = "questions"
    model_kinds = frozenset({"contrastive"})
    abilities = frozenset({"answers"})
    kinds = frozenset({"concept"})
    directions = {"forget_accuracy": "target", "retain_accuracy": "max", "retain_error": "min", "validity": "max"}
    needs = "labelled images of every name, a question"
    cost = "an answer for each of the judge's images, of 12 tokens at most"

    def scores(self, subject: Subject) -> Scores:
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        (question,) = subject.task.texts[f"question_{subject.sizes['judge']}"]
        said = [a.lower() for a in subject.model.answers(split.x, question)]
        names = [n.lower() for n in subject.task.class_names]
        truth = split.groups.numpy()
        right = np.array([names[c] in a for a, c in zip(said, truth, strict=True)], dtype=float)
        mine = truth == subject.task.forget_class
        named = np.array([any(n in a for n in names) for a in said], dtype=float)
        return {"forget_right": right[mine], "retain": np.stack([right[~mine], truth[~mine]], 1), "named": named}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        right, truth = scores["retain"].T
        by_name = [right[truth == c].mean() for c in np.unique(truth)]
        return {
            "forget_accuracy": float(scores["forget_right"].mean()),
            "retain_accuracy": float(np.mean(by_name)),
            "retain_error": float((1 - right).sum() + 0.5) / (len(right) + 1),
            "validity": float(scores["named"].mean()),
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        for name, hits in (("forget_accuracy", scores["forget_right"]), ("validity", scores["named"])):
            lo, hi = clopper_pearson(int(hits.sum()), len(hits))
            rows.append(Metric(name, values[name], len(hits), None, lo, hi, "clopper-pearson", self.directions[name]))
        for name in ("retain_accuracy", "retain_error"):
            se, lo, hi = jackknife_interval(values[name], replicates[name])
            n, bounds = len(scores["retain"]), (max(0.0, lo), min(1.0, hi))
            rows.append(Metric(name, values[name], n, se, *bounds, "jackknife over images", self.directions[name]))
        return rows
