"""The differences that the configured samples can decide, and the requirements on candidates."""

from __future__ import annotations

import pytest

from evaluators.statistics import clopper_pearson
from raysweep.auditing.power import Requirement, detectable, requirements, undecidable
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.checks import resolve_sweep


def sweep(**require: str):
    wanted = {metric.replace("__", "."): text for metric, text in require.items()}
    settings = ("task=digits-class", "methods=[rgd]", "search.trials=1", f"audit.require={wanted}")
    return load(None, settings)


def test_a_requirement_is_met_by_the_whole_interval():
    least, most = Requirement("c.m", True, 0.9), Requirement("c.m", False, 0.1)
    assert least.met(0.91, 0.99)
    assert not least.met(0.89, 0.99)
    assert most.met(0.0, 0.1)
    assert not most.met(0.0, 0.11)
    assert not least.met(None, None)
    assert str(most) == "c.m <= 0.1"


def test_undecidable_requirements_are_refused_with_the_needed_number_of_samples():
    fine = sweep(classifier__unlearning_accuracy=">= 0.95")
    task = fine.task.build()
    assert undecidable(fine, task) == []
    assert requirements(fine, task) == [Requirement("classifier.unlearning_accuracy", True, 0.95)]
    bold = sweep(classifier__unlearning_accuracy=">= 0.99")
    with pytest.raises(ConfigError, match="cannot be decided with") as caught:
        resolve_sweep(bold)
    needed = int(str(caught.value).rsplit("; ", 1)[1].split()[0])
    assert clopper_pearson(needed, needed)[0] >= 0.99 > clopper_pearson(needed - 1, needed - 1)[0]
    assert "no number of samples" in undecidable(sweep(classifier__recognised="<= 0.0"), task)[0]


@pytest.mark.parametrize(
    ("require", "message"),
    [
        ({"classifier__unlearning_accuracy": "0.9"}, "must be"),
        ({"classifier__validity": ">= 0.9.1"}, "must be"),
        ({"clasifier__validity": ">= 0.9"}, "is not an evaluator"),
        ({"classifier__valid": ">= 0.9"}, "no metric 'valid'"),
        ({"quantisation__excess": "<= 0.1"}, "not among the checks of the tier audit"),
        ({"zero_shot__recognised": "<= 0.1"}, "needs audit.audit.weights.clip"),
        ({"reconstruction__correlation": "<= 0.1"}, "does not apply to"),
    ],
)
def test_invalid_requirements(require, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sweep(sweep(**require))


def test_checks_that_come_with_weights_or_objectives_can_be_required(tmp_path):
    """`checks` alone does not determine what is measured."""
    task = sweep().task.build()
    (tmp_path / "clip").mkdir()
    wanted = "audit.require={zero_shot.recognised: '<= 0.1', classifier.recognised: '<= 0.5'}"
    settings = ("task=digits-class", "methods=[rgd]", "search.trials=1", wanted)
    brought = load(None, (*settings, f"audit.audit.weights.clip={tmp_path / 'clip'}", "audit.audit.checks=null"))
    assert [r.metric for r in requirements(brought, task)] == ["zero_shot.recognised", "classifier.recognised"]
    with pytest.raises(ConfigError, match=r"zero_shot is not among .* needs audit\.audit\.weights\.clip"):
        requirements(load(None, settings), task)


def test_detectable_differences():
    lines = detectable(load(None, ("task=digits-class", "search.trials=6")).audit.audit, sweep().task.build())
    assert any(line.startswith("unlearning accuracy: 0.0") for line in lines)
    assert any("membership AUC" in line for line in lines)
    default = load(None)
    lines = detectable(default.audit.audit, default.task.build())
    assert any("zero hits in 800 samples leave a rate up to 0.0046" in line for line in lines)
    assert any("its rank among" in line for line in lines)
