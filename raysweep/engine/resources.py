"""Plans how training and auditing share a cluster, and checks that everything fits before anything starts.

A plan that does not fit would not raise an error: Ray would wait forever, silently, for resources that other parts hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysweep.config.schema import ConfigError, Sweep

TRIAL_SLOT = "trial_slot"  # resource that trial functions hold instead of CPUs, which workers need
AUDIT_SHARE = 4  # one of so many GPUs audits
CPU_SHARE = 0.4  # CPUs per process where there are no GPUs: training and audits take turns on the cores
MAX_CPU_SLOTS = 4  # each slot and each auditor without a GPU is a process of some 0.7 GB


@dataclass(frozen=True)
class Node:
    """Resources of a node. role: its label `role`, "" without one."""

    cpus: float
    gpus: float = 0.0
    role: str = ""


@dataclass(frozen=True)
class Plan:
    """The share of each part of a run. Numbers of CPUs and GPUs are per worker and per auditor."""

    slots: int
    workers: int
    worker_cpus: float
    worker_gpus: float
    auditors: int
    auditor_cpus: float
    auditor_gpus: float
    late_auditors: int
    trial_slots: bool
    roles: bool = False

    @property
    def concurrent_trials(self) -> int:
        """Trials in flight: one per slot, one per auditor so that slots train on while candidates are probed, and one that
        waits for the first free slot."""
        return self.slots + self.auditors + 1

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

    With GPUs: a quarter of them audits (or all on nodes labelled role=audit), the rest trains. Without: training and
    audits share the cores.
    """
    asked, workers = sweep.resources, sweep.train.workers
    gpus, cpus = sum(n.gpus for n in nodes), sum(n.cpus for n in nodes)
    per_gpu = 1.0 if asked.gpus_per_worker is None else asked.gpus_per_worker
    if gpus and per_gpu:
        labelled = sum(n.gpus for n in nodes if n.role == "audit")
        for_audit = labelled or max(1, int(gpus) // AUDIT_SHARE) if gpus > 1 else 0.5
        auditor_gpus = asked.gpus_per_auditor or (1.0 if gpus > 1 else 0.5)
        auditors = asked.auditors or max(1, int(for_audit / auditor_gpus))
        train_gpus = per_gpu if gpus > 1 else min(per_gpu, 0.5)
        slots = asked.slots or int((gpus - auditors * auditor_gpus) / (train_gpus * workers))
        plan = Plan(
            slots=slots,
            workers=workers,
            worker_cpus=asked.cpus_per_worker or min(8.0, cpus / gpus / 2),
            worker_gpus=train_gpus,
            auditors=auditors,
            auditor_cpus=min(8.0, cpus / gpus / 2),
            auditor_gpus=auditor_gpus,
            late_auditors=max(1, int(slots * workers * train_gpus / auditor_gpus)),
            trial_slots=trial_slots,
            roles=bool(labelled),
        )
    else:
        share = asked.cpus_per_worker or (CPU_SHARE if cpus >= 2 else cpus / 4)
        slots = asked.slots or max(1, min(MAX_CPU_SLOTS, int(cpus / 2 / (share * workers))))
        auditor_cpus = CPU_SHARE if cpus >= 2 else cpus / 4
        auditors = asked.auditors or max(1, min(MAX_CPU_SLOTS, int(cpus)))
        late = max(0, min(MAX_CPU_SLOTS, int(cpus)) - auditors)
        plan = Plan(slots, workers, share, 0.0, auditors, auditor_cpus, 0.0, late, trial_slots)
    preflight(plan, nodes)
    return plan


def preflight(plan: Plan, nodes: Sequence[Node]) -> None:
    """Raises ConfigError unless everything of the plan fits the cluster at the same time."""
    demands = (
        ("CPU", plan.worker_cpus, plan.auditor_cpus, [n.cpus for n in nodes]),
        ("GPU", plan.worker_gpus, plan.auditor_gpus, [n.gpus for n in nodes]),
    )
    for unit, per_worker, per_auditor, offers in demands:
        need, largest = max(per_worker, per_auditor), max(offers, default=0.0)
        if need > largest + 1e-9:
            raise ConfigError(f"resources: one process needs {need:g} {unit}, but the largest node has {largest:g}")
    for unit, per_worker, per_auditor, offers in demands:
        drivers = plan.concurrent_trials * plan.driver_cpus if unit == "CPU" else 0.0
        need = plan.slots * plan.workers * per_worker + plan.auditors * per_auditor + drivers
        if plan.slots < 1 or need > sum(offers) + 1e-9:
            raise ConfigError(
                f"resources: {max(plan.slots, 1)} slots x {plan.workers} workers x {per_worker:g} {unit} and "
                f"{plan.auditors} auditors x {per_auditor:g} {unit} do not fit the cluster's {sum(offers):g} {unit}; "
                "lower resources.slots, resources.auditors or train.workers"
            )
