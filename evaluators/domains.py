"""Accuracies within the domain of what was forgotten and across domains, as in UnlearnCanvas.

Source: Zhang et al., arXiv:2402.11846. Prompts name a member of each of two domains, such as an object and a style. The judge
recognises the members of the domain of the forgotten class; a second judge, trained on the same images with their
labels of the other domain, recognises the others. The samples are those of `classifier`, of retained classes and of the
forgotten one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Inapplicable, Metric, Scores, Subject
from evaluators.classifier import forget_samples
from evaluators.judge import Judge, from_array, to_array, train_judge

SEED, STEPS = 0, 200  # of the second judge
ACCURACIES = ("in_domain", "cross_domain", "cross_domain_with_forgotten")


def domain_accuracies(
    asked: Mapping[str, np.ndarray],
    seen: Mapping[str, np.ndarray],
    domain: str,
    member: int,
    *,
    with_forgotten: bool = False,
) -> dict[str, float]:
    """UA, IRA and CRA of UnlearnCanvas (arXiv:2402.11846) for images requested by one member of each of several domains.

    asked, seen: domain -> members (n,) named in the prompts, and recognised by the classifier of the domain. The forgotten
    thing is `member` of `domain`. "unlearning_accuracy" is the share of images requested by it that are not recognised as
    it; "in_domain" the mean over the domain's other members of the accuracy on images requested by each; "cross_domain" the
    same over the members of all other domains. No code was released for the last; images that also name the forgotten
    member are left out of it unless `with_forgotten`.
    """
    forgotten = asked[domain] == member

    def accuracy(name: str, subset: np.ndarray) -> float:
        right, members = seen[name] == asked[name], asked[name]
        return float(np.mean([right[subset & (members == m)].mean() for m in np.unique(members[subset])]))

    subset = np.full_like(forgotten, True) if with_forgotten else ~forgotten
    return {
        "unlearning_accuracy": float((seen[domain][forgotten] != member).mean()),
        "in_domain": accuracy(domain, ~forgotten),
        "cross_domain": float(np.mean([accuracy(other, subset) for other in asked if other != domain])),
    }


class Domains(Evaluator):
    """In-domain and cross-domain accuracies.

    `in_domain` is IRA. `cross_domain` is CRA without the images that name the forgotten member, as in the paper's text, and
    `cross_domain_with_forgotten` with them, as in a script that others released. `second_judge` is the accuracy of the second
    judge on real held-out images.
    """

    name = "domains"
    kinds = frozenset({"concept"})
    directions: ClassVar[dict[str, Direction]] = {
        "in_domain": "max",
        "cross_domain": "max",
        "cross_domain_with_forgotten": "max",
        "second_judge": "target",
    }
    needs = "judge; labels of a second domain for prompts and judges' images"
    cost = "the shared samples; training of the second judge, once per sweep"

    def scores(self, subject: Subject) -> Scores:
        prompts = subject.task.splits[f"prompts_{subject.sizes['judge']}"]
        real = subject.task.splits["holdout"]
        if prompts.other is None or real.other is None:
            raise Inapplicable("prompts and images have labels of one domain only")
        second = _second_judge(subject)
        samples, classes = subject.samples()
        assert classes is not None
        forgotten = torch.full((subject.sizes["class_samples"],), subject.task.forget_class)  # type: ignore[arg-type]
        asked = [torch.stack([c, prompts.other[subject.prompts(c)]], 1) for c in (classes, forgotten)]
        evaluate = subject.batches.evaluate
        images = (samples, forget_samples(subject, "class samples"))
        seen = [np.stack([evaluate(j, x).argmax(1) for j in (subject.judge, second)], 1) for x in images]
        return {
            "retained": np.stack([asked[0].numpy(), seen[0]], 2),  # (n, domain, asked or seen)
            "forgotten": np.stack([asked[1].numpy(), seen[1]], 2),
            "second_right": (evaluate(second, real.x).argmax(1) == real.other.numpy()).astype(float),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        both = np.concatenate([scores["retained"], scores["forgotten"]])
        asked, seen = ({"own": both[:, 0, k], "other": both[:, 1, k]} for k in (0, 1))
        member = subject.task.forget_class
        assert member is not None
        without = domain_accuracies(asked, seen, "own", member)
        with_forgotten = domain_accuracies(asked, seen, "own", member, with_forgotten=True)
        return {
            "in_domain": without["in_domain"],
            "cross_domain": without["cross_domain"],
            "cross_domain_with_forgotten": with_forgotten["cross_domain"],
            "second_judge": float(scores["second_right"].mean()),
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        retained, forgotten = len(scores["retained"]), len(scores["forgotten"])
        for name in ACCURACIES:
            n = retained + (forgotten if name == ACCURACIES[-1] else 0)
            rows.append(
                Metric.jackknife(
                    name, values[name], n, replicates[name], over="samples", bounds=(0.0, 1.0), direction="max"
                )
            )
        return [*rows, Metric.share("second_judge", values["second_judge"], len(scores["second_right"]))]


def _second_judge(subject: Subject) -> Judge:
    images = subject.task.splits[f"judge_{subject.sizes['judge']}"]
    channels, classes = images.x.shape[1], int(images.other.max()) + 1

    def make() -> np.ndarray:
        assert images.other is not None
        return to_array(train_judge(images.x, images.other, SEED, STEPS))

    return from_array(subject.keep("second judge", make), channels, classes)
