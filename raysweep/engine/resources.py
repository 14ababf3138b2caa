"""Plans how training and auditing share a cluster, and checks that everything fits before anything starts.

A plan that does not fit would not raise an error: Ray would wait forever, silently, for resources that other parts hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raysweep.config.schema import ConfigError, Sweep

TRIAL_SLOT = "trial_slot"  # resource that trial functions hold instead of CPUs, which workers need
AUDIT_SHARE = 4  # one of so many GPUs audits
CPU_SHARE = 0.4  # CPUs per process where there are no GPUs: training and audits take turns on the cores
TRAIN, AUDIT, CONTROL = "train", "audit", "control"  # roles: values of the label `role` of nodes
AUDITORS = "auditors"
SLACK = 1e-9  # of sums of shares
MAX_CPU_SLOTS = 4  # per node: each slot and each auditor without a GPU is a process of some 0.7 GB


@dataclass(frozen=True)
class Node:
    """Resources of a node. role: its label `role`, "" without one. id, address: of Ray, "" for a node that is only planned."""

    cpus: float
    gpus: float = 0.0
    role: str = ""
    id: str = ""
    address: str = ""


@dataclass(frozen=True)
class Plan:
    """The share of each part of a run. Numbers of CPUs and GPUs are per worker and per auditor.

    train_role, audit_role: what the label `role` of their nodes must be, or "!" and what it must not be; "" for any node.
    """

    slots: int
    workers: int
    worker_cpus: float
    worker_gpus: float
    auditors: int
    auditor_cpus: float
    auditor_gpus: float
    late_auditors: int
    trial_slots: bool
    train_role: str = ""
    audit_role: str = ""

    @property
    def roles(self) -> bool:
        """Whether nodes are divided between training and audits."""
        return self.train_role != self.audit_role

    @property
    def concurrent_trials(self) -> int:
        """Trials in flight: one per slot, one per auditor so that slots train on while candidates are probed, and one that
        waits for the first free slot."""
        return self.slots + self.auditors + 1

    @property
    def interchangeable(self) -> bool:
        """Whether a slot and an auditor hold the same share of a GPU, so that the steward may replace one by the other."""
        return self.workers == 1 and 0 < self.worker_gpus == self.auditor_gpus

    @property
    def light(self) -> dict[str, float]:
        """Resources of a process that only waits for others: hardly any, but none on a node that offers no trial slots."""
        return {TRIAL_SLOT: 0.001} if self.trial_slots else {}

    @property
    def driver_cpus(self) -> float:
        """CPUs that a trial function holds if the cluster has no trial slots."""
        return 0.0 if self.trial_slots else 0.05

    def describe(self) -> str:
        """One line for people."""
        unit = f"{self.worker_gpus:g} GPU" if self.worker_gpus else f"{self.worker_cpus:g} CPU"
        audit = f"{self.auditor_gpus:g} GPU" if self.auditor_gpus else f"{self.auditor_cpus:g} CPU"
        late = f", {self.late_auditors} more after the search" if self.late_auditors else ""
        return (
            f"{self.slots} trials at once x {self.workers} worker{'s' * (self.workers > 1)} x {unit}, "
            f"{self.auditors} auditor{'s' * (self.auditors > 1)} x {audit}{late}"
        )


def make_plan(nodes: Sequence[Node], sweep: Sweep, trial_slots: bool = True) -> Plan:
    """The plan for a cluster; raises ConfigError where it cannot fit.

    With GPUs: a quarter of them audits, the rest trains; on a cluster with nodes labelled role=audit these audit and those labelled
    role=train train. Without: training and audits share the cores. Nodes labelled role=control do neither.
    """
    plan = _wanted(nodes, sweep, trial_slots, any(n.role == AUDIT for n in _workers(nodes)))
    preflight(plan, nodes)
    return plan


def refit(plan: Plan, nodes: Sequence[Node], sweep: Sweep) -> Plan | None:
    """A running sweep's plan for the nodes that there are at present, with as much of it as fits; None if nothing can run.

    Processes keep their size. If the nodes of one role are all gone, the others do both.
    """
    roles = {n.role for n in _workers(nodes)}
    try:
        wanted = _wanted(nodes, sweep, plan.trial_slots, {TRAIN, AUDIT} <= roles)
    except ConfigError:
        return None
    plan = replace(
        wanted,
        worker_cpus=plan.worker_cpus,
        worker_gpus=plan.worker_gpus,
        auditor_cpus=plan.auditor_cpus,
        auditor_gpus=plan.auditor_gpus,
    )
    while plan.slots and plan.auditors:
        short = _short(plan, nodes)
        if short is None:
            return plan
        if short.part.name == AUDITORS:
            plan = replace(plan, auditors=plan.auditors - short.missing)
        else:
            plan = replace(plan, slots=max(0, plan.slots - math.ceil(short.missing / plan.workers)))
    return None


def _workers(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that train and audit: all but the control nodes; those with GPUs if some have them."""
    nodes = [n for n in nodes if n.role != CONTROL]
    return [n for n in nodes if n.gpus] or nodes


