"""Records of image sources, and the account of a pass over a source: how many records were read, which were left out, and why."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import AfterValidator

if TYPE_CHECKING:
    from PIL import Image

MOST_BAD = 0.05  # share of unusable records, or of unreadable files of many records, above which a source is refused
NAMED = 5  # records named per reason
LISTED = 20  # names listed in a message
KNOWN = 1000  # names kept for messages


class SourceError(ValueError):
    """A source is missing or unreadable; the message names it and says what would be valid."""


class Unreadable(ValueError):
    """Bytes that are no usable picture or caption; the message is a reason that many records can share.

    location: file and line for messages, if not the record itself.
    """

    def __init__(self, reason: str, location: str = ""):
        super().__init__(reason)
        self.location = location


def plain(name: str) -> str:
    """A name in Unicode's composed form (macOS stores file names decomposed); undecodable bytes become escapes."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


Name = Annotated[str, AfterValidator(plain)]


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first `LISTED` in order, numbers first, and how many there are."""
    ordered = sorted(set(names), key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))
    return ", ".join(ordered[:LISTED]) + (f", ... ({len(ordered)} in all)" if len(ordered) > LISTED else "")


@dataclass(frozen=True)
class Record:
    """One image and its labels.

    key: its name within the source; other: its label in a second domain; location: its file and position for messages, if not the
    key. `open` raises Unreadable.
    """

    key: str
    open: Callable[[], Image.Image]
    label: str | None = None
    caption: str | None = None
    other: str | None = None
    location: str = ""


@dataclass
class Reason:
    """How many records share a reason, and the names of the first few."""

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


class ReasonCount(TypedDict):
    """A `Reason` as JSON data, with its text."""

    reason: str
    count: int
    first: list[str]


class Account(TypedDict):
    """Counts of what a pass over a source read and left out, as JSON data in a run's manifest.

    set: the set that was read (train, holdout, search_prompts); records: how many the source was asked for, of which `read` could
    be used; class_orders: class orders that the source knows; kept: records in each sample drawn from it; unkept: records read
    but in no sample, by reason.
    """

    set: str
    source: str
    class_orders: list[list[str]]
    records: int
    read: int
    kept: dict[str, int]
    unkept: dict[str, int]
    left_out: list[ReasonCount]
    files_left_out: list[ReasonCount]
    ignored: list[ReasonCount]
    notes: list[ReasonCount]


@dataclass
class Tally:
    """Counts of one pass over a source.

    wanted: keys of records whose loss must be reported, because the task names them. seen: records met; passed_over: those that
    the source's `only`, `keys` and `exclude` leave out. bad: why records could not be used; ignored: files that are no records, such as those
    of file managers; notes: how used records were changed. parts: files that hold many records each; lost_parts: those that
    cannot be read to their end; lost: wanted key -> why it could not be used. orders: the class order of each source, () if it
    has none. hint: where captions were looked for. prefix: put before names of records, if there are several sources.
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

    def skip(self, reason: str, key: str, count: int = 1, location: str = "") -> None:
        """Counts records that could not be used; location: name of the first of them for messages, if not its key."""
        self.bad.setdefault(reason, Reason()).add(self.prefix + (location or key), count)
        if key in self.wanted:
            self.lost[key] = reason

    def ignore(self, reason: str, name: str) -> None:
        """Counts a file or row that is not meant to be a record."""
        self.ignored.setdefault(reason, Reason()).add(self.prefix + name)

    def note(self, change: str, name: str) -> None:
        """Counts a record that is used in a changed form."""
        self.notes.setdefault(change, Reason()).add(self.prefix + name)

    def lose(self, reason: str, part: str) -> None:
        """Counts a file of many records that cannot be read to its end."""
        self.lost_parts.setdefault(reason, Reason()).add(self.prefix + part)

    def add(self, other: Tally, prefix: str) -> None:
        """Adds the counts and reasons of another pass, with `prefix` before its names."""
        self.seen += other.seen
        self.passed_over += other.passed_over
        self.parts += other.parts
        for reasons, added in (
            (self.bad, other.bad),
            (self.ignored, other.ignored),
            (self.notes, other.notes),
            (self.lost_parts, other.lost_parts),
        ):
            for text, reason in added.items():
                reasons.setdefault(text, Reason()).add_all(reason, prefix)

    @property
    def skipped(self) -> int:
        """Number of records that could not be used."""
        return sum(reason.count for reason in self.bad.values())

    @property
    def chosen(self) -> int:
        """Number of records that the source was asked for, usable or not."""
        return self.seen - self.passed_over

    def check(self, source: object, records: str = "images") -> None:
        """Raises SourceError if there were no records, or more than `MOST_BAD` of them unusable; records: their plural."""
        lost = sum(reason.count for reason in self.lost_parts.values())
        if lost > MOST_BAD * self.parts:
            raise SourceError(
                f"{source}: {lost} of {self.parts} files cannot be read: {_listed_reasons(self.lost_parts)}; at most "
                f"{MOST_BAD:.0%} may be left out"
            )
        if self.chosen == 0:
            ignored = f" (ignored: {_listed_reasons(self.ignored)})" if self.ignored else ""
            raise SourceError(f"{source}: holds no {records}{ignored}")
        if self.skipped > MOST_BAD * self.chosen:
            raise SourceError(
                f"{source}: {self.skipped} of {self.chosen} records cannot be used: {_listed_reasons(self.bad)}; at most "
                f"{MOST_BAD:.0%} may be left out"
            )

    def account(
        self, name: str, source: object, kept: dict[str, int] | None = None, unkept: dict[str, int] | None = None
    ) -> Account:
        """These counts as an `Account` of the set `name`."""
        return Account(
            set=name,
            source=str(source),
            class_orders=sorted(map(list, self.orders)),
            records=self.chosen,
            read=self.chosen - self.skipped,
            kept=kept or {},
            unkept={reason: n for reason, n in (unkept or {}).items() if n},
            left_out=_counts(self.bad),
            files_left_out=_counts(self.lost_parts),
            ignored=_counts(self.ignored),
            notes=_counts(self.notes),
        )


