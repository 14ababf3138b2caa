"""Copies of training images: reconstructions from noise, samples too close to a training image, copies detected by SSCD.

Every count has its control on images that were never trained on: a sample is close to a held-out image only by chance.
"""

from __future__ import annotations

import numpy as np
import torch

from evaluators.base import Evaluator, Images, Metric, Scores, Subject, correlation
from evaluators.classifier import forget_samples
from evaluators.external import SSCD, network

NEIGHBOURS = 50
ALPHA = 0.5
QUANTILE = 0.999
FAR = 1e3  # calibrated distance of an image that is not the nearest


class Recall(Evaluator):
    """Reconstruction of forgotten images and of held-out images of the same kind, over the whole range of noise levels.

    After the injection protocol of SISS (arXiv:2503.01034), at every step of `recall_t` instead of one. `excess` is the mean
    over steps of the difference in correlation between the two kinds; `reach` is the largest step, as a share of all, from
    which forgotten images are rebuilt better than 95 % of held-out ones. Units are draws of noise.
    """

    name = "recall"
    directions = {"excess": "target", "reach": "target"}
    needs = "forget set and its holdout"
    cost = "`recall_noises` reconstructions per image and step of `recall_t`"

    def scores(self, subject: Subject) -> Scores:
        limit = subject.sizes["recall_images"]
        scores = {"steps": np.array([[t / len(subject.model.alphas) for t in subject.sizes["recall_t"]]])}
        for name in ("forget", "forget_holdout"):
            images = subject.task.splits[name].distinct()
            scores[name] = rebuilt(subject, images.take(torch.arange(min(limit, len(images)))))
        return scores

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        forget, other = (scores[name].mean(0) for name in ("forget", "forget_holdout"))
        above = scores["steps"][0][forget.mean(1) > np.quantile(other, 0.95, axis=1)]
        return {"excess": float((forget.mean(1) - other.mean(1)).mean()), "reach": float(max(above, default=0.0))}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, n = self.values(scores, subject), len(scores["forget"])
        per_draw = scores["forget"].mean((1, 2)) - scores["forget_holdout"].mean((1, 2))
        return [
            Metric.mean("excess", values["excess"], per_draw, over="noise draws"),
            Metric("reach", values["reach"], n, reason="largest over steps, so without an interval"),
        ]


def rebuilt(subject: Subject, images: Images) -> np.ndarray:
    """Correlations (draws, steps, images) of `images` with the model's reconstructions of noised copies of them."""
    draws, count = subject.sizes["recall_noises"], len(images)
    seeds = subject.seeds("recall", draws)
    times, total = subject.sizes["recall_t"], len(subject.model.alphas)
    correlations = np.empty((draws, len(times), count))
    repeated, seeds = images.take(torch.arange(count).repeat(draws)), seeds.repeat_interleave(count)
    for column, t in enumerate(times):
        steps = max(1, round(subject.sampling_steps * t / total))
        reconstructions = subject.reconstruct(repeated.x, seeds, t, steps, repeated.cond)
        correlations[:, column] = correlation(reconstructions, repeated.x).view(draws, count).numpy()
    return correlations