def _wanted(nodes: Sequence[Node], sweep: Sweep, trial_slots: bool, roles: bool) -> Plan:
    """The plan for a cluster, which may not fit. roles: divide the nodes by their roles."""
    asked, workers = sweep.resources, sweep.train.workers
    able = _workers(nodes)
    if not able:
        raise ConfigError(
            "resources: only control nodes have joined the cluster, and these neither train nor audit; name the nodes to wait for, "
            "for example resources.expect=cluster.yaml"
        )
    gpus, cpus = sum(n.gpus for n in able), sum(n.cpus for n in able)
    for key in ("gpus_per_worker", "gpus_per_auditor"):
        number = getattr(asked, key)
        if number and not gpus:
            raise ConfigError(
                f"resources.{key}: {number:g}, but no node has a GPU; start when nodes with GPUs have joined the cluster, or leave it out"
            )
    others = f"!{CONTROL}" if any(n.role == CONTROL for n in nodes) else ""
    train_role, audit_role = (TRAIN, AUDIT) if roles else (others, others)
    per_gpu = 1.0 if asked.gpus_per_worker is None else asked.gpus_per_worker
    if gpus and per_gpu:
        auditor_gpus = asked.gpus_per_auditor or (1.0 if gpus > 1 else 0.5)
        train_gpus = per_gpu if gpus > 1 else min(per_gpu, 0.5)
        if roles:
            auditors = asked.auditors or _whole(able, AUDIT, auditor_gpus)
            slots = asked.slots or _whole(able, TRAIN, train_gpus) // workers
        else:
            for_audit = max(1, int(gpus) // AUDIT_SHARE) if gpus > 1 else 0.5
            auditors = asked.auditors or max(1, int(for_audit / auditor_gpus))
            slots = asked.slots or int((gpus - auditors * auditor_gpus) / (train_gpus * workers))
        return Plan(
            slots=slots,
            workers=workers,
            worker_cpus=asked.cpus_per_worker or min(8.0, cpus / gpus / 2),
            worker_gpus=train_gpus,
            auditors=auditors,
            auditor_cpus=min(8.0, cpus / gpus / 2),
            auditor_gpus=auditor_gpus,
            late_auditors=max(1, int(slots * workers * train_gpus / auditor_gpus)),
            trial_slots=trial_slots,
            train_role=train_role,
            audit_role=audit_role,
        )
    share = asked.cpus_per_worker or (CPU_SHARE if cpus >= 2 else cpus / 4)
    auditor_cpus = CPU_SHARE if cpus >= 2 else cpus / 4
    training, auditing = ([n for n in able if n.role == role] if roles else able for role in (TRAIN, AUDIT))
    part = 1 if roles else 2  # of the cores
    slots = asked.slots or max(1, _capped(training, share * workers * part))
    auditors = asked.auditors or max(1, _capped(auditing, 1.0))
    late = max(0, _capped(able, 1.0) - auditors)
    return Plan(slots, workers, share, 0.0, auditors, auditor_cpus, 0.0, late, trial_slots, train_role, audit_role)


def _capped(nodes: Sequence[Node], cpus: float) -> int:
    """Number of processes that have `cpus` CPUs each, at most `MAX_CPU_SLOTS` of them for each node."""
    return min(MAX_CPU_SLOTS * len(nodes), int(sum(n.cpus for n in nodes) / cpus + SLACK))


def _whole(nodes: Sequence[Node], role: str, gpus: float) -> int:
    """Number of processes with `gpus` GPUs each that the nodes of a role hold; none is spread over nodes."""
    return sum(int(n.gpus / gpus + SLACK) for n in nodes if n.role == role)


def preflight(plan: Plan, nodes: Sequence[Node]) -> None:
    """Raises ConfigError unless everything of the plan fits the cluster at the same time, node by node and role by role."""
    able = _workers(nodes)
    for unit, need, largest in (
        ("CPU", max(plan.worker_cpus, plan.auditor_cpus), max((n.cpus for n in able), default=0.0)),
        ("GPU", max(plan.worker_gpus, plan.auditor_gpus), max((n.gpus for n in able), default=0.0)),
    ):
        if need > largest + SLACK:
            raise ConfigError(f"resources: one process needs {need:g} {unit}, but the largest node has {largest:g}")
    short = _short(plan if plan.slots else replace(plan, slots=1), nodes)
    if short is not None:
        wanted = " and ".join(str(part) for part in short.parts if part.count)
        where = f"nodes labelled role={short.role}" if short.role else "nodes"
        alike = Counter(f"{n.cpus:g} CPU and {n.gpus:g} GPU" for n in short.nodes)
        have = ", ".join(f"{count} with {what}" for what, count in alike.items()) or "there are none"
        raise ConfigError(
            f"resources: {wanted} do not fit the {where} ({have}): room for {short.missing} of {short.part.count} "
            f"{short.part.name} is missing; lower resources.slots, resources.auditors or train.workers"
        )


def _short(plan: Plan, nodes: Sequence[Node]) -> _Short | None:
    """The first processes of a plan that have no place; None if all have one."""
    workers = _Part("workers", plan.slots * plan.workers, plan.worker_cpus, plan.worker_gpus)
    auditors = _Part(AUDITORS, plan.auditors, plan.auditor_cpus, plan.auditor_gpus)
    if plan.roles:
        groups = [
            (role, [part], [n for n in nodes if n.role == role]) for role, part in ((TRAIN, workers), (AUDIT, auditors))
        ]
    else:
        drivers = _Part("trial functions", plan.concurrent_trials if plan.driver_cpus else 0, plan.driver_cpus, 0.0)
        able = nodes if plan.worker_gpus else _workers(nodes)  # trial functions run on nodes without GPUs, too
        groups = [("", [auditors, workers, drivers], list(able))]
    for role, parts, members in groups:
        found = _misfit(parts, members)
        if found is not None:
            return _Short(*found, role, parts, members)
    return None


@dataclass(frozen=True)
class _Part:
    """Processes of one kind, with the CPUs and GPUs of each."""

    name: str
    count: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        needs = [f"{number:g} {unit}" for number, unit in ((self.cpus, "CPU"), (self.gpus, "GPU")) if number]
        return f"{self.count} {self.name} x {' and '.join(needs)}"


@dataclass(frozen=True)
class _Short:
    """Processes without a place: `missing` of `part`, one of the `parts` that share the `nodes` of a role."""

    part: _Part
    missing: int
    role: str
    parts: Sequence[_Part]
    nodes: Sequence[Node]


def _misfit(parts: Sequence[_Part], nodes: Sequence[Node]) -> tuple[_Part, int] | None:
    """The first part of which some have no place, and how many, if each goes to the first node with room, the largest first."""
    free = [[n.cpus, n.gpus] for n in nodes]
    for part in sorted(parts, key=lambda p: (p.gpus, p.cpus), reverse=True):
        left = part.count
        for node in free:
            while left and node[0] + SLACK >= part.cpus and node[1] + SLACK >= part.gpus:
                node[0] -= part.cpus
                node[1] -= part.gpus
                left -= 1
        if left:
            return part, left
    return None
