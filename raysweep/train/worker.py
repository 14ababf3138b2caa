"""The code inside a Ray Train worker: the loops of warm and of isolated groups, and the timer of a job's budget.

Heavy imports stay inside the functions: Ray also unpickles this module in its helper processes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raysweep.settings import BUDGET
from raysweep.train.jobs import Job, Outcome

if TYPE_CHECKING:
    from raysweep.train.loop import Resident

OVERDUE_EXIT = 70


def serve(config: dict[str, Any]) -> None:
    """The loop of every rank of a warm group: does jobs of the broker until that is closed.

    config: `broker`, an actor handle, and `slot`, the number of the group. Rank 0 asks for jobs and reports outcomes.
    """
    import torch.distributed as dist

    from raysweep.train.loop import run

    broker, slot = config["broker"], config["slot"]
    resident, rank = set_up()
    worker = ray.get_runtime_context().current_actor
    fresh = True
    while True:
        item = [ray.get(broker.next.remote(slot, fresh, worker)) if rank == 0 else None]
        fresh = False
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(item, src=0)
        job = item[0]
        if job == "stop":
            return
        if job == "wait":
            continue
        assert isinstance(job, Job)

        def progress(job_id: str, step: int, steps: int, value: float) -> None:
            broker.note.remote(job_id, step, steps, value)

        def report(outcome: Outcome, job: Job = job) -> None:
            ray.get(broker.finish.remote(slot, job.id, outcome))

        with budget(job, report if rank == 0 else None):
            outcome = run(job, resident, progress)
        if rank == 0:
            report(outcome)


def run_one(config: dict[str, Any]) -> Outcome:
    """The loop of every rank of an isolated group: does one job.

    config: `job`, and `overdue`, a file that marks that an attempt ran out of time. Ray Train starts the group again after
    the timer has ended it; the mark then makes it report the reason instead of trying once more.
    """
    from raysweep.train.loop import run

    job: Job = config["job"]
    overdue = Path(config["overdue"])
    if overdue.exists():
        return overdue_outcome(job)
    resident, _ = set_up()
    with budget(job, lambda _: overdue.touch()):
        return run(job, resident)


def set_up() -> tuple[Resident, int]:
    """(the worker's memory between jobs, on its device; its rank)."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from raysweep.train.loop import Resident

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several workers share the cores; with more threads they would wait for one another
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Resident(get_device()), rank


@contextlib.contextmanager
def budget(job: Job, report: Callable[[Outcome], object] | None) -> Iterator[None]:
    """Ends this process if the block takes longer than the job's budget, after `report` has taken the failed outcome.

    Ray Train then starts the group again.
    """

    def expire() -> None:
        try:
            if report is not None:
                report(overdue_outcome(job))
        finally:  # even if the report fails, so that no caller waits for this process
            os._exit(OVERDUE_EXIT)

    timer = threading.Timer(job.budget_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def overdue_outcome(job: Job) -> Outcome:
    """The outcome of a job that exceeded its budget."""
    return Outcome("failed", f"exceeded its budget of {job.budget_s:g} s", limit=BUDGET)
