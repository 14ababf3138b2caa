"""Prompts that come with seeds: the share of them that bring the forgotten concept back, drawn as their list says.

Such lists are I2P (Schramowski et al., CVPR 2023, arXiv:2211.05105) and those of UnlearnDiffAtk (Zhang et al., ECCV 2024,
arXiv:2310.11868) and Ring-A-Bell (Tsai et al., ICLR 2024, arXiv:2310.10012). Seeds and guidance of a list are public, and a model could
be made for these very draws. The share is therefore a number to set beside those of papers and no view of the residue; the other
checks draw the same prompts with seeds that nobody knows beforehand.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Inapplicable, Metric, Scores, Subject

PUBLIC = "seeds from the file of prompts: public before the audit, not drawn for it"


class Published(Evaluator):
    """Share of prompts for the forgotten concept, each drawn once with its own seed, in whose image the judge sees it.

    An image's noise is that of diffusers' pipelines for the seed, its guidance that of the prompt, else the task's, and its number of
    steps the task's: every audit of a model repeats the same images. Sampler and judge are those of the task; papers have others.
    """

    name = "published"
    kinds = frozenset({"concept"})
    directions: ClassVar[dict[str, Direction]] = {"recognised": "target"}
    needs = "judge; prompts of the audit with seeds of their own (`seed` of a prompt file)"
    cost = "one sample per such prompt of the forgotten concept"

    def scores(self, subject: Subject) -> Scores:
        images = published_images(subject)
        if images is None:
            raise Inapplicable("no prompt for the forgotten concept has a seed of its own (`seed` in audit_prompts)")
        return {"taken_for": subject.logits(images).argmax(1)}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        return {"recognised": float((scores["taken_for"] == subject.task.forget_class).mean())}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        value, n = self.values(scores, subject)["recognised"], len(scores["taken_for"])
        return [Metric.share("recognised", value, n, over="prompts", reason=PUBLIC)]


def published_images(subject: Subject) -> torch.Tensor | None:
    """An image (n, C, H, W) of each of the tier's prompts for the forgotten concept that has a seed; None if none has."""
    prompts = subject.task.splits.get(f"prompts_{subject.sizes['judge']}")
    if prompts is None or prompts.seeds is None:
        return None
    rows = ((prompts.groups == subject.task.forget_class) & (prompts.seeds >= 0)).nonzero()[:, 0]
    return subject.once("published", lambda: drawn(subject, prompts.take(rows))) if len(rows) else None


def drawn(subject: Subject, prompts: Any) -> torch.Tensor:
    """An image of each prompt of a split with its seed and guidance, (n, C, H, W); prompts of equal guidance are drawn together."""
    settings = subject.task.sampling
    guidance = prompts.guidance.nan_to_num(settings["guidance"])
    alike = [(guidance == value).nonzero()[:, 0] for value in guidance.unique()]
    parts = [
        subject.generate(
            prompts.cond[rows],
            prompts.seeds[rows],
            steps=settings["steps"],
            guidance=float(guidance[rows[0]]),
            as_pipeline=True,
        )
        for rows in alike
    ]
    return torch.cat(parts)[torch.cat(alike).argsort()]
