"""The audit of the audit: the checks must separate models that contain the forget set from models that do not."""

from __future__ import annotations

import json
import sys

import pytest
from tiny import ROOT

from raysweep.auditing.informative import LEAST, caveat, measured
from raysweep.registry import EVALUATORS, resolve


def test_caveats_of_checks_rest_on_twenty_models_of_either_kind():
    data = json.loads((ROOT / "raysweep" / "auditing" / "informative.json").read_text())
    assert set(data["auc"]) == set(data["models"])
    for kind, counts in data["models"].items():
        assert min(counts) >= 20, kind
    for aucs in measured().values():
        for name, (auc, low, high) in aucs.items():
            check, metric = name.split(".")
            assert metric in resolve("evaluator", check).directions
            assert check in EVALUATORS
            assert 0 <= auc <= 1
            assert low <= auc <= high


def test_only_measured_and_weak_checks_have_a_caveat():
    views = ("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate")
    assert [caveat("points", view) for view in views] == ["", "", ""]
    weak = [name for name, (auc, _, _) in measured()["points"].items() if auc < LEAST]
    assert weak
    assert caveat("points", weak[0]).startswith("uninformative on the digits pool: AUC 0.")
    assert caveat("points", "not.measured") == caveat("concept", weak[0]) == ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_headline_checks_separate_the_pool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "meta", raising=False)
    import meta

    kept = {"reconstruction", "denoising", "generation", "loss", "recall", "relearning"}
    costly = tuple(name for name in EVALUATORS if name not in kept)
    results = [meta.study("points", has, k, costly) for k in range(6) for has in (True, False)]
    ratings = meta.ratings(results)
    for name in (
        "reconstruction.correlation",
        "denoising.forget_log_loss",
        "loss.rank",
        "recall.excess",
        "relearning.excess",
    ):
        assert ratings[name][0] >= LEAST, name
    assert "| relearning.excess |" in meta.table(results)
