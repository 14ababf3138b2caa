"""Relearning: how much of the forgotten thing is back after a few steps on a few of its images?

A copy of the model is fine-tuned for `relearn_steps` Adam steps on at most 10 forgotten images. The number means nothing
by itself: an oracle that never saw the images relearns them, too. Faster than the oracle is residue; slower is damage.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from evaluators.base import Evaluator, Metric, Scores, Subject, correlation, judged
from evaluators.classifier import forget_samples
from evaluators.statistics import clopper_pearson, t_interval

IMAGES = 10
BATCH = 32
LR = 3e-4


class Relearning(Evaluator):
    """Recognised share (a class) or injection correlation (images) after relearning; after arXiv:2410.08074."""

    name = "relearning"
    directions = {"recognised": "target", "correlation": "target"}
    needs = "forget set"
    cost = "`relearn_steps` optimiser steps of 32 rows, then samples"

    def scores(self, subject: Subject) -> Scores:
        taught = Subject(relearned(subject), subject.task, subject.judge, subject.sizes, subject.seeds)
        if subject.task.kind == "class":
            return {"class": judged(subject.judge, forget_samples(taught, "relearned samples")).argmax(1)}
        n = subject.sizes["noises"]
        x0 = subject.task.splits["forget"].distinct().x[:1].expand(n, -1, -1, -1)
        seeds = subject.seeds("relearned injection", n)
        rebuilt = taught.model.reconstruct(x0, seeds, subject.sizes["injection_t"], subject.sizes["injection_steps"])
        return {"correlation": correlation(rebuilt, x0).numpy()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        if "class" in scores:
            return {"recognised": float((scores["class"] == subject.task.forget_class).mean())}
        return {"correlation": float(scores["correlation"].mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        if "class" in scores:
            hits = scores["class"] == subject.task.forget_class
            lo, hi = clopper_pearson(int(hits.sum()), len(hits))
            return [Metric("recognised", float(hits.mean()), len(hits), None, lo, hi, "clopper-pearson")]
        r = scores["correlation"]
        se, lo, hi = t_interval(r)
        return [Metric("correlation", float(r.mean()), len(r), se, lo, hi, "student-t over noise draws")]


def relearned(subject: Subject):
    """A copy of the subject's model after `relearn_steps` steps on at most 10 forgotten images."""
    images = subject.task.splits["forget"].distinct()
    x, cond = images.x[:IMAGES], None if images.cond is None else images.cond[:IMAGES]
    model = copy.copy(subject.model)
    model.net = copy.deepcopy(subject.model.net).train()
    optimizer = torch.optim.Adam(model.net.parameters(), lr=LR)
    seeds = subject.seeds("relearning", BATCH * subject.sizes["relearn_steps"])
    for step in range(subject.sizes["relearn_steps"]):
        mine = seeds[step * BATCH : (step + 1) * BATCH]
        rows = torch.arange(BATCH) % len(x)
        t = (model.uniform(mine, 1)[:, 0] * len(model.alphas)).long()
        eps = model.noise(mine)
        x0, labels = x[rows].to(eps), None if cond is None else cond[rows].to(eps.device)
        output = model.predict(model.add_noise(x0, eps, t), t, labels)
        loss = (output - model.target(x0, eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model
