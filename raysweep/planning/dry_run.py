"""The dry run: what a sweep would do and cost, estimated from a few timed steps and one audit of each tier."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from methods.base import Method
from raysweep.auditing.measure import measure, subject_of
from raysweep.auditing.untested import applies, few_oracles, left_out, not_implemented
from raysweep.config.schema import Sweep, Tier
from raysweep.engine.cached_jobs import cached
from raysweep.engine.resources import Plan
from raysweep.models import families
from raysweep.planning import disk
from raysweep.planning.utilisation import in_words, simulated
from raysweep.registry import resolve
from raysweep.rundir import RunDir
from raysweep.search.spaces import Space
from raysweep.search.utilisation import Timeline
from raysweep.tasks.records import data_lines
from raysweep.tasks.task import Task, encoded

STEPS = 3
STARTUP_S = 30.0  # processes of Ray and their imports on two cores; see benchmarks/README.md


@dataclass(frozen=True)
class Estimate:
    """Seconds of work by part, from timings on this machine; `wall`: of the sweep, with what its plan runs in parallel.

    step_seconds: method -> seconds per step. probe_s, audit_s: of one model. slots: the search in simulated time. cached: artifact ->
    whether the cache has it.
    """

    prepare: float
    search: float
    audit: float
    wall: float
    step_seconds: dict[str, float]
    probe_s: float
    audit_s: float
    slots: Timeline
    cached: dict[str, bool]


def estimate(sweep: Sweep, task: Task, spaces: list[Space], plan: Plan) -> Estimate:
    """Times a few optimiser steps of every method and one audit per tier on an untrained model of the base's architecture."""
    in_cache = cached(sweep, task, RunDir.of(sweep))
    inputs = encoded(task, families.example(task))
    with _one_thread():
        steps = {space.method: _time_steps(space.method, typical(space), inputs) for space in spaces}
        retrain = _time_steps("retrain", task.recipe, inputs)
        probe_s, audit_s = (_time_audit(task, tier) for tier in (sweep.audit.probe, sweep.audit.audit))
    untrained = [name for name, exists in in_cache.items() if not exists and not name.startswith("judge")]
    prepare = retrain * task.recipe["steps"] * len(untrained)
    trials = sweep.search.trials // len(spaces)
    train = sum(trials * steps[space.method] * typical(space).get("steps", 1) for space in spaces)
    search = train + sweep.search.trials * probe_s
    slots = simulated(sweep, spaces, plan, steps, probe_s)
    audited = sweep.audit.top + sweep.oracles + 2
    audit = audited * audit_s + (sweep.oracles + 2) * probe_s
    cpus = os.cpu_count() or 1
    lanes = plan.slots if plan.worker_gpus else max(1, min(plan.slots * plan.workers, cpus))
    searching = slots.seconds if plan.worker_gpus else search / lanes / (slots.busy or 1.0)
    wall = (
        STARTUP_S
        + prepare / min(lanes, max(1, len(untrained)))
        + searching
        + audit / min(plan.auditors + plan.late_auditors, cpus)
    )
    return Estimate(prepare, search, audit, wall, steps, probe_s, audit_s, slots, in_cache)


def not_tested(sweep: Sweep, task: Task) -> list[str]:
    """Sentences on what the audit of this sweep does not test."""
    audit = sweep.audit
    tiers = {"audit": audit.audit} | ({"durability": audit.durability} if audit.finalists else {})
    misfits = {n for tier in tiers.values() for n in tier.checks_for(task) if not applies(n, task)}
    lines = [f"Checks that do not apply to this task: {', '.join(sorted(misfits))}."] if misfits else []
    oracles = len(sweep.oracle_models) or sweep.oracles
    return lines + left_out(task, tiers) + not_implemented(task) + few_oracles(oracles)


