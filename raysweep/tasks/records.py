"""The records of a source of images, and the account of a pass over them: how many there were, which were left out, and why."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

if TYPE_CHECKING:
    from PIL import Image

MOST_BAD = 0.05  # share of unusable records, or of unreadable files of many records, above which a source is refused
NAMED = 5  # records that are named per reason
LISTED = 20  # labels that a message lists
KNOWN = 1000  # labels that are kept for messages


class SourceError(ValueError):
    """A source that is missing or unreadable; the message names it, and says what it should be."""


class Unreadable(ValueError):
    """Bytes that are no usable picture or caption; the message says why, in words that fit all records of the kind.

    place: the file and line, where that is not the record itself.
    """

    def __init__(self, why: str, place: str = ""):
        super().__init__(why)
        self.place = place


def plain(name: str) -> str:
    """A name in Unicode's composed form, in which Macs do not store names of files; undecodable bytes become escapes."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


Name = Annotated[str, AfterValidator(plain)]


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first twenty in order, and how many there are."""
    ordered = sorted(set(names), key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))
    return ", ".join(ordered[:LISTED]) + (f", ... ({len(ordered)} in all)" if len(ordered) > LISTED else "")


@dataclass(frozen=True)
class Record:
    """One image and what is known of it.

    key: its name within the source; other: its label in a second domain; place: where it is, for messages, if not the key.
    `open` raises Unreadable.
    """

    key: str
    open: Callable[[], Image.Image]
    label: str | None = None
    caption: str | None = None
    other: str | None = None
    place: str = ""


@dataclass
class Reason:
    """How many records something happened to, and the first few by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, count: int = 1) -> None:
        self.count += count
        if len(self.first) < NAMED:
            self.first.append(name)

    def add_all(self, other: Reason, prefix: str) -> None:
        self.count += other.count
        self.first += [prefix + name for name in other.first][: NAMED - len(self.first)]

    def __str__(self) -> str:
        return ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")


