"""Resource plans for a laptop and for H100s, and refusals of what cannot fit."""

from __future__ import annotations

import pytest

from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.resources import Node, make_plan

CLUSTER = [Node(16, 0, "control"), *[Node(192, 8, "train")] * 3, Node(192, 8, "audit")]


def plan(nodes, *overrides):
    return make_plan(nodes, load(None, overrides))


def total(p, unit):
    per_worker, per_auditor = (p.worker_cpus, p.auditor_cpus) if unit == "cpu" else (p.worker_gpus, p.auditor_gpus)
    return p.slots * p.workers * per_worker + p.auditors * per_auditor


def test_a_plan_for_two_cpus():
    p = plan([Node(2)])
    assert (p.slots, p.workers, p.auditors, p.late_auditors, p.worker_gpus) == (2, 1, 2, 0, 0)
    assert total(p, "cpu") + p.concurrent_trials * make_plan([Node(2)], load(None), trial_slots=False).driver_cpus <= 2
    assert p.concurrent_trials == 5
    assert plan([Node(2)], "resources.auditors=1").late_auditors == 1
    assert plan([Node(1)]).slots >= 1


def test_a_plan_for_a_node_of_eight_gpus():
    p = plan([Node(192, 8)])
    assert (p.slots, p.worker_gpus, p.auditors, p.auditor_gpus) == (6, 1, 2, 1)
    assert plan([Node(192, 8)], "train.workers=2").slots == 3
    large = plan([Node(192, 8)], "resources.gpus_per_auditor=2")
    assert (large.slots, large.auditors, large.auditor_gpus) == (6, 1, 2)
    assert total(p, "gpu") == 8


def test_a_plan_for_four_nodes_of_eight_gpus():
    p = plan(CLUSTER)
    assert (p.slots, p.auditors, p.roles) == (24, 8, True)
    assert plan(CLUSTER, "train.workers=8").slots == 3
    assert plan(CLUSTER, "resources.auditors=4").slots == 24  # GPUs of the audit node do not train
    assert plan(CLUSTER, "resources.gpus_per_worker=3").slots == 6  # two on each node
    assert total(p, "gpu") == 32
    assert total(p, "cpu") <= sum(n.cpus for n in CLUSTER)


@pytest.mark.parametrize(
    ("nodes", "overrides", "message"),
    [
        ([Node(2)], ("resources.slots=8",), "do not fit"),
        ([Node(2)], ("resources.cpus_per_worker=4",), "largest node"),
        ([Node(192, 8)], ("train.workers=16",), "do not fit"),
        ([Node(192, 8)], ("resources.auditors=8",), "do not fit"),
        ([Node(192, 8)], ("resources.gpus_per_worker=9",), "largest node"),
        ([Node(192, 8)], ("resources.gpus_per_auditor=9",), "largest node"),
        ([Node(2)], ("resources.gpus_per_worker=1",), "resources.gpus_per_worker: 1, but no node has a GPU"),
        ([Node(2)], ("resources.gpus_per_auditor=1",), "resources.gpus_per_auditor: 1, but no node has a GPU"),
        (CLUSTER, ("resources.slots=30",), r"role=train .*: room for 6 of 30 workers is missing"),
        (CLUSTER, ("resources.auditors=16",), r"role=audit .*: room for 8 of 16 auditors is missing"),
        (CLUSTER, ("train.workers=32",), r"32 workers x .* role=train .*: room for 8 of 32 workers is missing"),
        ([Node(16, 0, "control"), Node(192, 8, "audit")], (), r"role=train \(there are none\)"),
        (
            [Node(192, 8)] * 2,
            ("resources.gpus_per_worker=5", "resources.slots=3"),
            "room for 1 of 3 workers is missing",
        ),
    ],
)
def test_requests_beyond_the_cluster_are_refused(nodes, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan(nodes, *overrides)
