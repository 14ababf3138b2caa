"""Distances between samples and the real retained images, in the judge's feature space, by torch-fidelity.

Frechet distance, KID, precision and recall come from torch-fidelity with our own registered feature extractor. Its cache
stays off because its key ignores the extractor's weights. The spread that it prints for KID is over random subsets, not
a standard error, and a bootstrap of the Frechet distance is biased by duplicates: both errors are by the delete-a-group
jackknife. All values depend on the number of samples; compare them at equal n only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from evaluators.base import Evaluator, Metric, Scores, Subject
from evaluators.statistics import clopper_pearson, frechet, jackknife_se, kid, normal_interval

EXTRACTOR = "raysweep-judge"


class Fidelity(Evaluator):
    """Frechet distance (Heusel et al., arXiv:1706.08500), KID (arXiv:1801.01401), precision and recall (1904.06991)."""

    name = "fidelity"
    directions = {"frechet": "min", "kid": "min", "precision": "max", "recall": "max"}
    needs = "retain set"
    cost = "the shared samples"

    def scores(self, subject: Subject) -> Scores:
        return {"features": subject.features()}

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        reference = subject.reference_features()
        result = {"frechet": frechet(scores["features"], reference)}
        if subject.sizes["full_fidelity"]:
            result["kid"] = kid(scores["features"], reference)
        return result

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        n = len(scores["features"])
        values = self.values(scores, subject)
        if subject.sizes["full_fidelity"]:
            values |= by_torch_fidelity(subject)
        rows = []
        for name in ("frechet", "kid"):
            if name in values:
                se = jackknife_se(replicates[name])
                lo, hi = normal_interval(values[name], se)
                rows.append(Metric(name, values[name], n, se, lo, hi, "jackknife over samples", "min"))
        if "precision" in values:
            low, high = clopper_pearson(round(values["precision"] * n), n)
            rows.append(Metric("precision", values["precision"], n, None, low, high, "clopper-pearson", "max"))
            m = len(subject.reference_features())
            low, high = clopper_pearson(round(values["recall"] * m), m)
            method = "clopper-pearson over real images"
            rows.append(Metric("recall", values["recall"], m, None, low, high, method, "max"))
        return rows


def by_torch_fidelity(subject: Subject) -> dict[str, float]:
    """Frechet distance, precision and recall of the subject's samples by `torch_fidelity.calculate_metrics`."""
    _register()
    result = calculate_metrics(
        input1=_Tensors(subject.samples()[0]),
        input2=_Tensors(subject.task.splits["retain"].x),
        feature_extractor=EXTRACTOR,
        judge=subject.judge,
        fid=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no loader processes
        batch_size=500,
        verbose=False,
    )
    return {
        "frechet": float(result["frechet_inception_distance"]),
        "precision": float(result["precision"]),
        "recall": float(result["recall"]),
    }


class JudgeExtractor(FeatureExtractorBase):
    """torch-fidelity's view of a judge: one layer of features for all metrics."""

    def __init__(self, name: str, features_list: list[str], judge: Any = None, **kwargs: Any):
        super().__init__(name, features_list)
        self.judge = judge

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 1, 8, 8)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.judge.features(x.float()),)


class _Tensors(Dataset):
    def __init__(self, x: torch.Tensor):
        self.x = x.float()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index]


_registered = False


def _register() -> None:
    global _registered
    if not _registered:
        register_feature_extractor(EXTRACTOR, JudgeExtractor)
        _registered = True
