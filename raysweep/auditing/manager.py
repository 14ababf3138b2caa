"""The audit manager: leases each request to an auditor once, and keeps a log of finished audits on disk.

An append-only log in the run directory, flushed to disk at every line, records the end of each audit by its key. A manager
that was killed replays it; Ray retries the callers' pending calls, which find the answer or queue up again. An auditor that
dies or hangs costs one of its request's attempts; after the last one the request is recorded as failed. The code here stays
trivial, because Ray retries every call that kills this actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.metrics import Gauge

from raysweep.auditing.request import Answer, AuditRequest, Outcome
from raysweep.settings import TIMEOUT

LOG = "audits.jsonl"
RETRY_S = 0.5


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)
class AuditManager:
    """Serves `audit(request)` with a pool of auditors, which are named actors.

    attempts: per request; timeout_s: seconds after which an audit counts as hung.
    """

    def __init__(self, run: str, auditors: list[str], namespace: str, attempts: int, timeout_s: float):
        self.path, self.attempts, self.timeout_s = Path(run) / LOG, attempts, timeout_s
        self.done: dict[str, Outcome] = read_log(self.path)
        self.pending: dict[str, asyncio.Task[Outcome]] = {}
        self.starting: set[asyncio.Task[None]] = set()
        self.callers: set[asyncio.Task[Outcome]] = set()
        self.closed = False
        self.idle: asyncio.PriorityQueue[tuple[int, ActorHandle]] = asyncio.PriorityQueue()
        self.namespace, self.known, self.waiting = namespace, 0, 0
        self.run = Path(run).name
        self.gauges = {
            "queue": Gauge("raysweep_audit_queue", "audits requested and not started", ("run",)),
            "seconds": Gauge("raysweep_audit_seconds", "seconds of the last audit", ("run", "tier")),
            "images": Gauge(
                "raysweep_audit_images_per_second", "images generated per second of the last audit", ("run", "tier")
            ),
        }
        self.add(auditors)

    def add(self, auditors: list[str]) -> None:
        """Adds auditors by the names of their actors."""
        for name in auditors:
            self._expect(self.known, ray.get_actor(name, namespace=self.namespace))
            self.known += 1

    async def audit(self, request: AuditRequest) -> Outcome:
        """Waits for the end of an audit; raises RuntimeError if the run ends first."""
        if request.key in self.done:
            return self.done[request.key]
        if self.closed:
            raise RuntimeError("the run has ended")
        if request.key not in self.pending:
            self.pending[request.key] = asyncio.ensure_future(self._lease(request))
            self._queued(1)
        caller = asyncio.current_task()
        assert caller is not None
        self.callers.add(caller)
        try:
            return await asyncio.shield(self.pending[request.key])
        except asyncio.CancelledError:
            raise RuntimeError("the run has ended") from None
        finally:
            self.callers.discard(caller)

    async def close(self) -> None:
        """Answers all waiting callers with an error, and returns when they have it; audits in progress are lost."""
        self.closed = True
        for lease in self.pending.values():
            lease.cancel()
        if self.callers:
            await asyncio.wait(self.callers)

    async def state(self) -> dict[str, int]:
        """Counts of audits done, pending (running or waiting) and waiting, and of idle auditors."""
        counts = {"done": len(self.done), "pending": len(self.pending), "waiting": self.waiting}
        return counts | {"idle": self.idle.qsize()}

    async def pid(self) -> int:
        """The id of this process, for tests that kill it."""
        return os.getpid()

    async def _lease(self, request: AuditRequest) -> Outcome:
        reason = limit = ""
        for _ in range(self.attempts):
            number, auditor = await self.idle.get()
            self._queued(-1)
            up, limit = True, ""
            try:
                answer = await asyncio.wait_for(_ask(auditor, request), self.timeout_s)
                tags = {"run": self.run, "tier": request.tier_name}
                self.gauges["seconds"].set(answer["seconds"], tags)
                self.gauges["images"].set(answer["images"] / max(answer["seconds"], 1e-9), tags)
                outcome: Outcome = {"status": "ok", "reason": "", **answer}  # type: ignore[typeddict-item]
                return self._end(request.key, outcome)
            except TimeoutError:
                reason, limit = f"no answer within {self.timeout_s:g} s", TIMEOUT
                ray.kill(auditor, no_restart=False)
                up = False
            except ray.exceptions.RayActorError:
                reason = "the auditor died"
                up = False
            except ray.exceptions.RayTaskError as error:
                reason = f"{type(error.cause).__name__}: {error.cause}"
            finally:
                if up:
                    self.idle.put_nowait((number, auditor))
                else:
                    self._expect(number, auditor)
            self._queued(1)
        self._queued(-1)
        failure = f"{reason} ({self.attempts} attempts)"
        return self._end(
            request.key, {"status": "failed", "reason": failure, "seconds": 0.0, "failed": [], "limit": limit}
        )

    def _expect(self, number: int, auditor: ActorHandle) -> None:
        start = asyncio.ensure_future(self._when_up(number, auditor))
        self.starting.add(start)  # the event loop holds tasks only weakly, so keep a reference
        start.add_done_callback(self.starting.discard)

    async def _when_up(self, number: int, auditor: ActorHandle) -> None:
        """Offers an auditor when it answers, or after the time limit, so that no request waits forever.

        Its start does not count as time of an audit. While it restarts it refuses calls at once, which would use up all
        attempts of the waiting requests.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_up(auditor), self.timeout_s)
        self.idle.put_nowait((number, auditor))

    def _queued(self, change: int) -> None:
        self.waiting += change
        self.gauges["queue"].set(self.waiting, {"run": self.run})

    def _end(self, key: str, outcome: Outcome) -> Outcome:
        with open(self.path, "a", encoding="utf-8") as log:
            log.write("\n" + json.dumps({"key": key, **outcome}))  # the newline first: it also ends a truncated line
            log.flush()
            os.fsync(log.fileno())
        self.done[key] = outcome
        self.pending.pop(key, None)
        return outcome


def read_log(path: Path) -> dict[str, Outcome]:
    """The finished audits of a log, by key; a last line that a crash truncated is ignored.

    Audits that failed, or in which a check failed, are left out: the cause may have been fixed before the run is resumed.
    """
    done = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["status"] == "ok" and not entry["failed"]:
                done[entry.pop("key")] = entry
    return done


async def _up(auditor: ActorHandle) -> None:
    while True:
        try:
            await auditor.__ray_ready__.remote()
            return
        except ray.exceptions.RayActorError:
            await asyncio.sleep(RETRY_S)


async def _ask(auditor: ActorHandle, request: AuditRequest) -> Answer:
    answer: Answer = await auditor.measure.remote(request)
    return answer