def describe(sweep: Sweep, task: Task, spaces: list[Space], plan: Plan) -> list[tuple[str, str]]:
    """The lines of a dry run: (topic, text)."""
    cost = estimate(sweep, task, spaces, plan)
    in_cache = ", ".join(name for name, exists in cost.cached.items() if exists) or "nothing"
    share = sweep.search.trials // len(sweep.methods)
    audited = sweep.audit.top + sweep.oracles + 2
    steps = ", ".join(f"{method} {seconds * 1000:.0f} ms" for method, seconds in cost.step_seconds.items())
    sizes = disk.sizes(sweep, families.example(task))
    retrained = (0 if task.given_base else 1) + (0 if sweep.oracle_models else sweep.oracles)
    basis = f"{STEPS} timed steps per method and one timed audit per tier"
    seeds = ", ".join(f"{n} {_seed_in_words(getattr(sweep.audit, n))}" for n in ("probe", "audit", "durability"))
    return [
        ("task", f"{task.name}: forget {len(task.splits['forget'])}, retain {len(task.splits['retain'])} images"),
        *(("data", line) for line in data_lines(task)),
        ("search", f"{sweep.search.trials} trials: {share} each of {', '.join(sweep.methods)}; {sweep.search.sampler}"),
        ("cluster", plan.describe()),
        ("slots", in_words(sweep, plan, cost.slots)),
        ("prepare", f"{cost.prepare:.0f} s of training; in the cache: {in_cache}"),
        ("trials", f"{cost.search:.0f} s of work; one step: {steps}"),
        ("audits", f"probe {cost.probe_s:.1f} s per trial, audit {cost.audit_s:.1f} s x up to {audited}"),
        ("disk", disk.of(sweep, plan, *sizes, retrained).in_words(sweep.candidates.keep)),
        ("total", f"about {cost.wall / 60:.1f} min (estimate: {basis})"),
        ("seeds", f"{seeds}; judges and their images disjoint: yes"),
        ("views", f"residue: worst of {', '.join(task.views)}; damage: {task.quality}"),
        *(("untested", line) for line in not_tested(sweep, task)),
    ]


def typical(space: Space) -> dict[str, Any]:
    """Settings to estimate a space by: its first point, else the low ends of its ranges; steps: their geometric mean."""
    values = dict(space.fixed)
    for parameter in space.parameters:
        if parameter.open:
            continue
        values[parameter.name] = parameter.values[0]
        if parameter.name == "steps":
            values[parameter.name] = round((parameter.values[0] * parameter.values[-1]) ** 0.5)
    return values | {k: v for k, v in (space.points[0].values if space.points else {}).items() if k != "steps"}


def _time_steps(name: str, settings: dict[str, Any], task: Task) -> float:
    """Median seconds of a step after the first one, on a task as its network takes it; 0 for a method without steps."""
    method_class: type[Method] = resolve("method", name)
    model, hp = families.example(task), method_class.Hyperparameters(**settings)
    quick = hp.model_copy(update=method_class.quick)
    method = method_class(model, hp, method_class.prepare(model, task, 0, quick), task.goal)
    times = []
    for step in range(min(method.steps, STEPS + 1)):
        started = time.perf_counter()
        method.step(task.batch(method.draws(), 0, step))
        times.append(time.perf_counter() - started)
    return sorted(times[1:] or [0.0])[len(times[1:]) // 2]


def _seed_in_words(tier: Tier) -> str:
    return "drawn when the run starts" if tier.seed is None else str(tier.seed)


def _time_audit(task: Task, tier: Tier) -> float:
    """Seconds of an audit of an untrained model by an untrained judge; in the task's number of sampling steps if it is drawn."""
    from evaluators.judge import Judge

    tier = tier.model_copy(update={"seed": tier.seed or 0, "sampling_steps": tier.sampling_steps or 0})

    split = task.splits["judge_probe"]
    judge = Judge(split.x.shape[1], int(split.groups.max()) + 1)
    return measure(subject_of(families.example(task), task, judge, tier), tier).seconds


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread, as train workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
