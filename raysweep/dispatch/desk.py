"""A desk: where callers bring tasks and wait for outcomes, and where workers ask for tasks and hand outcomes in.

A task is leased to a worker, which renews the lease by heartbeats. It goes to another worker when these stop, when the worker's
process starts again, and when its node is lost; from then on, what the first one says about it is ignored. No call waits for
another one: each is a coroutine, and what has to wait is a future.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from raysweep.dispatch.leases import Leases, Span

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
Word = Literal["held", "lost", "leave"]  # a desk's answer to a heartbeat

ENDED, DIED = "the run has ended", "its worker died"
WAIT_S = 20.0  # after which a worker is told that there is no task
LEASE_S = 40.0
BEAT_S = 2.0
BEATS_PER_S = 100.0  # of all workers together; more workers beat less often
CALLS = 100_000  # at the same time: most of them wait


@dataclass(frozen=True)
class Assignment(Generic[Task]):
    """A task for a worker, with the token of its lease and the seconds between heartbeats."""

    key: str
    task: Task
    token: str
    beat_s: float


class Closed(RuntimeError):
    """The desk answers nobody any more; the message says why."""


class Desk(ABC, Generic[Task, Outcome]):
    """Base of the actors that hand out tasks.

    attempts: at one task, before it counts as failed. A subclass says in `failure` what the outcome of such a task is, may keep
    outcomes by `record`, and may show by `count` how much there is to do.
    """

    def __init__(self, attempts: int):
        self.leases = Leases(attempts, LEASE_S)
        self.tasks: dict[str, Task] = {}
        self.done: dict[str, Outcome] = {}
        self.waiting: dict[str, asyncio.Future[Outcome]] = {}
        self.asking: deque[asyncio.Future[None]] = deque()  # calls of workers that wait for a task
        self.calls: dict[str, object] = {}  # worker -> its latest call for a task; nobody listens to an earlier one
        self.gone: set[str] = set()  # workers that have ended; a call of theirs may still arrive
        self.barred: set[str] = set()  # nodes whose workers get no task
        self.benched: deque[asyncio.Future[None]] = deque()  # calls of these, which a task must not wake in vain
        self.nodes: dict[str, str] = {}  # worker -> id of its node
        self.leaving: set[str] = set()
        self.silent: set[str] = set()  # workers whose heartbeat stopped
        self.progress: dict[str, Any] = {}
        self.closed = ""  # why
        self.clock = time.monotonic
        self._looked = -math.inf

    @abstractmethod
    def failure(self, key: str, reason: str) -> Outcome:
        """The outcome of a task whose attempts are used up."""

    async def record(self, key: str, outcome: Outcome) -> None:
        """Keeps an outcome before callers receive it."""

    def count(self, queued: int, busy: int, idle: int) -> None:
        """Shows the numbers of waiting tasks and of workers with and without one, at each census."""

    async def submit(self, key: str, task: Task) -> Outcome:
        """Waits for the outcome of a task; one that is submitted twice is done once. Raises Closed if the run ends before."""
        if key in self.done:
            return self.done[key]
        if self.closed:
            raise Closed(self.closed)
        self.tasks[key] = task
        future = self.waiting.setdefault(key, asyncio.get_running_loop().create_future())
        if self.leases.add(key):
            self._wake()
        return await asyncio.shield(future)

    async def next(self, worker: str, node: str, fresh: bool) -> Assignment[Task] | Literal["wait", "stop"]:
        """A task for a worker; "wait" if there is none for a while, "stop" if the worker must end.

        fresh: the worker's process has just started, so that the task it had is lost.
        """
        if worker in self.gone:
            return "stop"
        self.nodes[worker] = node
        self.calls[worker] = call = object()
        self.silent.discard(worker)
        if fresh and worker in self.leases.works:
            await self._lost(self.leases.works[worker], DIED, counts=True)
        deadline = self.clock() + WAIT_S
        while not (self.closed or worker in self.leaving):
            await self._expire()
            lease = None if node in self.barred else self.leases.take(worker, self.clock())
            if lease is not None:
                return Assignment(lease.key, self.tasks[lease.key], lease.token, self._beat_s())
            left = deadline - self.clock()
            if left <= 0:
                return "wait"
            turn = asyncio.get_running_loop().create_future()
            (self.benched if node in self.barred else self.asking).append(turn)
            await asyncio.wait([turn], timeout=left)
            turn.cancel()
            if self.calls.get(worker) is not call:  # its process died meanwhile; another worker may look
                self._wake()
                break
        return "stop"

    async def beat(self, worker: str, key: str, token: str, progress: Any = None) -> Word:
        """Renews a lease: "held", "leave" if the worker should end soon, "lost" if the task is no longer the worker's."""
        await self._expire()
        if not self.leases.renew(worker, key, token, self.clock()):
            return "lost"
        if progress is not None:
            self.progress[key] = progress
        return "leave" if worker in self.leaving else "held"

    async def finish(self, worker: str, key: str, token: str, outcome: Outcome, again: bool = False) -> bool:
        """Takes an outcome; ignores it and returns False if the task is not the worker's. again: try the task again, if it may."""
        if not self.leases.renew(worker, key, token, self.clock()):
            return False
        if not again or not self._queued_again(key, counts=True):
            await self._end(key, outcome)
        return True

    async def put_back(self, worker: str, key: str, token: str) -> None:
        """Takes a task back from a worker that leaves."""
        if self.leases.renew(worker, key, token, self.clock()):
            self._queued_again(key, counts=False)

    async def leave(self, workers: Iterable[str]) -> None:
        """Lets workers end: those without a task at once, the others when they next ask or look."""
        self.leaving |= set(workers)
        self._wake_all()

    async def bar(self, nodes: Iterable[str]) -> None:
        """Gives workers on these nodes no task until they are not among those of a later call."""
        barred = set(nodes)
        if barred != self.barred:
            self.barred = barred
            self._wake_all()

    async def forget(self, workers: Iterable[str], nodes: Iterable[str] = (), died: bool = False) -> None:
        """Takes their tasks from workers that have ended, and from those on lost nodes.

        died: the workers died by themselves, perhaps by what they did, so that it counts as an attempt at a task that they had begun.
        """
        ended, lost = set(workers), set(nodes)
        self.gone |= ended
        for worker in ended | {worker for worker, node in self.nodes.items() if node in lost}:
            key = self.leases.works.get(worker)
            if key is not None:
                await self._lost(key, DIED, counts=died and self.leases.held[key].begun)
            self.nodes.pop(worker, None)
            self.calls.pop(worker, None)
            self.silent.discard(worker)
            self.leaving.discard(worker)

    async def census(self) -> dict[str, Any]:
        """Number of queued tasks; worker -> (node, its task or ""); workers whose heartbeat stopped; progress by task."""
        await self._expire()
        workers = {worker: (node, self.leases.works.get(worker, "")) for worker, node in self.nodes.items()}
        queued, busy = len(self.leases.queue), len(self.leases.works)
        self.count(queued, busy, len(workers) - busy)
        return {
            "queued": queued,
            "workers": workers,
            "silent": sorted(self.silent),
            "progress": dict(self.progress),
        }

    async def spans(self) -> list[Span]:
        """What workers did and do, by `time.monotonic`, which all processes of a machine share."""
        return self.leases.spans

    async def close(self, reason: str = ENDED) -> None:
        """Ends all waiting, of callers and of workers."""
        self.closed = reason
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(Closed(reason))
        self._wake_all()

    def _beat_s(self) -> float:
        return min(max(BEAT_S, len(self.nodes) / BEATS_PER_S), LEASE_S / 4)

    async def _expire(self) -> None:
        """Takes tasks from workers whose heartbeat stopped; looks for them at most once in a second."""
        now = self.clock()
        if now - self._looked < 1:
            return
        self._looked = now
        for lease in self.leases.expired(now):
            self.silent.add(lease.worker)
            await self._lost(lease.key, "its worker gave no sign of life", counts=True)

    async def _lost(self, key: str, reason: str, counts: bool) -> None:
        if not self._queued_again(key, counts):
            await self._end(key, self.failure(key, reason))

    def _queued_again(self, key: str, counts: bool) -> bool:
        """Takes a task from its worker; False if its attempts are used up."""
        if key not in self.tasks:  # registered by its worker after a restart, and not submitted again yet
            self.leases.drop(key)
            return True
        if self.leases.put_back(key, counts):
            self._wake()
            return True
        return False

    async def _end(self, key: str, outcome: Outcome) -> None:
        self.leases.end(key)
        self.progress.pop(key, None)
        await self.record(key, outcome)
        self.done[key] = outcome
        self.tasks.pop(key, None)
        future = self.waiting.pop(key, None)
        if future is not None and not future.done():
            future.set_result(outcome)

    def _wake(self) -> None:
        """Lets one of the workers that wait look again."""
        while self.asking:
            turn = self.asking.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _wake_all(self) -> None:
        self.asking.extend(self.benched)
        self.benched.clear()
        while self.asking:
            self._wake()
