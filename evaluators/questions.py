"""Answers of a vision-language model to the question who is in a picture.

Source: the evaluation of Cai et al., SLUG, ICML 2025, arXiv:2407.11867, on LLaVA. An answer is right if it contains the name.
Forget accuracy is the share of right answers for the forgotten name, and retained accuracy the mean of that share over the
other names. The question is the tier's, so search and audit differ in it.
"""

from __future__ import annotations

import numpy as np

from evaluators.base import Evaluator, Metric, Scores, Subject


class Questions(Evaluator):
    """Accuracy of the answers for the forgotten name and for the others.

    `retain_error` is the share of wrong answers for other names, (wrong + 1/2)/(n + 1), which always has a logarithm;
    `validity` is the share of answers that contain any name.
    """

    name = "questions"
    model_kinds = frozenset({"contrastive"})
    abilities = frozenset({"answers"})
    kinds = frozenset({"concept"})
    directions = {"forget_accuracy": "target", "retain_accuracy": "max", "retain_error": "min", "validity": "max"}
    needs = "labelled images of every name, a question"
    cost = "an answer of at most 12 tokens for each of the judge's images"

    def scores(self, subject: Subject) -> Scores:
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        (question,) = subject.task.texts[f"question_{subject.sizes['judge']}"]
        answers = [a.lower() for a in subject.model.answers(split.x, question)]
        names = [n.lower() for n in subject.task.class_names]
        truth = split.groups.numpy()
        right = np.array([names[c] in a for a, c in zip(answers, truth, strict=True)], dtype=float)
        forgotten = truth == subject.task.forget_class
        named = np.array([any(n in a for n in names) for a in answers], dtype=float)
        retain = np.stack([right[~forgotten], truth[~forgotten]], 1)
        return {"forget_right": right[forgotten], "retain": retain, "named": named}

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
            rows.append(Metric.share(name, values[name], len(hits), direction=self.directions[name]))
        n = len(scores["retain"])
        for name in ("retain_accuracy", "retain_error"):
            rows.append(
                Metric.jackknife(
                    name,
                    values[name],
                    n,
                    replicates[name],
                    over="images",
                    bounds=(0.0, 1.0),
                    direction=self.directions[name],
                )
            )
        return rows