def _counts(reasons: dict[str, Reason]) -> list[ReasonCount]:
    return [ReasonCount(reason=text, count=r.count, first=list(r.first)) for text, r in reasons.items()]


def _listed_reasons(reasons: dict[str, Reason]) -> str:
    return "; ".join(f"{r.count} x {text} ({r})" for text, r in reasons.items())


def lines_of(account: Account) -> list[str]:
    """An account as lines of text: one on what was read, and one per reason for which records were left out or changed."""
    kept = ", ".join(f"{count} {name}" for name, count in account["kept"].items())
    first = f"{account['set']}: {account['read']} of {account['records']} records of {account['source']} read"
    unkept = ", ".join(f"{count} {reason}" for reason, count in account["unkept"].items())
    lines = [first + (f"; kept: {kept}" if kept else "") + (f"; not kept: {unkept}" if unkept else "")]
    for reasons, words in (
        (account["left_out"], "left out"),
        (account["files_left_out"], "files left out"),
        (account["ignored"], "ignored"),
        (account["notes"], ""),
    ):
        for reason in reasons:
            more = ", ..." if reason["count"] > len(reason["first"]) else ""
            start = f"{words} {reason['count']}: " if words else f"{reason['count']} x "
            lines.append(f"{account['set']}: {start}{reason['reason']} ({', '.join(reason['first'])}{more})")
    return lines


def data_lines(task: Any) -> list[str]:
    """The accounts of a task as lines of text."""
    return [line for account in task.accounts for line in lines_of(account)]


def check_met(source: object, setting: str, wanted: Collection[str], met: Collection[str], tally: Tally) -> None:
    """Raises SourceError if a record or label that a setting names is missing or cannot be used."""
    for name in wanted:
        if name in tally.lost:
            raise SourceError(f"{source}: {setting}: {name!r} cannot be used: {tally.lost[name]}")
        if name not in met:
            known = f"there are: {listed(met)}" if met else "no record has one"
            raise SourceError(f"{source}: {setting}: nothing is called {name!r}; {known}")
