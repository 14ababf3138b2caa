"""The broker: an actor that queues jobs for the warm worker groups and returns each outcome to its callers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from raysweep.storage.files import digest_of
from raysweep.train.jobs import Job, Outcome

NAMESPACE = "raysweep"
ATTEMPTS = 3  # at one job, before it counts as failed
POLL_S = 20.0  # seconds after which a group is told that there is no job
ENDED = "the run has ended"


def actor_name(kind: str, run: str | Path, run_id: str) -> str:
    """Name of an actor of the run in the folder `run`: others on the cluster may run the same config in another folder."""
    return f"{kind}-{run_id}-{digest_of(str(run))}"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)
class Broker:
    """The queue between callers that wait for jobs and the warm groups that run them.

    A job whose worker died is handed out again, at most `ATTEMPTS` times in all.
    """

    def __init__(self) -> None:
        self.queue: deque[str] = deque()
        self.jobs: dict[str, Job] = {}
        self.futures: dict[str, asyncio.Future[Outcome]] = {}
        self.running: dict[int, str] = {}  # slot -> job
        self.workers: dict[int, ActorHandle] = {}  # slot -> the actor of its group's rank 0
        self.attempts: dict[str, int] = {}
        self.progress: dict[str, tuple[int, int, float]] = {}  # job -> (step, steps, value)
        self.closed = False
        self.changed = asyncio.Event()
        self.ended: dict[int, float] = {}  # slot without a job -> since when
        self.idle, self.first, self.last = 0.0, 0.0, 0.0

    async def submit(self, job: Job) -> Outcome:
        """Waits for a job's outcome; a job that is submitted twice is done once. RuntimeError if the run ends before."""
        if self.closed:
            raise RuntimeError(ENDED)
        if job.id not in self.futures:
            self.jobs[job.id], self.futures[job.id] = job, asyncio.get_running_loop().create_future()
            self.queue.append(job.id)
            self.changed.set()
        return await asyncio.shield(self.futures[job.id])

    async def next(self, slot: int, fresh: bool, worker: ActorHandle) -> Job | str:
        """A job for a slot; "wait" if there is none for a while; "stop" once the broker is closed.

        fresh: the slot's group has just started, so the job it had is lost and has to be done again. worker: the actor that asks.
        """
        self.workers[slot] = worker
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

    async def finish(self, slot: int, job_id: str, outcome: Outcome) -> None:
        """Takes a job's outcome; only the first one counts."""
        if self.running.get(slot) == job_id:
            del self.running[slot]
            self.ended[slot] = self.last = time.monotonic()
        self.progress.pop(job_id, None)
        self._settle(job_id, outcome)

    async def note(self, job_id: str, step: int, steps: int, value: float) -> None:
        """Takes the progress of a running job: steps done, steps in all, the method's first diagnostic."""
        self.progress[job_id] = (step, steps, value)

    async def state(self) -> dict[str, Any]:
        """Length of the queue, running jobs by slot, and progress by job."""
        return {"queued": len(self.queue), "running": dict(self.running), "progress": dict(self.progress)}

    async def watch(self) -> None:
        """Restarts the measurement of `waited`."""
        self.ended.clear()
        self.idle, self.first, self.last = 0.0, 0.0, 0.0

    async def waited(self, slots: int) -> float | None:
        """Share of time in which slots were idle, from the first job since `watch` to the end of the last; None without jobs.

        Idle slots wait for suggestions, which wait for audits.
        """
        span = (self.last - self.first) * slots
        return self.idle / span if self.first and span > 0 else None

    async def close(self) -> list[ActorHandle]:
        """Stops all waiting for jobs and lets every group end that asks for one; returns the workers that are at work."""
        self.closed = True
        self.changed.set()
        for future in self.futures.values():
            if not future.done():
                future.set_exception(RuntimeError(ENDED))
        return [self.workers[slot] for slot in self.running]

    def _redeliver(self, job_id: str) -> None:
        if job_id in self.futures and self.futures[job_id].done():
            return
        if self.attempts.get(job_id, 0) >= ATTEMPTS:
            self._settle(job_id, Outcome("failed", f"its worker died {ATTEMPTS} times"))
        else:
            self.queue.appendleft(job_id)
            self.changed.set()

    def _settle(self, job_id: str, outcome: Outcome) -> None:
        future = self.futures.get(job_id)
        if future is not None and not future.done():
            future.set_result(outcome)
