"""Distances between samples and the real retained images, in a feature space, by torch-fidelity.

torch-fidelity's caches and extractors are not used: features are computed once and handed to its functions. Errors are by the
delete-a-group jackknife: the spread that torch-fidelity prints for KID is over random subsets and no standard error, and a
bootstrap of the Frechet distance is biased by duplicates. All values depend on the number of samples and on the network;
compare them only at equal n and equal network.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from evaluators.base import Direction, Evaluator, Metric, Scores, Subject
from evaluators.external import CLIP, DINO, Inception, network
from evaluators.statistics import diversity, frechet, inception_score, kid, precision_recall


class Fidelity(Evaluator):
    """Frechet distance (Heusel et al., arXiv:1706.08500), KID (arXiv:1801.01401), precision and recall (1904.06991).

    With `full_fidelity` also `diversity`, the mean distance between samples over that between real images, and
    `inception_score` (arXiv:1606.03498) with the classes of the network that gives the features, if it has any.
    """

    name = "fidelity"
    directions: ClassVar[dict[str, Direction]] = {
        "frechet": "min",
        "kid": "min",
        "precision": "max",
        "recall": "max",
        "diversity": "max",
        "inception_score": "max",
    }
    needs = "retain set"
    cost = "the shared samples"

    def features(self, subject: Subject) -> np.ndarray:
        """Features (n, d) of the shared samples."""
        return subject.features()

    def reference(self, subject: Subject) -> np.ndarray:
        """Features (m, d) of the real retained images."""
        return subject.reference_features()

    def whole(self, subject: Subject) -> np.ndarray | None:
        """Features (m, d) of all training images, the forgotten ones included; None to leave `frechet_all` out."""
        return None

    def logits(self, subject: Subject) -> np.ndarray | None:
        """Logits (n, classes) of the shared samples; None if the network has no classes."""
        return subject.once("logits", lambda: subject.logits(subject.samples()[0]))

    def scores(self, subject: Subject) -> Scores:
        scores = {"features": self.features(subject)}
        logits = self.logits(subject) if subject.sizes["full_fidelity"] else None
        return scores if logits is None else scores | {"logits": logits}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        reference, features = self.reference(subject), scores["features"]
        values = {"frechet": frechet(features, reference)}
        whole = self.whole(subject)
        if whole is not None:
            values["frechet_all"] = frechet(features, whole)
        if subject.sizes["full_fidelity"]:
            values["kid"] = kid(features, reference)
            spread = subject.once(f"{self.name}.spread", lambda: diversity(reference))
            values["diversity"] = diversity(features) / spread
        if "logits" in scores:
            values["inception_score"] = inception_score(scores["logits"])
        return values

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        features, reference = scores["features"], self.reference(subject)
        n, dimensions = features.shape
        biased = min(n, len(reference)) < dimensions
        rows = []
        for name, value in self.values(scores, subject).items():
            reason = (
                f"fewer images than the {dimensions} features: biased" if biased and name.startswith("frechet") else ""
            )
            direction = self.directions[name]
            rows.append(
                Metric.jackknife(name, value, n, replicates[name], over="samples", direction=direction, reason=reason)
            )
        if subject.sizes["full_fidelity"]:
            precision, recall = precision_recall(features, reference)
            rows.append(Metric.share("precision", precision, n, direction="max"))
            rows.append(Metric.share("recall", recall, len(reference), over="real images", direction="max"))
        return rows


class _ByNetwork(Fidelity):
    """Fidelity in the feature space of a network that the user brings, of the class `kind`."""

    kind: ClassVar[type[CLIP | DINO | Inception]]
    weights: ClassVar[str]

    def outputs(self, subject: Subject, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(features (n, d), logits (n, classes) or None) of images (n, C, H, W)."""
        return network(subject, self.weights, self.kind)(images, subject.batches), None

    def split_features(self, subject: Subject, split: str) -> np.ndarray:
        """Features (m, d) of the real images of a split."""
        key = f"{self.name}.{split}.{subject.sizes['weights'][self.weights]}"
        return subject.keep(key, lambda: self.outputs(subject, subject.task.splits[split].x)[0])

    def features(self, subject: Subject) -> np.ndarray:
        return self._of_samples(subject)[0]

    def logits(self, subject: Subject) -> np.ndarray | None:
        return self._of_samples(subject)[1]

    def reference(self, subject: Subject) -> np.ndarray:
        return self.split_features(subject, "retain")

    def _of_samples(self, subject: Subject) -> tuple[np.ndarray, np.ndarray | None]:
        return subject.once(f"{self.name}.samples", lambda: self.outputs(subject, subject.samples()[0]))


class InceptionFidelity(_ByNetwork):
    """FID, KID and IS as in the literature, with Inception v3 in torch-fidelity's port of the original weights.

    Papers on forgetting a class differ in the reference of FID. `frechet` has the retained classes alone, as in SalUn and
    Selective Amnesia; `frechet_all` also has the forgotten one, as in RGD, so even a perfect model does not reach 0.
    """

    name = "fidelity_inception"
    directions: ClassVar[dict[str, Direction]] = Fidelity.directions | {"frechet_all": "min"}
    kind, weights = Inception, "inception"
    needs = "weights.inception: torch-fidelity's weights file of Inception v3; retain set"

    def whole(self, subject: Subject) -> np.ndarray | None:
        if subject.task.kind != "class":
            return None
        parts = ("retain", "forget")
        return subject.once(
            f"{self.name}.whole", lambda: np.concatenate([self.split_features(subject, part) for part in parts])
        )

    def outputs(self, subject: Subject, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        both, _ = super().outputs(subject, images)
        return both[:, :2048], both[:, 2048:]


class DINOFidelity(_ByNetwork):
    """Fidelity with DINOv2, which does not penalise diffusion models as Inception does (Stein et al., arXiv:2306.04675)."""

    name = "fidelity_dino"
    kind, weights = DINO, "dino"
    needs = "weights.dino: a transformers folder of DINOv2 or the like; retain set"


class CLIPFidelity(_ByNetwork):
    """Fidelity with CLIP's image features."""

    name = "fidelity_clip"
    kind, weights = CLIP, "clip"
    needs = "weights.clip: an open_clip folder; retain set"