@dataclass
class Tally:
    """The account of one pass over a source.

    wanted: keys of records that must not be lost unseen. seen: records met; passed_over: those of them that the source's `only`
    and `keys` leave out. bad: why records could not be used; ignored: files that are no records, such as those of file managers;
    notes: what was done to records that are used. parts: files that hold many records each; lost_parts: those of them that
    cannot be read to their end. orders: the class order that each source knows, () where it knows none. hint: where captions
    were looked for. prefix: begins names of records, where there are several sources.
    """

    wanted: frozenset[str] = frozenset()
    seen: int = 0
    passed_over: int = 0
    bad: dict[str, Reason] = field(default_factory=dict)
    ignored: dict[str, Reason] = field(default_factory=dict)
    notes: dict[str, Reason] = field(default_factory=dict)
    parts: int = 0
    lost_parts: dict[str, Reason] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    orders: set[tuple[str, ...]] = field(default_factory=set)
    hint: str = ""
    prefix: str = ""

    def skip(self, why: str, key: str, count: int = 1, place: str = "") -> None:
        """Counts records that could not be used; place: what names the first of them in messages, if not its key."""
        self.bad.setdefault(why, Reason()).add(self.prefix + (place or key), count)
        if key in self.wanted:
            self.lost[key] = why

    def ignore(self, why: str, name: str) -> None:
        """Counts a file or row that is not meant to be a record."""
        self.ignored.setdefault(why, Reason()).add(self.prefix + name)

    def note(self, what: str, name: str) -> None:
        """Counts a record that is used otherwise than as it is."""
        self.notes.setdefault(what, Reason()).add(self.prefix + name)

    def lose(self, why: str, part: str) -> None:
        """Counts a file of many records that cannot be read, or not to its end."""
        self.lost_parts.setdefault(why, Reason()).add(self.prefix + part)

    def add(self, other: Tally, prefix: str) -> None:
        """Adds another pass's counts and reasons, its names begun with `prefix`."""
        self.seen, self.passed_over, self.parts = (
            self.seen + other.seen, self.passed_over + other.passed_over, self.parts + other.parts,
        )  # fmt: skip
        for mine, theirs in (
            (self.bad, other.bad), (self.ignored, other.ignored), (self.notes, other.notes), (self.lost_parts, other.lost_parts),
        ):  # fmt: skip
            for why, reason in theirs.items():
                mine.setdefault(why, Reason()).add_all(reason, prefix)

    @property
    def skipped(self) -> int:
        return sum(reason.count for reason in self.bad.values())

    @property
    def chosen(self) -> int:
        """Records that the source was asked for, usable or not."""
        return self.seen - self.passed_over

    def check(self, source: object, what: str = "images") -> None:
        """Raises SourceError if there was nothing, or too much of it was bad; what: what the records are."""
        lost = sum(reason.count for reason in self.lost_parts.values())
        if lost > MOST_BAD * self.parts:
            raise SourceError(
                f"{source}: {lost} of {self.parts} files cannot be read: {_why(self.lost_parts)}; at most {MOST_BAD:.0%} may be "
                "left out"
            )
        if self.chosen == 0:
            beside = f" (ignored: {_why(self.ignored)})" if self.ignored else ""
            raise SourceError(f"{source}: holds no {what}{beside}")
        if self.skipped > MOST_BAD * self.chosen:
            raise SourceError(
                f"{source}: {self.skipped} of {self.chosen} records cannot be used: {_why(self.bad)}; at most {MOST_BAD:.0%} may "
                "be left out"
            )

    def account(
        self, name: str, source: object, kept: dict[str, int] | None = None, unkept: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """The account as JSON data; name: the set that was read; kept: records of each sample that was drawn from it; unkept: how
        many of those that were read are in none, by reason."""
        parts = {
            "left_out": self.bad, "files_left_out": self.lost_parts, "ignored": self.ignored, "notes": self.notes,
        }  # fmt: skip
        reasons = {
            part: [{"reason": why, "count": r.count, "first": list(r.first)} for why, r in found.items()]
            for part, found in parts.items()
        }
        counts = {
            "records": self.chosen,
            "read": self.chosen - self.skipped,
            "kept": kept or {},
            "unkept": {why: n for why, n in (unkept or {}).items() if n},
        }
        return {"set": name, "source": str(source), "class_orders": sorted(map(list, self.orders))} | counts | reasons


def _why(reasons: dict[str, Reason]) -> str:
    return "; ".join(f"{r.count} x {why} ({r})" for why, r in reasons.items())


def lines_of(account: dict[str, Any]) -> list[str]:
    """An account for people: a line on what was read, and one for each thing that was left out or changed."""
    kept = ", ".join(f"{count} {name}" for name, count in account["kept"].items())
    first = f"{account['set']}: {account['read']} of {account['records']} records of {account['source']} read"
    unkept = ", ".join(f"{count} {why}" for why, count in account["unkept"].items())
    lines = [first + (f"; kept: {kept}" if kept else "") + (f"; not kept: {unkept}" if unkept else "")]
    for part, words in (
        ("left_out", "left out"),
        ("files_left_out", "files left out"),
        ("ignored", "ignored"),
        ("notes", ""),
    ):
        for reason in account[part]:
            more = ", ..." if reason["count"] > len(reason["first"]) else ""
            what = f"{words} {reason['count']}: " if words else f"{reason['count']} x "
            lines.append(f"{account['set']}: {what}{reason['reason']} ({', '.join(reason['first'])}{more})")
    return lines


def data_lines(task: Any) -> list[str]:
    """The accounts of a task for people."""
    return [line for account in task.accounts for line in lines_of(account)]


def check_met(source: object, setting: str, wanted: Collection[str], met: Collection[str], tally: Tally) -> None:
    """Raises SourceError if a record or label that a setting names was not there."""
    for name in wanted:
        if name in tally.lost:
            raise SourceError(f"{source}: {setting}: {name!r} cannot be used: {tally.lost[name]}")
        if name not in met:
            there = f"there are: {listed(met)}" if met else "no record has one"
            raise SourceError(f"{source}: {setting}: nothing is called {name!r}; {there}")
