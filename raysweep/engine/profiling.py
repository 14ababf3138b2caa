"""Measures the phases of a run, and writes its time line. Neither ends a run: what fails is a warning."""

from __future__ import annotations

import contextlib
import heapq
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray

from raysweep.dispatch.leases import Span
from raysweep.engine.cluster import alive_nodes
from raysweep.engine.engine import Engine
from raysweep.engine.resources import CONTROL, Node, Plan
from raysweep.results.profile import Share, add_phase, measure_phase
from raysweep.storage.files import write_bytes

ANSWER_S = 30.0
EVENTS = 100_000  # of Ray in a time line, of some 300 bytes each: viewers hardly open larger ones
Event = dict[str, Any]


@contextlib.contextmanager
def phase(engine: Engine, name: str) -> Iterator[None]:
    """Adds the time of the block to a phase of the run's profile, also if it fails."""
    began = time.monotonic()
    try:
        yield
    finally:
        record(engine, name, began)


def record(engine: Engine, name: str, began: float) -> None:
    """Adds the time since `began`, by the monotonic clock, to a phase of the run's profile."""
    try:
        trained, audited = _spans(engine)
        ended = time.monotonic()  # after the desks have answered: to start them is part of the first phase
        engine.phases.append(Span(name, "run", began, ended))
        share = share_of(engine.plan, alive_nodes(), engine.sweep.train.executor == "warm")
        add_phase(engine.folder, measure_phase(name, began, ended, trained, audited, share))
    except Exception as error:  # such as a full disk or a cluster that is gone: the phase itself says so
        engine.events.say("warning", f"the time of the phase {name} was not recorded: {type(error).__name__}: {error}")


def share_of(plan: Plan, nodes: Sequence[Node], warm: bool) -> Share:
    """The CPUs or GPUs that the processes of a plan use at work, and those of all nodes: GPUs if it gives any to a process.

    Without GPUs each process computes in one thread. Control nodes do not count. warm: jobs are handed to slots.
    """
    able = [n for n in nodes if n.role != CONTROL]
    if plan.auditor_gpus:
        slot, auditor, total = plan.workers * plan.worker_gpus, plan.auditor_gpus, sum(n.gpus for n in able)
    else:
        slot, auditor, total = float(plan.workers), 1.0, sum(n.cpus for n in able)
    return Share(slot if warm else None, auditor, total)


def write_timeline(engine: Engine) -> None:
    """Writes the attempt's phases, jobs and audits, and the tasks that Ray has recorded, as a trace of Chrome's format."""
    offset = time.time() - time.monotonic()
    try:
        trained, audited = _spans(engine)
        own = own_events([*engine.phases, *trained, *audited], offset)
        recorded = _recorded(engine, offset)
        kept = longest(recorded, EVENTS)
        write_bytes(engine.folder.timeline, json.dumps(own + numbered(kept)).encode())
    except Exception as error:  # of what comes from outside, or a full disk; the run has its results
        engine.events.say("warning", f"no time line could be written: {type(error).__name__}: {error}")
        return
    left_out = f", without the {len(recorded) - len(kept)} shortest tasks of Ray" if len(kept) < len(recorded) else ""
    engine.events.say(
        "profile", f"time line for chrome://tracing or ui.perfetto.dev: {engine.folder.timeline}{left_out}"
    )


def _recorded(engine: Engine, offset: float) -> list[Event]:
    """Ray's tasks since the first phase began, without their parts; Ray keeps those of all jobs on a cluster, earlier ones as well."""
    try:
        events: list[Event] = ray.timeline()
    except Exception as error:  # it asks other processes, which may be busy or gone
        engine.events.say("warning", f"Ray gave no time line of its tasks: {type(error).__name__}: {error}")
        return []
    since = (min((span.began for span in engine.phases), default=0.0) + offset) * 1e6
    tasks = [event for event in events if event["cat"].startswith("task::") and event["ts"] >= since]
    return [task | {"name": task["cat"].rpartition(":")[2]} for task in tasks]  # by class, too, such as Broker.submit


def own_events(spans: Sequence[Span], offset: float) -> list[Event]:
    """Events of a trace for what the run and its workers did, a row for each worker. offset: of the epoch from the spans' clock."""
    events = [
        {"name": s.key, "cat": "raysweep", "ph": "X", "ts": (s.began + offset) * 1e6, "dur": (s.ended - s.began) * 1e6}
        | {"pid": "raysweep", "tid": s.worker, "args": {}}
        for s in spans
    ]
    return numbered(events, first=1)


def longest(events: Sequence[Event], most: int) -> list[Event]:
    """At most `most` events, the longest."""
    return list(events) if len(events) <= most else heapq.nlargest(most, events, key=lambda event: event["dur"])


def numbered(events: Iterable[Event], first: int = 2) -> list[Event]:
    """The events as viewers need them: with numbers for processes and rows, which further events name.

    Events of a row that overlap, such as the calls that an actor answers at the same time, are spread over several rows: viewers
    take them for calls inside each other. first: number of the first process.
    """
    processes: dict[str, int] = {}
    rows: dict[tuple[str, str], list[float]] = {}  # process and thread -> when each of its rows is free
    numbers: dict[tuple[str, str, int], int] = {}
    placed = []
    for event in sorted(events, key=lambda event: event["ts"]):
        process, thread, began = event["pid"], event["tid"], event["ts"]
        free = rows.setdefault((process, thread), [])
        row = next((k for k, since in enumerate(free) if since <= began), len(free))
        free[row : row + 1] = [began + event["dur"]]
        pid = processes.setdefault(process, first + len(processes))
        placed.append(event | {"pid": pid, "tid": numbers.setdefault((process, thread, row), 1 + len(numbers))})
    names: list[Event] = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
        for name, pid in processes.items()
    ]
    names += [
        {"name": "thread_name", "ph": "M", "pid": processes[process], "tid": tid, "args": {"name": thread}}
        for (process, thread, _), tid in numbers.items()
    ]
    return names + placed


def _spans(engine: Engine) -> tuple[list[Span], list[Span]]:
    """What slots and auditors did, by this machine's monotonic clock: the desks are processes of this node."""
    desks = (engine.actors.broker, engine.actors.manager)
    trained, audited = ray.get([desk.spans.remote() for desk in desks], timeout=ANSWER_S)
    return trained, audited
