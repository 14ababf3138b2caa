"""What the configured samples can decide, and what candidates must show."""

from __future__ import annotations

import pytest

from evaluators.statistics import clopper_pearson
from raysweep.config import ConfigError
from raysweep.fit import resolve_sweep
from raysweep.power import Requirement, detectable, requirements, undecidable
from raysweep.reader import load


def sweep(**require: str):
    return load(None, ("task=digits-class", "methods=[rgd]", "search.trials=1", f"audit.require={ {k.replace('__', '.'): v for k, v in require.items()} }"))  # fmt: skip


def test_a_requirement_is_met_by_the_whole_interval():
    least, most = Requirement("c.m", True, 0.9), Requirement("c.m", False, 0.1)
    assert least.met(0.91, 0.99)
    assert not least.met(0.89, 0.99)
    assert most.met(0.0, 0.1)
    assert not most.met(0.0, 0.11)
    assert not least.met(None, None)
    assert str(most) == "c.m <= 0.1"


def test_what_the_samples_cannot_decide_is_refused_with_the_number_that_could():
    fine = sweep(classifier__unlearning_accuracy=">= 0.95")
    assert undecidable(fine) == []
    assert requirements(fine) == [Requirement("classifier.unlearning_accuracy", True, 0.95)]
    bold = sweep(classifier__unlearning_accuracy=">= 0.99")
    with pytest.raises(ConfigError, match="cannot be decided with") as caught:
        resolve_sweep(bold)
    needed = int(str(caught.value).rsplit("; ", 1)[1].split()[0])
    assert clopper_pearson(needed, needed)[0] >= 0.99 > clopper_pearson(needed - 1, needed - 1)[0]
    assert "no number of samples" in undecidable(sweep(classifier__recognised="<= 0.0"))[0]


@pytest.mark.parametrize(("require", "message"), [
    ({"classifier__unlearning_accuracy": "0.9"}, "must be"), ({"clasifier__validity": ">= 0.9"}, "is not an evaluator"),
    ({"classifier__valid": ">= 0.9"}, "no metric 'valid'"), ({"quantisation__excess": "<= 0.1"}, "not among audit.audit.checks"),
])  # fmt: skip
def test_requirements_that_make_no_sense(require, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sweep(sweep(**require))


def test_what_can_be_told():
    lines = detectable(load(None, ("task=digits-class", "search.trials=6")).audit.audit, sweep().task.build())
    assert any(line.startswith("unlearning accuracy: 0.0") for line in lines)
    assert any("membership AUC" in line for line in lines)
    default = load(None)
    lines = detectable(default.audit.audit, default.task.build())
    assert any("zero hits in 800 samples leave a rate up to 0.0046" in line for line in lines)
    assert any("its rank among" in line for line in lines)
