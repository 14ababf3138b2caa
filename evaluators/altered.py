"""Altered forgotten images: whether a model knows one as its mirror image, negative, shifted or cropped.

A model that was tuned against the checks of the very image can keep it in another form, from which anyone gets it back. Each
check of the image itself would then find nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from evaluators.base import Evaluator, Metric, Scores, Subject, correlation
from evaluators.reconstruction import HIT

SHIFT = 1 / 8  # of height and width
CROP = 3 / 4  # of height and width that remain
LEAST = 4  # draws of noise per alteration


def mirrored(x: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) with left and right exchanged."""
    return x.flip(-1)


def negative(x: torch.Tensor) -> torch.Tensor:
    """The negatives of images (n, C, H, W) in [-1, 1]."""
    return -x


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Images (n, C, H, W) moved down and to the right by an eighth, their first row and column repeated at the border."""
    down, right = (max(1, round(SHIFT * size)) for size in x.shape[-2:])
    return F.pad(x, (right, 0, down, 0), mode="replicate")[..., : x.shape[-2], : x.shape[-1]]


def cropped(x: torch.Tensor) -> torch.Tensor:
    """The centres of images (n, C, H, W), three quarters of height and width, enlarged to the whole."""
    height, width = (max(2, round(CROP * size)) for size in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    part = x[..., top : top + height, left : left + width]
    return F.interpolate(part, size=tuple(x.shape[-2:]), mode="bilinear", align_corners=False)


ALTERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mirror": mirrored,
    "negative": negative,
    "shift": shifted,
    "crop": cropped,
}


class Altered(Evaluator):
    """Reconstruction and generation of altered forgotten images.

    Each alteration is noised and denoised as by `reconstruction` (arXiv:2503.01034), with its share of the noises.
    `presence@ALTERATION` is the mean correlation of what the model rebuilds with it, `presence` the largest of these, and `rate`
    the share of samples that correlate with any alteration by more than 0.9.
    """

    name = "altered"
    kinds = frozenset({"points"})
    directions = {"presence": "target", "rate": "target"}
    needs = "forget set"
    cost = "`noises` x `injection_steps` passes per distinct image, and the shared samples"

    def scores(self, subject: Subject) -> Scores:
        images = subject.task.splits["forget"].distinct()
        seeds = subject.seeds("altered", max(subject.sizes["noises"], LEAST * len(ALTERATIONS)))
        # neighbouring noises belong to one alteration, so that leaving a group of units out thins out all of them alike
        kind = np.arange(len(seeds)) * len(ALTERATIONS) // len(seeds)
        rebuilt, near = np.empty((len(seeds), len(images))), []
        samples, _ = subject.samples()
        for k, alter in enumerate(ALTERATIONS.values()):
            others = replace(images, x=alter(images.x))
            for i in range(len(images)):
                rebuilt[kind == k, i] = correlation(*subject.rebuilt(others, i, seeds[kind == k])).numpy()
            near.append(torch.stack([correlation(samples, x.unsqueeze(0)) for x in others.x], 1).amax(1))
        return {"alteration": kind[:, None], "correlation": rebuilt, "nearest": torch.stack(near, 1).numpy()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        by_kind = {name: float(self._units(scores, k).mean()) for k, name in enumerate(ALTERATIONS)}
        return {
            "presence": max(by_kind.values()),
            "rate": float((scores["nearest"] > HIT).any(1).mean()),
            **{f"presence@{name}": value for name, value in by_kind.items()},
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, n = self.values(scores, subject), len(scores["correlation"])
        return [
            Metric.jackknife("presence", values["presence"], n, replicates["presence"], over="noise draws"),
            Metric.share("rate", values["rate"], len(scores["nearest"])),
            *(
                Metric.mean(f"presence@{name}", values[f"presence@{name}"], self._units(scores, k), over="noise draws")
                for k, name in enumerate(ALTERATIONS)
            ),
        ]

    @staticmethod
    def _units(scores: Scores, kind: int) -> np.ndarray:
        """Correlation per draw of noise (m,) with one alteration, mean over images."""
        means: np.ndarray = scores["correlation"][scores["alteration"][:, 0] == kind].mean(1)
        return means
