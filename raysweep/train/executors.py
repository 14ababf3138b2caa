"""Two ways to run jobs on Ray Train workers, behind one interface: `executor.run(job) -> Outcome`.

warm      one long-lived TorchTrainer per slot. Rank 0 of each asks the broker, an actor, for the next job and passes it to
          its group. A job whose worker died is handed out again, at most `ATTEMPTS` times.
isolated  one TorchTrainer per job, for jobs of many nodes and for methods that are not trusted.

A job that exceeds its budget is ended by a timer inside its worker, which reports the failure and exits; Ray Train then
brings the group back.

Heavy imports stand inside functions: Ray unpickles this module in its helper processes, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raysweep.settings import BUDGET
from raysweep.storage.files import digest_of, temporary_path
from raysweep.train.jobs import Job, Outcome, finished

if TYPE_CHECKING:
    from raysweep.train.loop import Resident

ATTEMPTS = 3
POLL_S = 20.0
NAMESPACE = "raysweep"
ENDED = "the run has ended"


def actor_name(kind: str, run: str | Path, run_id: str) -> str:
    """Name of an actor of the run in the folder `run`: others on the cluster may run the same config in a folder of their own."""
    return f"{kind}-{run_id}-{digest_of(str(run))}"


class Executor(Protocol):
    """Runs a job somewhere and waits for it. stop: makes whoever waits for a job in this process wait no longer."""

    def run(self, job: Job) -> Outcome: ...
    def stop(self) -> None: ...


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)
class Broker:
    """The queue of jobs between those who wait for them and the warm groups that do them."""

    def __init__(self) -> None:
        self.queue: deque[str] = deque()
        self.jobs: dict[str, Job] = {}
        self.futures: dict[str, asyncio.Future] = {}
        self.running: dict[int, str] = {}
        self.attempts: dict[str, int] = {}
        self.progress: dict[str, tuple[int, int, float]] = {}
        self.closed = False
        self.changed = asyncio.Event()
        self.ended: dict[int, float] = {}
        self.idle, self.first, self.last = 0.0, 0.0, 0.0

    async def submit(self, job: Job) -> dict[str, Any]:
        """Waits for the job's outcome; the same job submitted twice is done once. RuntimeError if the run ends before."""
        if self.closed:
            raise RuntimeError(ENDED)
        if job.id not in self.futures:
            self.jobs[job.id], self.futures[job.id] = job, asyncio.get_running_loop().create_future()
            self.queue.append(job.id)
            self.changed.set()
        return await asyncio.shield(self.futures[job.id])

    async def next(self, slot: int, fresh: bool) -> Job | str:
        """A job for a slot, "wait" after a while without one, or "stop". `fresh`: the slot's group has just started,
        so whatever it was doing is lost and has to be done again."""
        if fresh and slot in self.running:
            self._redeliver(self.running.pop(slot))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                while not self.queue and not self.closed:
                    self.changed.clear()
                    await self.changed.wait()
        if self.closed:
            return "stop"
        if not self.queue:
            return "wait"
        job_id = self.queue.popleft()
        self.running[slot] = job_id
        now = time.monotonic()
        self.idle += now - self.ended.pop(slot, now)
        self.first = self.first or now
        self.attempts[job_id] = self.attempts.get(job_id, 0) + 1
        return self.jobs[job_id]

    async def finish(self, slot: int, job_id: str, outcome: dict[str, Any]) -> None:
        """Takes a job's outcome; only the first one counts."""
        if self.running.get(slot) == job_id:
            del self.running[slot]
            self.ended[slot] = self.last = time.monotonic()
        self.progress.pop(job_id, None)
        self._settle(job_id, outcome)

    async def note(self, job_id: str, done: int, steps: int, value: float) -> None:
        """Takes a sign of life of a running job."""
        self.progress[job_id] = (done, steps, value)

    async def state(self) -> dict[str, Any]:
        """Queue length, running jobs by slot, and progress by job."""
        return {"queued": len(self.queue), "running": dict(self.running), "progress": dict(self.progress)}

    async def watch(self) -> None:
        """Starts to count how long slots stand idle between two jobs."""
        self.ended.clear()
        self.idle, self.first, self.last = 0.0, 0.0, 0.0

    async def waited(self, slots: int) -> float | None:
        """The share of the slots' time, between the first job since `watch` and the end of the last, in which they had no
        job: they waited for suggestions, which wait for audits. None without two jobs."""
        span = (self.last - self.first) * slots
        return self.idle / span if self.first and span > 0 else None

    async def close(self) -> int:
        """Lets the groups end, each after the job it is at; the number of those. Nobody waits for a job any more."""
        self.closed = True
        self.changed.set()
        for future in self.futures.values():
            if not future.done():
                future.set_exception(RuntimeError(ENDED))
        return len(self.running)

    def _redeliver(self, job_id: str) -> None:
        if job_id in self.futures and self.futures[job_id].done():
            return
        if self.attempts.get(job_id, 0) >= ATTEMPTS:
            self._settle(job_id, asdict(Outcome("failed", f"its worker died {ATTEMPTS} times")))
        else:
            self.queue.appendleft(job_id)
            self.changed.set()

    def _settle(self, job_id: str, outcome: dict[str, Any]) -> None:
        future = self.futures.get(job_id)
        if future is not None and not future.done():
            future.set_result(outcome)


