"""Shows a run while it works: progress bars on a terminal, elsewhere one line per event, and one after each long silence."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

COLOURS = {
    "failed": "red",
    "trial": "cyan",
    "audit": "magenta",
    "attack": "magenta",
    "verdict": "bold",
    "prepare": "blue",
    "run": "bold",
    "front": "bold",
    "answer": "bold",
}
MODES = ("auto", "rich", "plain", "none")
SILENCE_S = 10.0  # after which a plain display says that the run is still at work


class Display:
    """Shows events (`say`) and progress (`tick`) inside a `with` block.

    mode: rich (bars), plain (lines) or none; auto chooses rich on a terminal, else plain. Default: RAYSWEEP_DISPLAY, else auto.
    """

    def __init__(self, mode: str | None = None):
        mode = mode or os.environ.get("RAYSWEEP_DISPLAY", "auto")
        if mode not in MODES:
            mode = "auto"
        self.mode = ("rich" if sys.stdout.isatty() else "plain") if mode == "auto" else mode
        self.console = Console(highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.bars: dict[str, TaskID] = {}
        self.quarters: dict[str, int] = {}
        self.counts: dict[str, tuple[int, int]] = {}  # topic -> done, total, of what is under way
        self.latest = self.event = time.monotonic()  # when something was printed, and when something happened
        self.left = threading.Event()

    def __enter__(self) -> Display:
        if self.mode == "rich":
            self.progress.start()
        elif self.mode == "plain":
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.left.set()
        if self.mode == "rich":
            self.progress.stop()

    def say(self, kind: str, text: str) -> None:
        """Shows one event with the time of day. kind: its topic in one word, which decides the colour."""
        if self.mode == "rich":
            clock = time.strftime("%H:%M:%S")
            colour = COLOURS.get(kind, "dim")
            self.progress.console.print(f"[dim]{clock}[/] [{colour}]{kind:<8}[/] {escape(text)}")
        elif self.mode == "plain":
            self.event = time.monotonic()
            self._print(kind, text)

    def tick(self, topic: str, done: int, total: int) -> None:
        """Shows how far something is: a bar on a terminal, elsewhere a line per quarter, but none for trials, which are events."""
        if self.mode == "rich":
            if topic not in self.bars:
                self.bars[topic] = self.progress.add_task(topic, total=total)
            self.progress.update(self.bars[topic], completed=done, total=total, visible=done < total)
        elif self.mode == "plain":
            self.event = time.monotonic()
            self.counts = {t: c for t, c in self.counts.items() if t != topic} | (
                {topic: (done, total)} if done < total else {}
            )
            quarter = 4 * done // max(1, total)
            if quarter != self.quarters.get(topic, 0) and topic != "trials":
                self.quarters[topic] = quarter
                self._print("progress", f"{topic} {done}/{total}")

    def _print(self, kind: str, text: str) -> None:
        self.latest = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} {kind:<8} {text}", flush=True)

    def _break_silence(self) -> None:
        """Says how far the run is whenever nothing was printed for `SILENCE_S`, until the display is left."""
        while not self.left.wait(max(0.0, self.latest + SILENCE_S - time.monotonic())):
            if time.monotonic() - self.latest >= SILENCE_S:
                counts = ", ".join(f"{topic} {done}/{total}" for topic, (done, total) in list(self.counts.items()))
                silent = time.monotonic() - self.event
                self._print("working", f"{counts or 'still at it'} ({silent:.0f} s since the last event)")
