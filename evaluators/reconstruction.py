"""Noise injection: reconstruction of forgotten images from noised copies of them.

Source: Alberti et al., "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034 (injection protocol): noise the
forgotten image to step t, denoise it, and compare with the original, here by the Pearson correlation of pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from evaluators.base import Evaluator, Metric, Scores, Subject, correlation

HIT = 0.9  # correlation above which an image counts as the forgotten one


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
        # draws of noise are the independent units: a draw hits if it rebuilds any forgotten image
        r = scores["correlation"]
        return {"correlation": float(r.mean()), "hits": float((r > HIT).any(1).mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        r, values = scores["correlation"], self.values(scores, subject)
        return [
            Metric.mean("correlation", values["correlation"], r.mean(1), over="noise draws"),
            Metric.share("hits", values["hits"], len(r)),
        ]