class Warm:
    """Hands jobs to the warm groups through the broker."""

    def __init__(self, broker: ActorHandle):
        self.broker = broker

    def run(self, job: Job) -> Outcome:
        return finished(job) or Outcome(**ray.get(self.broker.submit.remote(job)))

    def stop(self) -> None:
        """Nothing to do: the broker lets go of all who wait when the groups are stopped."""


class Isolated:
    """Starts one TorchTrainer per job, in a process of its own, which can be stopped."""

    def __init__(self, scaling: ScalingConfig, storage: str):
        self.scaling, self.storage = scaling, storage
        self.waiting: set[ray.ObjectRef] = set()

    def run(self, job: Job) -> Outcome:
        before = finished(job)
        if before is not None:
            return before
        reference = _fit.remote(job, self.scaling, self.storage)
        self.waiting.add(reference)
        try:
            return ray.get(reference)
        finally:
            self.waiting.discard(reference)

    def stop(self) -> None:
        for reference in list(self.waiting):
            ray.cancel(reference, force=True)


@ray.remote(num_cpus=0, max_retries=ATTEMPTS - 1)
def _fit(job: Job, scaling: ScalingConfig, storage: str) -> Outcome:
    """Trains a job by a TorchTrainer. The Train run is named by the job, because Train resumes by name.

    A worker that ran out of time says so by a file of this attempt alone, which its successor reads: the job may be asked for
    again with a longer budget.
    """
    from ray.train.torch import TorchTrainer

    name = f"{job.id}-{job.digest}"
    overdue = temporary_path(Path(storage) / f"{name}.overdue")
    overdue.parent.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _single,
        train_loop_config={"job": job, "overdue": str(overdue)},
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=ATTEMPTS - 1, controller_failure_limit=20),
        ),
    )
    try:
        return Outcome(**trainer.fit().return_value)
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()
        return Outcome("failed", f"its workers died {ATTEMPTS} times ({reason[-1] if reason else 'no reason given'})")
    finally:
        overdue.unlink(missing_ok=True)


def start_group(broker: ActorHandle, slot: int, scaling: ScalingConfig, storage: str) -> threading.Thread:
    """Starts a warm group in the background; it ends when the broker is closed."""

    def serve() -> None:
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            _serve,
            train_loop_config={"broker": broker, "slot": slot},
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"group-{slot}-{uuid.uuid4().hex[:16]}",  # a name that was there would be resumed
                storage_path=storage,
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=20),
            ),
        )
        # Ray raises SystemExit in threads that wait when it shuts down
        with contextlib.suppress(ray.exceptions.RayError, ray.train.TrainingFailedError, SystemExit):
            trainer.fit()

    thread = threading.Thread(target=serve, name=f"group-{slot}", daemon=True)
    thread.start()
    return thread


def stop_groups(broker: ActorHandle, groups: Iterable[threading.Thread]) -> None:
    """Ends the warm groups and waits for their threads: one that is still inside Ray while Ray is shut down can take the
    process with it. Groups without a job end within seconds; for one that is at work the wait is short."""
    busy = 0
    with contextlib.suppress(ray.exceptions.RayError):
        busy = ray.get(broker.close.remote(), timeout=5)
    deadline = time.monotonic() + (10 if busy else 60)
    for group in groups:
        group.join(max(0.0, deadline - time.monotonic()))


def _serve(config: dict[str, Any]) -> None:
    """The loop of every rank of a warm group."""
    import torch.distributed as dist

    from raysweep.train.loop import run

    broker, slot = config["broker"], config["slot"]
    resident, rank, fresh = _worker_setup()
    while True:
        item = [ray.get(broker.next.remote(slot, fresh)) if rank == 0 else None]
        fresh = False
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(item, src=0)
        job = item[0]
        if job == "stop":
            return
        if job == "wait":
            continue
        assert isinstance(job, Job)

        def progress(job_id: str, done: int, steps: int, value: float) -> None:
            if done % 25 == 0 or done == steps:
                broker.note.remote(job_id, done, steps, value)

        def report(outcome: Outcome, job: Job = job) -> None:
            ray.get(broker.finish.remote(slot, job.id, asdict(outcome)))

        with _budget(job, report if rank == 0 else None):
            outcome = run(job, resident, progress)
        if rank == 0:
            report(outcome)


def _single(config: dict[str, Any]) -> dict[str, Any]:
    """The loop of every rank of a group made for one job."""
    from raysweep.train.loop import run

    job: Job = config["job"]
    overdue = Path(config["overdue"])
    if overdue.exists():  # the group was brought back after the timer ended it: say why instead of trying again
        return asdict(_overdue(job))
    resident, _, _ = _worker_setup()
    with _budget(job, lambda _: overdue.touch()):
        return asdict(run(job, resident))


def _worker_setup() -> tuple[Resident, int, bool]:
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from raysweep.train.loop import Resident

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several workers share the cores; more threads each only wait for one another
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Resident(get_device()), rank, True


@contextlib.contextmanager
def _budget(job: Job, report: Any):
    """Ends this process if the block takes longer than the job's budget."""

    def expire() -> None:
        try:
            if report is not None:
                report(_overdue(job))
        finally:  # whatever becomes of the report, nobody waits for this process any longer
            os._exit(70)

    timer = threading.Timer(job.budget_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _overdue(job: Job) -> Outcome:
    return Outcome("failed", f"exceeded its budget of {job.budget_s:g} s", limit=BUDGET)
