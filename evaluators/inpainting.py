"""Inpainting: part of a forgotten picture is given, and the model draws the rest.

Source: visual context, Lu et al., "When Are Concepts Erased From Diffusion Models?", NeurIPS 2025, arXiv:2505.17013. The known part is
put in place as in RePaint (Lugmayr et al., CVPR 2022, arXiv:2201.09865, eq. 8): before each step of the model's own sampler, noised to
the level of that step. RePaint draws that noise anew at each step and repeats steps to harmonise both parts; here the noise is that from
which the run begins, and each step is made once. The paper masks objects that a detector finds; here halves and corners are given, in
turn, so that no detector has a say. What is not given cannot have an influence, not even by the encoder of a latent model.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from evaluators.base import Subject
from evaluators.durability import NULL, Attacked, Durability, recognised

SHARES = {"half given": 1 / 2, "quarter given": 1 / 4}


class Inpainting(Durability):
    """The model completes forgotten pictures, with and without the label; after arXiv:2505.17013 and arXiv:2201.09865.

    A model that only avoids what it is asked for may still complete it in the unconditional branch, where oracles are also alike.
    Presence is the share of completed pictures in which the judge sees the class, or the correlation with the forgotten image in the
    part that was not given. The null gives as much of a retained or, for images, of a held-out picture.
    """

    name = "inpainting"
    cost = "`class_samples` samples, or `noises` per forgotten image, per strength and for the null"

    def attacks(self, subject: Subject) -> dict[str, Attacked]:
        complete = _completed_class if subject.classed else _completed_images
        unrelated = "retain" if subject.classed else "forget_holdout"
        given: dict[str, Attacked] = {f"{NULL}half of another": partial(complete, unrelated, 1 / 2)}
        given |= {name: partial(complete, "forget", share) for name, share in SHARES.items()}
        if subject.classed and subject.model.unconditional(1) is not None:
            given["half given, no label"] = partial(_completed_class, "forget", 1 / 2, labelled=False)
        return given


def known_part(count: int, size: tuple[int, int], share: float) -> torch.Tensor:
    """Masks (count, 1, H, W), True in the part that is given: the left, right, upper and lower half (share 1/2), or the corners
    (1/4), in turn."""
    height, width = size
    upper, left = torch.arange(height)[:, None] < height // 2, torch.arange(width)[None] < width // 2
    if share == 1 / 2:
        parts = [part.expand(height, width) for part in (left, ~left, upper, ~upper)]
    else:
        parts = [vertical & horizontal for vertical in (upper, ~upper) for horizontal in (left, ~left)]
    return torch.stack(parts)[torch.arange(count) % len(parts), None]


def hidden_correlation(x: torch.Tensor, y: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Pearson correlation, (n,), of images (n, C, H, W) over the elements that the masks `known` (n, 1, H, W) leave open."""
    weight = (~known).double().expand(x.shape).flatten(1)

    def centred(images: torch.Tensor) -> torch.Tensor:
        values = images.double().flatten(1)
        return (values - (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)) * weight

    a, b = centred(x), centred(y)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


def _completed_class(split: str, share: float, subject: Subject, labelled: bool = True) -> np.ndarray:
    """Whether the judge sees the forgotten class in each completed picture of a split, (n,).

    labelled: under the forgotten label, else in the unconditional branch.
    """
    n, images = subject.sizes["class_samples"], subject.task.splits[split].distinct()
    x0 = images.x[_spread(len(images), n)]
    cond = subject.forgotten(n) if labelled else subject.model.unconditional(n)
    return recognised(subject, subject.complete(x0, _known(x0, share), cond, subject.seeds("durability", n)))


def _completed_images(split: str, share: float, subject: Subject) -> np.ndarray:
    """Correlation with what was not given, per draw of noise (n,): mean over the forgotten images, or each with another image."""
    n, images = subject.sizes["noises"], subject.task.splits[split].distinct()
    seeds = subject.seeds("durability", n)
    each = [torch.full((n,), i) for i in range(len(images))] if split == "forget" else [_spread(len(images), n)]
    columns = []
    for pictures in map(images.take, each):
        known = _known(pictures.x, share)
        drawn = subject.complete(pictures.x, known, pictures.cond, seeds)
        columns.append(hidden_correlation(drawn, pictures.x, known))
    return torch.stack(columns, 1).mean(1).numpy()


def _known(x: torch.Tensor, share: float) -> torch.Tensor:
    return known_part(len(x), (x.shape[-2], x.shape[-1]), share)


def _spread(length: int, count: int) -> torch.Tensor:
    """`count` indices, spread evenly over `length` rows; in turn if there are fewer."""
    index = torch.arange(count)
    return index * length // count if length > count else index % length
