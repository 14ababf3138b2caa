"""The audit manager: hands each request to an auditor once, and keeps a log of finished audits on disk.

An append-only log in the run directory, flushed to disk before a caller is answered, records the end of each audit by its key. A
manager that was killed replays it; Ray retries the callers' pending calls, which find the answer or queue up again, and auditors
at work register what they do. An auditor that dies or hangs costs one of its request's attempts; after the last one the request is
recorded as failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from raysweep.auditing.log import LOG, read_log
from raysweep.auditing.request import AuditRequest, Chore, Outcome, failed
from raysweep.dispatch.desk import CALLS, Desk
from raysweep.storage.files import write_bytes

OWNER = "audits.owner"
WRITE_S, RETRY_S = 600.0, 5.0  # how long a log that cannot be written is tried, and how often


class Replaced(Exception):
    """Another manager of the run has been started."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=CALLS)
class AuditManager(Desk[AuditRequest | Chore, Outcome]):
    """The desk of the audits of the run in a folder. attempts: per request."""

    def __init__(self, run: str, attempts: int):
        super().__init__(attempts)
        self.folder, self.path, self.owner = Path(run), Path(run) / LOG, uuid.uuid4().hex
        self.done = read_log(self.path)
        for key in self.done:  # an auditor whose report the last manager has logged and not confirmed says it again
            self.leases.end(key)
        write_bytes(self.folder / OWNER, self.owner.encode())
        self.unwritten: list[tuple[str, asyncio.Future[None]]] = []
        self.writer: asyncio.Task[None] | None = None
        self.trouble = ""
        self.run = Path(run).name
        self.gauges = {
            "auditors": Gauge("raysweep_auditors", "auditors at work, and without work", ("run", "state")),
            "queue": Gauge("raysweep_audit_queue", "audits requested and not started", ("run",)),
            "seconds": Gauge("raysweep_audit_seconds", "seconds of the last audit", ("run", "tier")),
            "images": Gauge(
                "raysweep_audit_images_per_second", "images generated per second of the last audit", ("run", "tier")
            ),
        }

    def failure(self, key: str, reason: str) -> Outcome:
        return failed(f"{reason} ({self.leases.attempts} attempts)")

    async def finish(self, worker: str, key: str, token: str, outcome: Outcome, again: bool = False) -> bool:
        if again:
            outcome = outcome | {"reason": f"{outcome['reason']} ({self.leases.attempts} attempts)"}
        return await super().finish(worker, key, token, outcome, again)

    async def record(self, key: str, outcome: Outcome) -> None:
        """Appends to the log; all outcomes that arrive while it is flushed share the next flush."""
        task = self.tasks.get(key)
        if isinstance(task, Chore):
            return
        if task is not None and outcome["status"] == "ok":
            tags = {"run": self.run, "tier": task.tier_name}
            self.gauges["seconds"].set(outcome["seconds"], tags)
            self.gauges["images"].set(outcome.get("images", 0) / max(outcome["seconds"], 1e-9), tags)
        written = asyncio.get_running_loop().create_future()
        # the newline first: it also ends a truncated line
        self.unwritten.append(("\n" + json.dumps({"key": key, **outcome}), written))
        if self.writer is None or self.writer.done():
            self.writer = asyncio.ensure_future(self._write())
        await written

    async def census(self) -> dict[str, Any]:
        return await super().census() | {"trouble": self.trouble}

    def count(self, queued: int, busy: int, idle: int) -> None:
        self.gauges["queue"].set(queued, {"run": self.run})
        for state, number in (("busy", busy), ("idle", idle)):
            self.gauges["auditors"].set(number, {"run": self.run, "state": state})

    async def pid(self) -> int:
        """The id of this process, for tests that kill it."""
        return os.getpid()

    async def _write(self) -> None:
        while self.unwritten:
            batch, self.unwritten = self.unwritten, []
            started = time.monotonic()
            while True:
                try:
                    await asyncio.to_thread(self._append, "".join(line for line, _ in batch))
                    self.trouble = ""
                    break
                except Replaced as error:
                    return await self.close(str(error))
                except OSError as error:  # a full disk: somebody may make room
                    self.trouble = f"{self.path} cannot be written ({error.strerror or error})"
                    if time.monotonic() - started > WRITE_S:
                        return await self.close(f"{self.trouble}; make room and run the same command again")
                    await asyncio.sleep(RETRY_S)
            for _, written in batch:
                written.set_result(None)

    def _append(self, text: str) -> None:
        """Appends to the log, unless another manager of the run has been started since."""
        if (self.folder / OWNER).read_text(encoding="utf-8") != self.owner:
            raise Replaced(f"{self.path} belongs to another audit manager")
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(text)
            log.flush()
            os.fsync(log.fileno())
