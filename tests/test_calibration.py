"""The audit on real models that never saw the forgotten picture, and on mixtures of such a model and the base.

`benchmarks/null.py` and `benchmarks/power.py` measure the same on the embedded tasks, with more models and all statements.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from test_durability import trained
from tiny import ROOT, tiny_task

from evaluators.judge import train_judge
from raysweep.auditing.anchors import Anchors, assess_views
from raysweep.auditing.measure import measure, subject_of
from raysweep.auditing.objectives import objectives
from raysweep.auditing.terms import Measured, term
from raysweep.config.schema import Tier

sys.path.append(str(ROOT / "benchmarks"))
from pool import Mixture

ORACLES = 7
TIER = Tier(
    seed=11,
    judge="audit",
    groups=10,
    samples=100,
    noises=40,
    loss_noises=20,
    loss_images=4,
    injection_t=600,
    injection_steps=8,
    sampling_steps=4,
    timesteps=4,
    loss_t=(120, 370, 620, 870),
    full_fidelity=False,
)


class Court:
    """A base, oracles and a destroyed model of the tiny task, each measured once."""

    def __init__(self) -> None:
        self.task = tiny_task()
        split = self.task.splits["judge_audit"]
        self.judge = train_judge(split.x, split.groups, 0, 150)
        self.models = {"base": trained(self.task, "train", steps=150)}
        self.models |= {f"oracle-{k}": trained(self.task, "retain", steps=150, seed=k + 1) for k in range(ORACLES)}
        self.measured = {name: self.measure(model) for name, model in self.models.items()}
        self.measured["destroyed"] = self.measure(self.models["base"].fresh(7))
        self.names = [f"oracle-{k}" for k in range(ORACLES)]

    def measure(self, model) -> Measured:
        result = measure(subject_of(model, self.task, self.judge, TIER), TIER)
        return Measured(result.values, {k: np.array(v) for k, v in result.replicates.items()})

    def oracles(self, without: str) -> tuple[Measured, ...]:
        return tuple(self.measured[name] for name in self.names if name != without)

    def placed(self, measured: Measured, without: str):
        anchors = Anchors(self.measured["base"], self.oracles(without), self.measured["destroyed"])
        views = assess_views(anchors, self.task.views)
        return objectives(measured, anchors, views, self.task.quality, self.task.validity)


@pytest.fixture(scope="module")
def court():
    return Court()


def test_models_that_never_saw_the_picture_are_rarely_flagged(court):
    """At 95 %, of 7 oracles by 6 others each: more than two flags of a kind have a probability of under 0.5 %."""
    places = [court.placed(court.measured[name], name) for name in court.names]
    assert sum(place.residue_lo > 0 for place in places) <= 2
    assert sum(place.damage_lo > 0 for place in places) <= 2
    assert all(place.residue_se > 0 for place in places)
    for metric in (*court.task.views, court.task.quality, court.task.validity):
        flags = 0
        for name in court.names:
            low, high = term(court.measured[name], court.oracles(name), metric).comparison.interval()
            flags += not low <= 0 <= high
        assert flags <= 2, metric


def test_a_model_that_knows_a_part_of_the_picture_is_flagged(court):
    def constant(share: float):
        return lambda t: torch.full(t.shape, share)

    for share, least in ((0.3, 2), (0.6, 3)):
        flagged = []
        for name in court.names[:3]:
            oracle = court.models[name]
            mixed = oracle.with_net(Mixture(court.models["base"].net, oracle.net, constant(share)))
            flagged.append(court.placed(court.measure(mixed), name).residue_lo > 0)
        assert sum(flagged) >= least, share
