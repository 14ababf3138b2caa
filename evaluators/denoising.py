"""Denoising losses of forgotten and of retained images, on one bank of noise shared by all images and models.

The loss of an image is the mean over the diffusion timesteps `loss_t` and `loss_noises` noises of the squared error of
the network's own output (epsilon or v), mean over elements. A forgotten image that the model still knows has a loss far
below the oracle's; a loss above the oracle's is over-forgetting, not more forgetting.

What a model answers under a label or a prompt that it has never seen is left to chance, so oracles differ in the loss of
forgotten images of a class. Without the label (`unlabelled_log_loss`, in the unconditional branch, which every oracle has
trained) they hardly do, and an edit of the path of the label hides nothing.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Images, Metric, Scores, Subject


class Denoising(Evaluator):
    """Mean and log-mean denoising loss by split, and of a forgotten class without its label; the training objective of Ho et al., arXiv:2006.11239."""

    name = "denoising"
    directions: ClassVar[dict[str, Direction]] = {
        "forget_loss": "target",
        "forget_log_loss": "target",
        "retain_loss": "min",
        "unlabelled_log_loss": "target",
    }
    needs = "forget and retain sets"
    cost = "`loss_noises` passes per image and step of `loss_t`"

    def scores(self, subject: Subject) -> Scores:
        forget, retain = subject.task.splits["forget"].distinct(), subject.task.splits["retain"]
        n = subject.sizes["loss_images"]
        scores = {"forget": noise_by_step(subject, forget, n), "retain": noise_by_step(subject, retain, n)}
        if subject.classed and subject.model.unconditional(1) is not None:
            scores["unlabelled"] = noise_by_step(subject, forget, n, labelled=False)
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        forget = float(scores["forget"].mean())
        values = {
            "forget_loss": forget,
            "forget_log_loss": float(np.log(forget)),
            "retain_loss": float(scores["retain"].mean()),
        }
        if "unlabelled" in scores:
            values["unlabelled_log_loss"] = float(np.log(scores["unlabelled"].mean()))
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        for key in ("forget", "retain"):
            name, units = f"{key}_loss", scores[key].mean(1)
            rows.append(Metric.mean(name, values[name], units, over="noise draws", direction=self.directions[name]))
        logs = [name for name in values if name.endswith("_log_loss")]
        n = len(scores["forget"])
        return rows + [Metric.jackknife(name, values[name], n, replicates[name], over="noise draws") for name in logs]


def noise_by_step(subject: Subject, images: Images, limit: int, labelled: bool = True) -> np.ndarray:
    """Losses (loss_noises, len(loss_t)), mean over at most `limit` images: the units are draws of noise.

    labelled: whether the model gets the labels of the images; if not, its unconditional branch answers.
    """
    return _losses(subject, images, limit, labelled).mean(2)


@torch.no_grad()
def _losses(subject: Subject, images: Images, limit: int, labelled: bool) -> np.ndarray:
    """Losses (loss_noises, len(loss_t), images) on the shared noise bank."""
    model, sizes = subject.model, subject.sizes
    grid = sizes["loss_t"]
    bank = model.noise(subject.seeds("loss", sizes["loss_noises"]))
    images = subject.inputs(images.take(torch.arange(min(limit, len(images)))))
    x = images.x.to(bank)
    given = images.cond if labelled else model.unconditional(len(x))
    cond = None if given is None else given.to(bank.device)
    model.net.eval()
    out = np.empty((len(bank), len(grid), len(x)))
    for j, t in enumerate(grid):
        # all noises of a timestep in one pass: rows are (noise, image) pairs
        eps = bank.repeat_interleave(len(x), 0)
        x0 = x.repeat(len(bank), 1, 1, 1)
        c = None if cond is None else cond.repeat(len(bank), *[1] * (cond.dim() - 1))
        errors = []
        for i in range(0, len(x0), 500):
            rows = slice(i, i + 500)
            times = torch.full((len(x0[rows]),), t, device=x.device)
            output = model.predict(model.add_noise(x0[rows], eps[rows], times), times, None if c is None else c[rows])
            errors.append((output - model.target(x0[rows], eps[rows], times)).double().square().flatten(1).mean(1))
        out[:, j] = torch.cat(errors).view(len(bank), len(x)).cpu().numpy()
    return out
