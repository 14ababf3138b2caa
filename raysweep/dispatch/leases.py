"""Which worker has which task: leases that end when a worker's heartbeat does. Plain Python without a clock, for simulations, too."""

from __future__ import annotations

import uuid
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A task at which a worker was from `began` to `ended`, by the monotonic clock of the desk's machine, in seconds."""

    key: str
    worker: str
    began: float
    ended: float


@dataclass
class Lease:
    """A task that a worker has until a time, unless it renews it.

    token: unique, so that a later lease of the task differs; begun: the worker has renewed it, so it did receive the task.
    since: when the worker got it, as far as is known.
    """

    key: str
    worker: str
    token: str
    until: float
    since: float
    begun: bool = False


class Leases:
    """A queue of tasks, by key, each held by at most one worker.

    attempts: how often a task may be lost with its worker's process, or fail, before it counts as failed; the loss of a whole node
    and a worker that leaves do not count. lease_s: seconds that a lease lasts without a heartbeat.
    """

    def __init__(self, attempts: int, lease_s: float):
        self.attempts, self.lease_s = attempts, lease_s
        self.queue: deque[str] = deque()
        self.known: set[str] = set()  # queued, held or ended
        self.held: dict[str, Lease] = {}
        self.works: dict[str, str] = {}  # worker -> key
        self.used: Counter[str] = Counter()  # attempts by key
        self.past: list[Span] = []
        self._token, self._count = uuid.uuid4().hex, 0

    def add(self, key: str) -> bool:
        """Queues a task; False if it is known already."""
        if key in self.known:
            return False
        self.known.add(key)
        self.queue.append(key)
        return True

    def take(self, worker: str, now: float) -> Lease | None:
        """The next task for a worker; None if none waits."""
        if not self.queue:
            return None
        self._count += 1
        lease = Lease(self.queue.popleft(), worker, f"{self._token}-{self._count}", now + self.lease_s, now)
        self._hold(lease)
        return lease

    def renew(self, worker: str, key: str, token: str, now: float) -> bool:
        """Whether a worker still has its lease, which then lasts on.

        After a restart the leases are unknown: a task that waits, or that nobody has asked for yet, then goes to the worker that has it.
        """
        lease = self.held.get(key)
        if lease is None:
            if key in self.known and key not in self.queue:
                return False  # ended
            if key in self.queue:
                self.queue.remove(key)
            self.known.add(key)
            self._hold(Lease(key, worker, token, now + self.lease_s, now, begun=True))
            return True
        if lease.token != token:
            return False
        lease.until, lease.begun = now + self.lease_s, True
        return True

    def end(self, key: str) -> None:
        """Marks a task as ended."""
        self.known.add(key)
        self._release(key)

    def put_back(self, key: str, counts: bool) -> bool:
        """Takes a task from its worker and queues it first; False if `counts` and its attempts are used up, which ends it."""
        self._release(key)
        self.used[key] += counts
        if counts and self.used[key] >= self.attempts:
            return False
        self.queue.appendleft(key)
        return True

    def drop(self, key: str) -> None:
        """Forgets a task, which may then be added again."""
        self._release(key)
        self.known.discard(key)

    def expired(self, now: float) -> list[Lease]:
        """Leases whose heartbeat has stopped."""
        return [lease for lease in self.held.values() if lease.until < now]

    @property
    def spans(self) -> list[Span]:
        """What workers did and do, each until its last sign of life; without what they did before a restart of this process."""
        return self.past + [self._span(lease) for lease in self.held.values()]

    def _span(self, lease: Lease) -> Span:
        return Span(lease.key, lease.worker, lease.since, lease.until - self.lease_s)

    def _hold(self, lease: Lease) -> None:
        self.held[lease.key] = lease
        self.works[lease.worker] = lease.key

    def _release(self, key: str) -> None:
        lease = self.held.pop(key, None)
        if lease is not None:
            self.past.append(self._span(lease))
        if lease is not None and self.works.get(lease.worker) == key:
            del self.works[lease.worker]
