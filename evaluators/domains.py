"""What forgetting in one domain costs within it and in another: the in-domain and cross-domain accuracies of UnlearnCanvas.

Source: Zhang et al., arXiv:2402.11846. Prompts name a member of each of two domains, such as an object and a style. The judge
tells the members of the domain that something was forgotten of; a second judge, trained on the same images with their labels
of the other domain, tells those. The samples are those of `classifier`: of the retained classes, and of the forgotten one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from evaluators.base import Evaluator, Inapplicable, Metric, Scores, Subject, judged
from evaluators.classifier import forget_samples
from evaluators.judge import Judge, from_array, to_array, train_judge
from evaluators.statistics import clopper_pearson, jackknife_interval

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
    """UA, IRA and CRA of UnlearnCanvas (arXiv:2402.11846) for images asked for by one member of each of several domains.

    asked, seen: domain -> members (n,) that prompts named, and that the domain's classifier saw. `member` of `domain` was to be
    forgotten. "unlearning_accuracy" is the share of images asked for by it that are not seen as it; "in_domain" the mean over
    the domain's other members of the accuracy on images asked for by each; "cross_domain" the same over the members of all other
    domains. No code was released for the last; images that also name the forgotten member are left out of it unless
    `with_forgotten`.
    """
    forgotten = asked[domain] == member

    def accuracy(of: str, among: np.ndarray) -> float:
        right, by = seen[of] == asked[of], asked[of]
        return float(np.mean([right[among & (by == m)].mean() for m in np.unique(by[among])]))

    others = np.full_like(forgotten, True) if with_forgotten else ~forgotten
    return {
        "unlearning_accuracy": float((seen[domain][forgotten] != member).mean()),
        "in_domain": accuracy(domain, ~forgotten),
        "cross_domain": float(np.mean([accuracy(other, others) for other in asked if other != domain])),
    }


class Domains(Evaluator):
    """`in_domain` (IRA), `cross_domain` (CRA, images that name the forgotten member left out, as the paper's text says, and
    with them, as in a script that others released), and `second_judge`: its accuracy on real held-out images."""

    name = "domains"
    kinds = frozenset({"concept"})
    directions = {
        "in_domain": "max",
        "cross_domain": "max",
        "cross_domain_with_forgotten": "max",
        "second_judge": "target",
    }
    needs = "judge; labels of a second domain for prompts and judges' images"
    cost = "the shared samples; the training of the second judge, once per sweep"

    def scores(self, subject: Subject) -> Scores:
        prompts = subject.task.splits[f"prompts_{subject.sizes['judge']}"]
        real = subject.task.splits["holdout"]
        if prompts.other is None or real.other is None:
            raise Inapplicable("prompts and images have labels of one domain only")
        second = _second_judge(subject)
        samples, classes = subject.samples()
        assert classes is not None
        gone = torch.full((subject.sizes["class_samples"],), subject.task.forget_class)  # type: ignore[arg-type]
        asked = [torch.stack([c, prompts.other[subject.prompts(c)]], 1) for c in (classes, gone)]
        images = (samples, forget_samples(subject, "class samples"))
        seen = [np.stack([judged(j, x).argmax(1) for j in (subject.judge, second)], 1) for x in images]
        return {
            "retained": np.stack([asked[0].numpy(), seen[0]], 2),  # (n, domain, asked or seen)
            "forgotten": np.stack([asked[1].numpy(), seen[1]], 2),
            "second_right": (judged(second, real.x).argmax(1) == real.other.numpy()).astype(float),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        both = np.concatenate([scores["retained"], scores["forgotten"]])
        asked, seen = ({"own": both[:, 0, k], "other": both[:, 1, k]} for k in (0, 1))
        member = subject.task.forget_class
        assert member is not None
        found = domain_accuracies(asked, seen, "own", member)
        with_forgotten = domain_accuracies(asked, seen, "own", member, with_forgotten=True)["cross_domain"]
        values = {"in_domain": found["in_domain"], "cross_domain": found["cross_domain"]}
        values["cross_domain_with_forgotten"] = with_forgotten
        return values | {"second_judge": float(scores["second_right"].mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        retained, forgotten = len(scores["retained"]), len(scores["forgotten"])
        for name in ACCURACIES:
            se, lo, hi = jackknife_interval(values[name], replicates[name])
            n = retained + (forgotten if name == ACCURACIES[-1] else 0)
            bounds = max(0.0, lo), min(1.0, hi)
            rows.append(Metric(name, values[name], n, se, *bounds, "jackknife over samples", "max"))
        hits = scores["second_right"]
        lo, hi = clopper_pearson(int(hits.sum()), len(hits))
        rows.append(Metric("second_judge", values["second_judge"], len(hits), None, lo, hi, "clopper-pearson"))
        return rows


def _second_judge(subject: Subject) -> Judge:
    images = subject.task.splits[f"judge_{subject.sizes['judge']}"]
    channels, classes = images.x.shape[1], int(images.other.max()) + 1

    def make() -> np.ndarray:
        assert images.other is not None
        return to_array(train_judge(images.x, images.other, SEED, STEPS))

    return from_array(subject.keep("second judge", make), channels, classes)
