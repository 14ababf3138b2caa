"""How the steward hires and dismisses, without Ray: by role, those without a place or work first, and by demand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from raysweep.config.reader import load
from raysweep.engine import steward as steward_module
from raysweep.engine.resources import Node, make_plan, refit
from raysweep.engine.steward import FUTILE, SHIFT_S, Crew, Shift

TRAIN, AUDIT, CONTROL = Node(192, 8, "train"), Node(192, 8, "audit"), Node(16, 0, "control")
CLUSTER = [CONTROL, TRAIN, TRAIN, TRAIN, AUDIT]


class Desk:
    """Records what it is told."""

    def __init__(self):
        self.left, self.forgotten, self.died = [], [], []
        self.leave = SimpleNamespace(remote=self.left.extend)
        self.forget = SimpleNamespace(remote=self.forgets)

    def forgets(self, names, died):
        self.forgotten += names
        self.died += names if died else []


@pytest.fixture
def crew(monkeypatch):
    killed = []
    monkeypatch.setattr(steward_module.ray, "kill", lambda actor, **_: killed.append(actor))
    made = Crew("slot", Desk(), lambda name, role: (f"actor of {name}", f"service of {name}"))
    made.killed = killed
    return made


def census(crew: Crew, idle=(), busy=()) -> dict:
    return {
        "workers": dict.fromkeys(idle, ("node", "")) | dict.fromkeys(busy, ("node", "job")),
        "silent": [],
        "queued": 0,
    }


def test_workers_are_hired_by_role_and_dismissed_with_the_least_loss(crew):
    crew.adjust({"train": 3, "audit": 1}, census(crew))
    assert {name: m.role for name, m in crew.members.items()} == {
        "slot-0": "audit",
        "slot-1": "train",
        "slot-2": "train",
        "slot-3": "train",
    }
    seen = census(crew, idle=["slot-1"], busy=["slot-3", "slot-0"])  # slot-2 waits for a place
    crew.adjust({"train": 1}, seen)
    assert crew.killed == ["actor of slot-2"]
    assert sorted(crew.desk.left) == ["slot-0", "slot-1"]
    crew.adjust({"train": 1}, seen)  # those that leave are not counted, and not dismissed twice
    assert sorted(crew.desk.left) == ["slot-0", "slot-1"]
    crew.remove("slot-1")
    assert crew.desk.forgotten == ["slot-2", "slot-1"]
    crew.adjust({"train": 2}, seen)
    assert [name for name in crew.members if name not in crew.leaving] == ["slot-3", "slot-4"]


def test_workers_that_ended_are_replaced_and_only_deaths_by_themselves_are_attempts(crew, monkeypatch):
    """slot-0 was let go, slot-1 died, slot-2 died with its node, slot-3 is silent; slot-4 works."""
    ended = {f"service of slot-{k}": f"end {k}" for k in range(3)}
    monkeypatch.setattr(steward_module.ray, "wait", lambda services, **_: ([s for s in services if s in ended], []))
    ends = {"service of slot-0": ""}
    monkeypatch.setattr(steward_module, "_reason", lambda service: ends.get(service, "OutOfMemoryError: too much"))
    crew.adjust({"train": 5}, census(crew))
    seen = census(crew, busy=[f"slot-{k}" for k in range(5)]) | {"silent": ["slot-3"]}
    seen["workers"]["slot-2"] = ("lost", "job")
    crew.reap(seen, ["node"])
    assert set(crew.members) == {"slot-4"}
    assert sorted(crew.killed) == [f"actor of slot-{k}" for k in range(4)]
    assert crew.desk.forgotten == ["slot-0", "slot-1", "slot-2", "slot-3"]
    assert crew.desk.died == ["slot-1"]
    crew.adjust({"train": 5}, seen)
    assert set(crew.members) == {f"slot-{k}" for k in range(4, 9)}


def test_workers_that_end_at_once_are_hired_later_and_later(crew, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(steward_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(steward_module.ray, "wait", lambda services, **_: (services, []))
    monkeypatch.setattr(steward_module, "_reason", lambda service: "ImportError: no driver")
    tried = []
    for now[0] in range(0, 400, 2):
        crew.reap(census(crew), ["node"])
        crew.adjust({"train": 1}, census(crew))
        if crew.members:
            tried.append(now[0])
    assert tried[:4] == [0, 6, 16, 34]
    assert tried[-1] - tried[-2] in (62, 64)
    assert crew.futile >= FUTILE
    assert crew.trouble == "ImportError: no driver"
    monkeypatch.setattr(steward_module.ray, "wait", lambda services, **_: ([], services))
    now[0] = 1000.0
    crew.adjust({"train": 1}, census(crew))
    crew.reap(census(crew, idle=crew.members), ["node"])
    assert crew.futile == 0


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.OutOfMemoryError("too much"), True),
        (ray.exceptions.ActorUnavailableError("gone", b"0" * 16), False),
        (ray.exceptions.RayTaskError("serve", "trace", OSError("disk")).as_instanceof_cause(), True),
        (ray.exceptions.RayTaskError("serve", "trace", ray.exceptions.ActorDiedError()), False),  # of its desk
        (None, False),
    ],
)
def test_deaths_that_a_worker_may_have_caused_have_a_reason(error, counts, monkeypatch):
    def get(service):
        if error is not None:
            raise error

    monkeypatch.setattr(steward_module.ray, "get", get)
    assert bool(steward_module._reason("service")) == counts


def test_idle_workers_of_one_kind_become_the_other_as_demand_has_it():
    plan, shift = make_plan(CLUSTER, load(None)), Shift()
    jobs = {"workers": {f"s{k}": ("n", "job") for k in range(24)}, "queued": 9}
    audits = {"workers": {f"a{k}": ("n", "" if k else "audit") for k in range(8)}, "queued": 0}
    for now in (0, SHIFT_S - 1):
        shift.look(jobs, audits, plan, now)
        assert shift.to_slots == 0
    shift.look(jobs, audits, plan, SHIFT_S)
    assert (shift.to_slots, shift.to_auditors) == (3, 0)
    shift.look(jobs, audits, plan, SHIFT_S + 1)
    assert shift.to_slots == 3  # the next change is due later
    for k in range(2, 9):
        shift.look(jobs, audits, plan, k * SHIFT_S)
    assert shift.to_slots == 7  # an auditor stays
    idle = {"workers": {f"s{k}": ("n", "") for k in range(24)}, "queued": 0}
    waiting = {"workers": {"a0": ("n", "audit")}, "queued": 20}
    for k in range(10, 14):
        shift.look(idle, waiting, plan, k * SHIFT_S)
    assert shift.to_slots == 0
    assert shift.to_auditors > 0
    for k in range(14, 40):
        shift.look(idle, waiting, plan, k * SHIFT_S)
    assert shift.to_auditors == 23  # a slot stays


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (CLUSTER, (24, 8, "train", "audit")),
        ([CONTROL, TRAIN, AUDIT], (8, 8, "train", "audit")),
        ([CONTROL, TRAIN, TRAIN, TRAIN], (18, 6, "!control", "!control")),  # audits go on without their node
        ([CONTROL, AUDIT], (6, 2, "!control", "!control")),
        ([*CLUSTER, TRAIN], (32, 8, "train", "audit")),
        ([CONTROL], None),
        ([CONTROL, Node(64)], None),  # never on CPUs where GPUs were meant
    ],
)
def test_a_plan_follows_the_nodes(nodes, expected):
    plan = refit(make_plan(CLUSTER, load(None)), nodes, load(None))
    assert (plan and (plan.slots, plan.auditors, plan.train_role, plan.audit_role)) == expected


def test_numbers_that_a_config_fixes_are_cut_to_what_fits():
    sweep = load(None, ("resources.slots=24", "resources.auditors=8"))
    full = make_plan(CLUSTER, sweep)
    assert refit(full, [CONTROL, TRAIN, AUDIT], sweep).slots == 8
    assert refit(full, CLUSTER, sweep) == full
    groups = load(None, ("train.workers=16",))
    assert make_plan(CLUSTER, groups).slots == 1
    assert refit(make_plan(CLUSTER, groups), [CONTROL, TRAIN, AUDIT], groups) is None
