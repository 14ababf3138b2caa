"""Noise injection: does the model rebuild a forgotten image from a noised copy of it?

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034 (injection protocol): noise the
forgotten image to step t, denoise it, compare with the original; here by the Pearson correlation of pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from evaluators.base import Evaluator, Metric, Scores, Subject, correlation
from evaluators.statistics import clopper_pearson, t_interval

HIT = 0.9  # correlation from which on a reconstruction counts as the forgotten image


class Reconstruction(Evaluator):
    """Correlation and hit rate of reconstructions from step `injection_t` in `injection_steps`; arXiv:2503.01034."""

    name = "reconstruction"
    kinds = frozenset({"points"})
    directions = {"correlation": "target", "hits": "target"}
    needs = "forget set"
    cost = "`noises` x `injection_steps` passes per distinct image"

    def scores(self, subject: Subject) -> Scores:
        images = subject.task.splits["forget"].distinct()
        seeds = subject.seeds("injection", subject.sizes["noises"])
        columns = [correlation(*subject.rebuilt(images, i, seeds)) for i in range(len(images))]
        return {"correlation": torch.stack(columns, 1).numpy()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        r = scores["correlation"]
        return {"correlation": float(r.mean()), "hits": float((r > HIT).mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        r = scores["correlation"]
        values = self.values(scores, subject)
        per_noise = r.mean(1)
        se, lo, hi = t_interval(per_noise)
        # draws of noise are the independent units: a draw hits if it rebuilds any forgotten image
        hits = int((r > HIT).any(1).sum())
        low, high = clopper_pearson(hits, len(r))
        return [
            Metric("correlation", values["correlation"], len(r), se, lo, hi, "student-t over noise draws"),
            Metric("hits", hits / len(r), len(r), None, low, high, "clopper-pearson"),
        ]