class Neighbours(Evaluator):
    """Distances of samples to training images; extraction after Carlini et al., arXiv:2301.13188.

    A sample extracts an image if its pixel distance to it is below half of its mean distance to its 50 nearest training
    images and no other training or held-out image is nearer. For a class the samples are those under the forgotten label.
    `extracted` counts forgotten images, `rate` is the share of samples that extract one, and `holdout_rate` the share that
    "extract" an image that was never trained on, which only chance does. `log_ratio` is the mean log ratio of a retained
    sample's distance to the nearest retained image over that to the nearest of as many held-out ones: below 0, samples
    resemble what was trained on.
    """

    name = "neighbours"
    directions = {"extracted": "target", "rate": "target", "holdout_rate": "min", "log_ratio": "max"}
    needs = "forget and retain sets and the holdout of each"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        splits = subject.task.splits
        samples = subject.samples()[0]
        aimed = forget_samples(subject, "class samples") if subject.classed else samples
        train = distances(aimed, splits["train"].distinct().x)
        usual = np.sort(train, 1)[:, : min(NEIGHBOURS, train.shape[1])].mean(1, keepdims=True)
        retain, holdout = splits["retain"].distinct(), splits["holdout"].distinct()
        count = min(len(retain), len(holdout))
        near = [distances(samples, images.x[:count]).min(1) for images in (retain, holdout)]
        forget, other = (distances(aimed, splits[n].distinct().x) for n in ("forget", "forget_holdout"))
        nearest = np.minimum(train.min(1), other.min(1))[:, None]  # a sample can copy one image only
        return {
            "forget": np.where(forget <= nearest, forget / (ALPHA * usual), np.inf).clip(max=FAR),
            "forget_holdout": np.where(other <= nearest, other / (ALPHA * usual), np.inf).min(1).clip(max=FAR),
            "log_ratio": np.log(np.maximum(near[0], 1e-12) / np.maximum(near[1], 1e-12)),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        hits = scores["forget"] < 1
        return {
            "extracted": float(hits.any(0).sum()),
            "rate": float(hits.any(1).mean()),
            "holdout_rate": float((scores["forget_holdout"] < 1).mean()),
            "log_ratio": float(scores["log_ratio"].mean()),
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, n = self.values(scores, subject), len(scores["forget"])
        reason = f"of {scores['forget'].shape[1]} forgotten images, by {n} samples: more samples can only find more"
        return [
            Metric("extracted", values["extracted"], n, reason=reason),
            Metric.share("rate", values["rate"], n),
            Metric.share("holdout_rate", values["holdout_rate"], n, direction="min"),
            Metric.mean("log_ratio", values["log_ratio"], scores["log_ratio"], over="samples", direction="max"),
        ]


def distances(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Root mean square pixel differences, float64 (n, m), of images (n, ...) and (m, ...)."""
    x, y = a.double().flatten(1), b.double().flatten(1)
    return (torch.cdist(x, y) / x.shape[1] ** 0.5).numpy()


class CopyDetection(Evaluator):
    """Copies of forgotten images among samples and reconstructions, by SSCD (Pizzi et al., arXiv:2202.10261).

    Needs the authors' TorchScript file. A copy has a cosine similarity above the 99.9 % quantile of the similarities of
    held-out images with their most similar retained one, a threshold that fits the data; `above_half` is the share above
    0.5, which is common in the literature. `rebuilt` is the mean similarity of forgotten images with the model's
    reconstructions of copies noised to `injection_t`, the SISS protocol.
    """

    name = "copy_detection"
    directions = {"copies": "target", "above_half": "target", "rebuilt": "target"}
    needs = "weights.sscd: a TorchScript file of SSCD; forget and retain sets and holdout"
    cost = "the shared samples through a ResNet-50, and `noises` reconstructions per forgotten image"

    def scores(self, subject: Subject) -> Scores:
        sscd, batches = network(subject, "sscd", SSCD), subject.batches
        splits, sizes = subject.task.splits, subject.sizes
        forget = splits["forget"].distinct()
        aimed = forget_samples(subject, "class samples") if subject.classed else subject.samples()[0]
        known = sscd(forget.x, batches)
        usual = (sscd(splits["holdout"].x, batches) @ sscd(splits["retain"].distinct().x, batches).T).max(1)
        seeds = subject.seeds("injection", sizes["noises"])
        rebuilt = []
        for i in range(min(len(forget), sizes["recall_images"])):
            image = forget.take(torch.full((len(seeds),), i))
            reconstructions = subject.reconstruct(
                image.x, seeds, sizes["injection_t"], sizes["injection_steps"], image.cond
            )
            rebuilt.append(sscd(reconstructions, batches) @ known[i])
        return {
            "similarity": (sscd(aimed, batches) @ known.T).max(1),
            "rebuilt": np.stack(rebuilt, 1),
            "threshold": np.array([np.quantile(usual, QUANTILE, method="higher")]),
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        similarity = scores["similarity"]
        return {
            "copies": float((similarity > scores["threshold"][0]).mean()),
            "above_half": float((similarity > 0.5).mean()),
            "rebuilt": float(scores["rebuilt"].mean()),
        }

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, n, draws = self.values(scores, subject), len(scores["similarity"]), len(scores["rebuilt"])
        above = "similarity above {:.3f}".format
        return [
            Metric.share("copies", values["copies"], n, reason=above(scores["threshold"][0])),
            Metric.share("above_half", values["above_half"], n, reason=above(0.5)),
            Metric.jackknife("rebuilt", values["rebuilt"], draws, replicates["rebuilt"], over="noise draws"),
        ]
