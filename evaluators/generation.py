"""Generation of a forgotten image from pure noise.

The generation rate is the share of samples whose pixel correlation with a forgotten image exceeds 0.9. Its interval is exact
(Clopper-Pearson): after zero hits in n samples a rate up to about 3/n remains possible.
"""

from __future__ import annotations

import numpy as np
import torch

from evaluators.base import Evaluator, Metric, Scores, Subject, correlation
from evaluators.reconstruction import HIT


class Generation(Evaluator):
    """Share of samples that reproduce a forgotten image; after Carlini et al., arXiv:2301.13188 (extraction)."""

    name = "generation"
    kinds = frozenset({"points"})
    directions = {"rate": "target"}
    needs = "forget set"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        samples, _ = subject.samples()
        images = subject.task.splits["forget"].distinct().x
        nearest = torch.stack([correlation(samples, image.unsqueeze(0)) for image in images], 1).amax(1)
        return {"nearest": nearest.numpy()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        return {"rate": float((scores["nearest"] > HIT).mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        return [Metric.share("rate", self.values(scores, subject)["rate"], len(scores["nearest"]))]
