"""What a contrastive model (CLIP) makes of real images, asked by its own two encoders.

Source: zero-shot classification of Radford et al., arXiv:2103.00020, as Cai et al. (SLUG, ICML 2025, arXiv:2407.11867) use
it: forget accuracy is the share of images of the forgotten class whose text is nearest (FA@1), or among the five nearest
(FA@5). A class's text is the normalised mean of its prompts' normalised embeddings. Images are those of the tier's judge,
which nothing was trained on by search or audit; prompts are the tier's, too.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from evaluators.base import BATCHES, Direction, Evaluator, Images, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, t_interval


class Contrast(Evaluator):
    """Zero-shot accuracy on the forgotten class and on the others, and how near forgotten pairs still are; arXiv:2407.11867."""

    name = "contrast"
    model_kinds = frozenset({"contrastive"})
    kinds = frozenset({"concept"})
    directions: ClassVar[dict[str, Direction]] = {
        "recognised": "target", "recognised_top5": "target", "unlearning_accuracy": "target", "retain_accuracy": "max",
        "retain_loss": "min", "forget_similarity": "target", "validity": "max",
    }  # fmt: skip
    needs = "labelled images of every class, prompts"
    cost = "two encoders, once"

    def scores(self, subject: Subject) -> Scores:
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        logits = subject.once("zero-shot", lambda: zero_shot(subject, split))
        truth = split.groups.numpy()
        mine = truth == subject.task.forget_class
        own = logits[np.arange(len(truth)), truth]
        rank = (logits > own[:, None]).sum(1)
        likelihood = own - np.logaddexp.reduce(logits, axis=1)
        return {
            "forget_rank": rank[mine],
            "retain_rank": rank[~mine],
            "retain_class": truth[~mine],
            "retain_loss": -likelihood[~mine],
            "similarity": similarities(subject, subject.task.splits["forget"].distinct()),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        right = scores["retain_rank"] == 0
        by_class = [right[scores["retain_class"] == c].mean() for c in np.unique(scores["retain_class"])]
        recognised = float((scores["forget_rank"] == 0).mean())
        return {
            "recognised": recognised,
            "recognised_top5": float((scores["forget_rank"] < 5).mean()),
            "unlearning_accuracy": 1 - recognised,
            "retain_accuracy": float(np.mean(by_class)),
            "retain_loss": float(scores["retain_loss"].mean()),
            "forget_similarity": float(scores["similarity"].mean()),
            "validity": float(right.mean()),
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        for name, value in values.items():
            direction = self.directions[name]
            if name in ("retain_loss", "forget_similarity"):
                each = scores["retain_loss" if name == "retain_loss" else "similarity"]
                se, lo, hi = t_interval(each)
                rows.append(Metric(name, value, len(each), se, lo, hi, "student-t over images", direction))
                continue
            n = len(scores["retain_rank" if name in ("retain_accuracy", "validity") else "forget_rank"])
            lo, hi = clopper_pearson(round(value * n), n)
            rows.append(Metric(name, value, n, None, lo, hi, "clopper-pearson", direction))
        return rows


@torch.no_grad()
def zero_shot(subject: Subject, images: Images) -> np.ndarray:
    """Scaled cosines (n, classes), float64, of images with the text of every class."""
    model = subject.model
    model.net.eval()
    prompts = subject.task.splits[f"prompts_{subject.sizes['judge']}"]
    texts = F.normalize(model.encode_text(prompts.cond.to(model.device)), dim=-1)
    classes = range(int(prompts.groups.max()) + 1)
    means = torch.stack([F.normalize(texts[prompts.groups == c].mean(0), dim=0) for c in classes])

    def part(rows: slice) -> torch.Tensor:
        x = images.x[rows].to(model.device, model.dtype)
        return (model.logit_scale * F.normalize(model.encode_image(x), dim=-1) @ means.T).double().cpu()

    return torch.cat(BATCHES.map(part, len(images))).numpy()


@torch.no_grad()
def similarities(subject: Subject, images: Images) -> np.ndarray:
    """Cosine (n,), float64, of each image with its own caption."""
    model = subject.model
    model.net.eval()
    assert images.cond is not None
    v = model.encode_image(images.x.to(model.device, model.dtype))
    return F.cosine_similarity(v, model.encode_text(images.cond.to(model.device))).double().cpu().numpy()
