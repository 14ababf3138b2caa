"""Distances between samples and the real retained images, in a feature space, by torch-fidelity.

torch-fidelity's own caches and extractors stay out of it: features are computed once and handed to its functions. The spread
that it prints for KID is over random subsets, not a standard error, and a bootstrap of the Frechet distance is biased by
duplicates: both errors are by the delete-a-group jackknife. All values depend on the number of samples and on the network;
compare them at equal n and equal network only.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject, judged
from evaluators.external import CLIP, DINO, Inception, network
from evaluators.statistics import (
    clopper_pearson,
    diversity,
    frechet,
    inception_score,
    jackknife_interval,
    kid,
    precision_recall,
)


class Fidelity(Evaluator):
    """Frechet distance (Heusel et al., arXiv:1706.08500), KID (arXiv:1801.01401), precision and recall (1904.06991).

    With `full_fidelity` also `diversity`, the samples' mean distance from one another over that of real images, and
    `inception_score` (arXiv:1606.03498) with the classes of the network that gives the features, if it has any.
    """

    name = "fidelity"
    directions: ClassVar[dict[str, Direction]] = {
        "frechet": "min", "kid": "min", "precision": "max", "recall": "max", "diversity": "max", "inception_score": "max",
    }  # fmt: skip
    needs = "retain set"
    cost = "the shared samples"

    def features(self, subject: Subject) -> np.ndarray:
        """Features (n, d) of the shared samples."""
        return subject.features()

    def reference(self, subject: Subject) -> np.ndarray:
        """Features (m, d) of the real retained images."""
        return subject.reference_features()

    def whole(self, subject: Subject) -> np.ndarray | None:
        """Features (m, d) of all training images, the forgotten ones with them; None: not asked for."""
        return None

    def logits(self, subject: Subject) -> np.ndarray | None:
        """Logits (n, classes) of the shared samples; None if the network has no classes."""
        return subject.once("logits", lambda: judged(subject.judge, subject.samples()[0]))

    def scores(self, subject: Subject) -> Scores:
        found = {"features": self.features(subject)}
        logits = self.logits(subject) if subject.sizes["full_fidelity"] else None
        return found if logits is None else found | {"logits": logits}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        reference, own = self.reference(subject), scores["features"]
        result = {"frechet": frechet(own, reference)}
        whole = self.whole(subject)
        if whole is not None:
            result["frechet_all"] = frechet(own, whole)
        if subject.sizes["full_fidelity"]:
            result["kid"] = kid(own, reference)
            spread = subject.once(f"{self.name}.spread", lambda: diversity(reference))
            result["diversity"] = diversity(own) / spread
        if "logits" in scores:
            result["inception_score"] = inception_score(scores["logits"])
        return result

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        own, reference = scores["features"], self.reference(subject)
        n, rows = len(own), []
        few = min(n, len(reference)) < own.shape[1]
        for name, value in self.values(scores, subject).items():
            se, lo, hi = jackknife_interval(value, replicates[name])
            reason = (
                f"fewer images than the {own.shape[1]} features: biased" if few and name.startswith("frechet") else ""
            )
            how = "jackknife over samples"
            rows.append(Metric(name, value, n, se, lo, hi, how, self.directions[name], reason=reason))
        if subject.sizes["full_fidelity"]:
            precision, recall = precision_recall(own, reference)
            for name, value, count, over in (
                ("precision", precision, n, ""),
                ("recall", recall, len(reference), " over real images"),
            ):
                low, high = clopper_pearson(round(value * count), count)
                rows.append(Metric(name, value, count, None, low, high, f"clopper-pearson{over}", "max"))
        return rows


class _ByNetwork(Fidelity):
    """The same in the feature space of a network that the user brings, of the class `kind`."""

    kind: ClassVar[type[CLIP | DINO | Inception]]
    weights: ClassVar[str]

    def _both(self, subject: Subject, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        return network(subject, self.weights, self.kind)(images), None

    def _own(self, subject: Subject) -> tuple[np.ndarray, np.ndarray | None]:
        return subject.once(f"{self.name}.own", lambda: self._both(subject, subject.samples()[0]))

    def features(self, subject: Subject) -> np.ndarray:
        return self._own(subject)[0]

    def logits(self, subject: Subject) -> np.ndarray | None:
        return self._own(subject)[1]

    def reference(self, subject: Subject) -> np.ndarray:
        return self._of_split(subject, "retain")

    def _of_split(self, subject: Subject, split: str) -> np.ndarray:
        key = f"{self.name}.{split}.{subject.sizes['weights'][self.weights]}"
        return subject.keep(key, lambda: self._both(subject, subject.task.splits[split].x)[0])


class InceptionFidelity(_ByNetwork):
    """With Inception v3 as the literature reports it: FID, KID, IS; torch-fidelity's port of the original weights.

    Where a class is forgotten, papers differ in the reference of FID: `frechet` has the retained classes alone, as SalUn and
    Selective Amnesia do, `frechet_all` the forgotten one, too, as RGD does, which even a perfect model does not reach.
    """

    name = "fidelity_inception"
    directions: ClassVar[dict[str, Direction]] = Fidelity.directions | {"frechet_all": "min"}
    kind, weights = Inception, "inception"
    needs = "weights.inception: torch-fidelity's weights file of Inception v3; retain set"

    def whole(self, subject: Subject) -> np.ndarray | None:
        if subject.task.kind != "class":
            return None
        parts = ("retain", "forget")
        return subject.once(f"{self.name}.whole", lambda: np.concatenate([self._of_split(subject, p) for p in parts]))

    def _both(self, subject: Subject, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        found, _ = super()._both(subject, images)
        return found[:, :2048], found[:, 2048:]


class DINOFidelity(_ByNetwork):
    """With DINOv2, which does not penalise diffusion models as Inception does (Stein et al., arXiv:2306.04675)."""

    name = "fidelity_dino"
    kind, weights = DINO, "dino"
    needs = "weights.dino: a transformers folder of DINOv2 or the like; retain set"


class CLIPFidelity(_ByNetwork):
    """With CLIP's image features."""

    name = "fidelity_clip"
    kind, weights = CLIP, "clip"
    needs = "weights.clip: an open_clip folder; retain set"
