"""Zero-shot recognition of real images by a contrastive model (CLIP) with its own two encoders.

Source: zero-shot classification of Radford et al., arXiv:2103.00020, as Cai et al. (SLUG, ICML 2025, arXiv:2407.11867) use
it: forget accuracy is the share of images of the forgotten class whose text is nearest (FA@1), or among the five nearest
(FA@5). The text of a class is the normalised mean of its prompts' normalised embeddings. Images are those of the tier's
judge, on which nothing was trained by search or audit; prompts are also the tier's.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from evaluators.base import Direction, Evaluator, Images, Metric, Scores, Subject


class Contrast(Evaluator):
    """Zero-shot accuracy on the forgotten and the other classes, and similarity of forgotten pairs; arXiv:2407.11867."""

    name = "contrast"
    model_kinds = frozenset({"contrastive"})
    kinds = frozenset({"concept"})
    directions: ClassVar[dict[str, Direction]] = {
        "recognised": "target",
        "recognised_top5": "target",
        "unlearning_accuracy": "target",
        "retain_accuracy": "max",
        "retain_loss": "min",
        "forget_similarity": "target",
        "validity": "max",
    }
    needs = "labelled images of every class, prompts"
    cost = "two encoders, once"

    def scores(self, subject: Subject) -> Scores:
        split = subject.task.splits[f"judge_{subject.sizes['judge']}"]
        logits = subject.once("zero-shot", lambda: zero_shot(subject, split))
        truth = split.groups.numpy()
        forgotten = truth == subject.task.forget_class
        true_logits = logits[np.arange(len(truth)), truth]
        rank = (logits > true_logits[:, None]).sum(1)
        likelihood = true_logits - np.logaddexp.reduce(logits, axis=1)
        return {
            "forget_rank": rank[forgotten],
            "retain_rank": rank[~forgotten],
            "retain_class": truth[~forgotten],
            "retain_loss": -likelihood[~forgotten],
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
        units = {"retain_loss": "retain_loss", "forget_similarity": "similarity"}
        retained = ("retain_accuracy", "validity")
        rows = []
        for name, value in self.values(scores, subject).items():
            direction = self.directions[name]
            if name in units:
                rows.append(Metric.mean(name, value, scores[units[name]], over="images", direction=direction))
            else:
                n = len(scores["retain_rank" if name in retained else "forget_rank"])
                rows.append(Metric.share(name, value, n, direction=direction))
        return rows


@torch.no_grad()
def zero_shot(subject: Subject, images: Images) -> np.ndarray:
    """Scaled cosines, float64 (n, classes), of images with the text of every class."""
    model = subject.model
    model.net.eval()
    prompts = subject.task.splits[f"prompts_{subject.sizes['judge']}"]
    texts = F.normalize(model.encode_text(prompts.cond.to(model.device)), dim=-1)
    classes = range(int(prompts.groups.max()) + 1)
    means = torch.stack([F.normalize(texts[prompts.groups == c].mean(0), dim=0) for c in classes])

    def part(rows: slice) -> torch.Tensor:
        x = images.x[rows].to(model.device, model.dtype)
        return (model.logit_scale * F.normalize(model.encode_image(x), dim=-1) @ means.T).double().cpu()

    return torch.cat(subject.batches.map(part, len(images))).numpy()


@torch.no_grad()
def similarities(subject: Subject, images: Images) -> np.ndarray:
    """Cosine, float64 (n,), of each image with its caption."""
    model = subject.model
    model.net.eval()
    assert images.cond is not None
    v = model.encode_image(images.x.to(model.device, model.dtype))
    return F.cosine_similarity(v, model.encode_text(images.cond.to(model.device))).double().cpu().numpy()
