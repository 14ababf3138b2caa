"""Where the time of a run went: the seconds of its phases and of the checks of its audits, added up over all attempts."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import reduce

from raysweep.auditing.log import LOG, entries
from raysweep.dispatch.leases import Span
from raysweep.rundir import RunDir
from raysweep.storage.schemas import PROFILE, read_table, write_table

PHASES = ("start", "prepare", "anchors", "search", "audit", "attacks", "report")  # in the order of a run


@dataclass(frozen=True)
class Share:
    """What a sweep has of a cluster: the CPUs or GPUs of a slot and of an auditor at work, and of all nodes together.

    slot: None if there are no slots.
    """

    slot: float | None
    auditor: float
    all: float


@dataclass(frozen=True)
class Line:
    """A phase or a check; its fields are the columns of `storage.schemas.PROFILE`."""

    part: str
    name: str
    seconds: float
    audits: int | None = None
    train_s: float | None = None
    audit_s: float | None = None
    busy_s: float | None = None
    available_s: float | None = None

    @property
    def busy(self) -> float | None:
        """Share of the CPUs or GPUs that had something to do, 0 to 1; None if unknown."""
        return None if self.busy_s is None or not self.available_s else self.busy_s / self.available_s

    def __add__(self, other: Line) -> Line:
        """The same phase in two attempts, or two phases; what one of them does not know, the sum does not know."""

        def total(name: str) -> float | None:
            one, two = getattr(self, name), getattr(other, name)
            return None if one is None or two is None else one + two

        sums = {field.name: total(field.name) for field in fields(Line) if field.name not in ("part", "name")}
        return Line(self.part, self.name, **sums)  # type: ignore[arg-type]


def measure_phase(
    name: str, began: float, ended: float, trained: Sequence[Span], audited: Sequence[Span], share: Share
) -> Line:
    """The line of a phase, from what slots (`trained`) and auditors did, in and outside of it, by the same clock.

    On a machine without GPUs there may be more processes at work than CPUs, which then are all busy, and no more than that.
    """
    jobs = [span for span in (_within(s, began, ended) for s in trained) if span is not None]
    audits = [span for span in (_within(s, began, ended) for s in audited) if span is not None]
    audit_s = sum(end - start for start, end in audits)
    if share.slot is None:
        return Line("phase", name, ended - began, audit_s=audit_s)
    weighted = [(*span, share.slot) for span in jobs] + [(*span, share.auditor) for span in audits]
    return Line(
        "phase",
        name,
        ended - began,
        train_s=sum(end - start for start, end in jobs),
        audit_s=audit_s,
        busy_s=_busy(weighted, share.all),
        available_s=share.all * (ended - began),
    )


def _within(span: Span, began: float, ended: float) -> tuple[float, float] | None:
    """The part of a span between two times; None if there is none."""
    start, end = max(span.began, began), min(span.ended, ended)
    return (start, end) if start < end else None


def _busy(spans: Sequence[tuple[float, float, float]], limit: float) -> float:
    """The integral over time of the weights (start, end, weight) under way, at most `limit` at any time."""
    changes = sorted([(start, weight) for start, _, weight in spans] + [(end, -weight) for _, end, weight in spans])
    total = level = before = 0.0
    for time, change in changes:
        total += min(level, limit) * (time - before)
        level, before = level + change, time
    return total


def add_phase(folder: RunDir, line: Line) -> None:
    """Adds a phase to the profile of a run, and brings its checks up to date; raises StoreError."""
    phases = {p.name: p for p in read_profile(folder) if p.part == "phase"}
    phases[line.name] = phases[line.name] + line if line.name in phases else line
    ordered = sorted(phases.values(), key=lambda p: PHASES.index(p.name))
    write_table(folder.profile, [asdict(row) for row in (*ordered, *_checks(folder))], PROFILE)


def read_profile(folder: RunDir) -> list[Line]:
    """The profile of a run: its phases in their order, then its checks, the longest first; raises StoreError if it is unreadable."""
    if not folder.profile.is_file():
        return []
    return [Line(**row) for row in read_table(folder.profile, PROFILE).to_pylist()]


def whole(lines: Sequence[Line]) -> Line | None:
    """All phases of a profile as one; None without any."""
    phases = [line for line in lines if line.part == "phase"]
    return reduce(operator.add, phases) if phases else None


def phase_table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The phases of a profile and their sum as a table of text for people."""
    phases = [line for line in lines if line.part == "phase"]
    total = whole(phases)
    return [_phase_row(line, line.name) for line in phases] + ([] if total is None else [_phase_row(total, "all")])


def check_table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The checks of a profile as a table of text for people."""
    return [
        {"check": line.name, "audits": str(line.audits), "seconds of auditors": f"{line.seconds:.1f}"}
        for line in lines
        if line.part == "check"
    ]


def _phase_row(line: Line, name: str) -> dict[str, str]:
    train, audit = ("-" if s is None else f"{s:.1f}" for s in (line.train_s, line.audit_s))
    busy = "-" if line.busy is None else f"{line.busy:.0%}"
    return {
        "phase": name,
        "seconds": f"{line.seconds:.1f}",
        "seconds of slots": train,
        "seconds of auditors": audit,
        "CPUs or GPUs busy": busy,
    }


def _checks(folder: RunDir) -> list[Line]:
    """The checks of a run's audits, of those that failed, too, the longest first."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for outcome in entries(folder.path / LOG):
        for check, taken in outcome.get("checks", {}).items():
            seconds[check].append(taken)
    lines = [Line("check", name, sum(taken), audits=len(taken)) for name, taken in seconds.items()]
    return sorted(lines, key=lambda line: -line.seconds)
