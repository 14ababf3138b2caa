"""A worker's side of a desk: asks for tasks, keeps their leases alive, hands outcomes in."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic

import ray
from ray.actor import ActorHandle

from raysweep.dispatch.desk import Assignment, Outcome, Task, Word

OVERDUE_EXIT = 70


@contextlib.contextmanager
def ended_after(seconds: float | None, report: Callable[[], object]) -> Iterator[None]:
    """Ends this process if the block takes longer, after `report`; None sets no limit. Its host starts another process."""

    def expire() -> None:
        try:
            report()
        finally:  # even if the report fails, so that no caller waits for this process
            os._exit(OVERDUE_EXIT)

    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Holder(Generic[Task, Outcome]):
    """Asks a desk for tasks on behalf of one worker, which has one task at a time.

    worker: its name, which stays when its process starts again. on_lost: called in another thread when the task is no longer the
    worker's.
    """

    def __init__(self, desk: ActorHandle, worker: str, on_lost: Callable[[], object] | None = None):
        self.desk, self.worker, self.on_lost = desk, worker, on_lost
        self.node = ray.get_runtime_context().get_node_id()
        self.word: Word = "held"
        self.progress: Any = None
        self._fresh = True
        self._assignment: Assignment[Task] | None = None
        self._changed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def next(self) -> Task | None:
        """Waits for a task; None if the worker must end."""
        while True:
            answer = ray.get(self.desk.next.remote(self.worker, self.node, self._fresh))
            self._fresh = False
            if answer == "stop":
                return None
            if answer != "wait":
                self.word, self.progress, self._assignment = "held", None, answer
                self._changed.set()
                task: Task = answer.task
                return task

    def finish(self, outcome: Outcome, again: bool = False) -> None:
        """Hands in the outcome of the task; again: it should be tried again."""
        taken = self._drop()
        if taken is not None:
            ray.get(self.desk.finish.remote(self.worker, taken.key, taken.token, outcome, again))

    def put_back(self) -> None:
        """Gives the task back, because the worker leaves."""
        taken = self._drop()
        if taken is not None:
            ray.get(self.desk.put_back.remote(self.worker, taken.key, taken.token))

    def owns(self) -> bool:
        """Whether the task is still the worker's; asks the desk."""
        taken = self._assignment
        return taken is not None and self._ask(taken) != "lost"

    def _drop(self) -> Assignment[Task] | None:
        taken, self._assignment = self._assignment, None
        return taken

    def _ask(self, taken: Assignment[Task]) -> Word:
        word: Word = ray.get(self.desk.beat.remote(self.worker, taken.key, taken.token, self.progress))
        if taken is self._assignment:
            self.word = word
        return word

    def _beat(self) -> None:
        # Ray raises SystemExit in waiting threads when it shuts down
        with contextlib.suppress(ray.exceptions.RayError, SystemExit):
            while True:
                taken = self._assignment
                if taken is None:
                    self._changed.wait()
                    self._changed.clear()
                    continue
                if self._ask(taken) == "lost" and taken is self._assignment and self.on_lost is not None:
                    self.on_lost()
                threading.Event().wait(taken.beat_s)
