"""Events of a running sweep. The command line shows them; a program may ignore them."""

from __future__ import annotations

from typing import Protocol


class Events(Protocol):
    """Receives the events of a run."""

    def say(self, kind: str, text: str) -> None:
        """One event for people. kind: the phase it belongs to, such as "prepare" or "trial"."""

    def tick(self, name: str, done: int, total: int) -> None:
        """Progress of the phase `name`: `done` of `total` units."""


class Silent:
    """Ignores all events."""

    def say(self, kind: str, text: str) -> None: ...

    def tick(self, name: str, done: int, total: int) -> None: ...
