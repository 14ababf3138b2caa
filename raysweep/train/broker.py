"""The broker: an actor that hands jobs to the slots and returns each outcome to its callers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import ray
from ray.util.metrics import Gauge

from raysweep.dispatch.desk import CALLS, Assignment, Desk
from raysweep.storage.files import digest_of
from raysweep.train.jobs import Job, Outcome

NAMESPACE = "raysweep"
ATTEMPTS = 3  # at one job, before it counts as failed


def actor_name(kind: str, run: str | Path, run_id: str) -> str:
    """Name of an actor of the run in the folder `run`: others on the cluster may run the same config in another folder."""
    return f"{kind}-{run_id}-{digest_of(str(run))}"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=CALLS)
class Broker(Desk[Job, Outcome]):
    """The desk of the train jobs.

    A job whose worker died is handed out again, at most `ATTEMPTS` times in all; progress is (step, steps, the method's first
    diagnostic). run: what its metrics are tagged with.
    """

    def __init__(self, run: str = ""):
        super().__init__(ATTEMPTS)
        self.run = run
        self.usage = Usage()
        self.gauges = {
            "slots": Gauge("raysweep_slots", "slots that train, and that wait for a job", ("run", "state")),
            "queued": Gauge("raysweep_jobs_queued", "train jobs that wait for a slot", ("run",)),
        }

    def failure(self, key: str, reason: str) -> Outcome:
        return Outcome("failed", f"{reason} ({ATTEMPTS} times)")

    async def next(self, worker: str, node: str, fresh: bool) -> Assignment[Job] | Literal["wait", "stop"]:
        answer = await super().next(worker, node, fresh)
        self._measure()
        return answer

    async def record(self, key: str, outcome: Outcome) -> None:
        self._measure()

    def count(self, queued: int, busy: int, idle: int) -> None:
        self.gauges["queued"].set(queued, {"run": self.run})
        for state, number in (("busy", busy), ("idle", idle)):
            self.gauges["slots"].set(number, {"run": self.run, "state": state})

    async def watch(self) -> None:
        """Restarts the measurement of `waited`."""
        self.usage = Usage()

    async def waited(self) -> float | None:
        """Share of time in which slots were idle, from the first job since `watch` to the end of the last; None without jobs.

        Idle slots wait for suggestions, which wait for audits.
        """
        return self.usage.idle

    def _measure(self) -> None:
        self.usage.change(len(self.nodes), len(self.leases.works), time.monotonic())


class Usage:
    """How long workers were there, and how long they worked."""

    def __init__(self) -> None:
        self.there = self.worked = 0.0  # worker-seconds
        self.idle: float | None = None  # share of time until the last end of a task
        self._workers = self._busy = 0
        self._since: float | None = None

    def change(self, workers: int, busy: int, now: float) -> None:
        """Takes the number of workers, and of those at work, from a time on."""
        if self._since is not None:
            self.there += self._workers * (now - self._since)
            self.worked += self._busy * (now - self._since)
        if busy < self._busy and self.there:
            self.idle = 1 - self.worked / self.there
        if busy or self._since is not None:
            self._workers, self._busy, self._since = workers, busy, now
