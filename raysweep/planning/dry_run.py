"""What a sweep would do and cost, without starting it: timed on a few steps and one audit of each tier."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from methods.base import Method
from raysweep.audit.measure import measure, subject_of
from raysweep.config.schema import Sweep
from raysweep.engine.cached_jobs import cached
from raysweep.engine.resources import Plan
from raysweep.models import families
from raysweep.registry import EVALUATORS, attacks, checks_by_weights, names, resolve
from raysweep.rundir import RunDir
from raysweep.search.spaces import Space
from raysweep.tasks.records import data_lines
from raysweep.tasks.task import Task, encoded

STEPS = 3
STARTUP_S = 30.0  # processes of Ray and their imports on two cores; see benchmarks/README.md


@dataclass(frozen=True)
class Estimate:
    """Seconds by part, as measured on this machine; `wall` divides by what the plan does at once."""

    prepare: float
    search: float
    audit: float
    wall: float
    step_seconds: dict[str, float]
    probe_s: float
    audit_s: float
    cached: dict[str, bool]


def estimate(sweep: Sweep, task: Task, spaces: list[Space], plan: Plan) -> Estimate:
    """Times a few optimiser steps of every method and one audit per tier on an untrained model of the same shape."""
    from evaluators.judge import Judge

    torch.set_num_threads(1)
    found = cached(sweep, task, RunDir.of(sweep))
    inputs = encoded(task, families.example(task))
    steps = {s.method: _time_steps(s.method, typical(s), inputs) for s in spaces}
    retrain = _time_steps("retrain", task.recipe, inputs)
    judge = Judge(task.splits["judge_probe"].x.shape[1], int(task.splits["judge_probe"].groups.max()) + 1)
    probe_s, audit_s = (
        measure(subject_of(families.example(task), task, judge, tier), tier).seconds
        for tier in (sweep.audit.probe, sweep.audit.audit)
    )
    missing = [name for name, there in found.items() if not there and not name.startswith("judge")]
    prepare = retrain * task.recipe["steps"] * len(missing)
    trials = sweep.search.trials // len(spaces)
    train = sum(trials * steps[s.method] * typical(s).get("steps", 1) for s in spaces)
    search = train + sweep.search.trials * probe_s
    audited = sweep.audit.top + sweep.oracles + 2
    audit = audited * audit_s + (sweep.oracles + 2) * probe_s
    lanes = max(1, min(plan.slots * plan.workers, os.cpu_count() or 1)) if not plan.worker_gpus else plan.slots
    wall = (
        STARTUP_S
        + prepare / min(lanes, max(1, len(missing)))
        + search / lanes
        + audit / min(plan.auditors + plan.late_auditors, os.cpu_count() or 1)
    )
    return Estimate(prepare, search, audit, wall, steps, probe_s, audit_s, found)


def untested(sweep: Sweep, task: Task) -> list[str]:
    """What the audit of this sweep leaves open, for people."""
    checks = set(sweep.audit.audit.checks_for(task))
    made = set(sweep.audit.durability.checks_for(task)) if sweep.audit.finalists else set()
    by_weights = checks_by_weights()
    costly = {name for name, check in EVALUATORS.items() if check.costly}
    left_out = [n for n in names("evaluator") if n not in (*checks, *made, *attacks(), *by_weights)]
    lines = [f"check {name!r} is left out" + (" for its cost" if name in costly else "") for name in left_out]
    lines += [f"check {n!r}: needs audit.audit.weights.{key}" for n, key in by_weights.items() if n not in checks]
    lines += [
        f"check {name!r} does not apply to a task of kind {task.kind!r}"
        for name in sorted(checks)
        if task.kind not in resolve("evaluator", name).kinds
    ]
    lines += [f"attack {name!r} is switched off" for name in attacks() if name not in made]
    lines += ["adversarial prompts"]
    if sweep.oracles < 3:
        lines.append(f"{sweep.oracles} oracles: too few for an interval on the oracle's own spread")
    return lines


def describe(sweep: Sweep, task: Task, spaces: list[Space], plan: Plan) -> list[tuple[str, str]]:
    """(topic, text) of everything that a dry run tells."""
    cost = estimate(sweep, task, spaces, plan)
    found = ", ".join(name for name, there in cost.cached.items() if there)
    share = sweep.search.trials // len(sweep.methods)
    return [
        ("task", f"{task.name}: forget {len(task.splits['forget'])}, retain {len(task.splits['retain'])} images"),
        *(("data", line) for line in data_lines(task)),
        ("search", f"{sweep.search.trials} trials: {share} each of {', '.join(sweep.methods)}; {sweep.search.sampler}"),
        ("cluster", plan.describe()),
        ("prepare", f"{cost.prepare:.0f} s of training; in the cache: {found or 'nothing'}"),
        ("trials", f"{cost.search:.0f} s of work; one step: "
         + ", ".join(f"{n} {s * 1000:.0f} ms" for n, s in cost.step_seconds.items())),
        ("audits", f"probe {cost.probe_s:.1f} s per trial, audit {cost.audit_s:.1f} s x up to "
         f"{sweep.audit.top + sweep.oracles + 2}"),
        ("total", f"about {cost.wall / 60:.1f} min (estimate: {STEPS} timed steps per method and one timed audit per tier)"),
        ("seeds", f"probe {sweep.audit.probe.seed}, audit {sweep.audit.audit.seed}; judges and their images disjoint: yes"),
        ("views", f"residue: worst of {', '.join(task.views)}; damage: {task.quality}"),
        *(("untested", line) for line in untested(sweep, task)),
    ]  # fmt: skip


def typical(space: Space) -> dict[str, Any]:
    """Settings in the middle of a space: the first enqueued point, else the geometric middle of steps."""
    values = dict(space.fixed)
    for p in space.parameters:
        if p.open:
            continue
        values[p.name] = p.values[0]
        if p.name == "steps":
            values[p.name] = round((p.values[0] * p.values[-1]) ** 0.5)
    return values | {k: v for k, v in (space.points[0].values if space.points else {}).items() if k != "steps"}


def _time_steps(name: str, settings: dict[str, Any], task: Task) -> float:
    """Median seconds of a step on a task as its network takes it, after one that warms up; 0 for a method without steps."""
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
