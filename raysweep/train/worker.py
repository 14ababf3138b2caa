"""The code inside a Ray Train worker: the loops of slots and of isolated groups.

Heavy imports stay inside the functions: Ray also unpickles this module in its helper processes.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.dispatch.holder import Holder, ended_after
from raysweep.settings import BUDGET
from raysweep.train.jobs import Job, Outcome

if TYPE_CHECKING:
    from raysweep.train.loop import Resident

LOST_EXIT = 72


def serve(config: dict[str, Any]) -> None:
    """The loop of every rank of a slot: does jobs of the broker until that lets it end.

    config: `broker`, an actor handle, and `worker`, the slot's name. Rank 0 asks for jobs and reports outcomes. A single worker
    stops between two steps when it has lost its job or must leave; a group of several is ended, because its other ranks would
    wait for rank 0, and goes on from the last checkpoint.
    """
    import torch.distributed as dist

    from raysweep.train.loop import STOPPED, run

    resident, rank = set_up()
    several = dist.is_initialized() and dist.get_world_size() > 1
    end = (lambda: os._exit(LOST_EXIT)) if several else None
    holder: Holder[Job, Outcome] | None = Holder(config["broker"], config["worker"], end) if rank == 0 else None
    while True:
        item = [holder.next() if holder is not None else None]
        if several:
            dist.broadcast_object_list(item, src=0)
        job = item[0]
        if job is None:
            return
        with ended_after(job.budget_s, partial(_hand_in_overdue, holder, job)):
            outcome = run(job, resident, holder)
        if holder is not None:
            if outcome.status == STOPPED:
                holder.put_back()
            else:
                holder.finish(outcome)


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
    with ended_after(job.budget_s, overdue.touch):
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


def _hand_in_overdue(holder: Holder[Job, Outcome] | None, job: Job) -> None:
    if holder is not None:
        holder.finish(overdue_outcome(job))


def overdue_outcome(job: Job) -> Outcome:
    """The outcome of a job that exceeded its budget."""
    return Outcome("failed", f"exceeded its budget of {job.budget_s:g} s", limit=BUDGET)
