"""Reads the samples of webdataset's tar shards as a stream, also samples with dots in their names.

A sample is a run of members with the same name up to the first dot. A numbered picture, `NAME.000.png`, is a sample by itself;
if there is no `NAME.png`, so is every `NAME.x.png`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from raysweep.tasks.decoding import LFS, SUFFIXES, UNREAD
from raysweep.tasks.records import Tally, plain
from raysweep.tasks.tree import is_companion

HELD = 64  # members of one name that are held in memory at once
KINDS = tuple(s.removeprefix(".") for s in (*SUFFIXES, *UNREAD))


@dataclass(frozen=True)
class Sample:
    """A picture and its companion members, by extension in lower case. location: shard and member, for messages."""

    key: str
    location: str
    content: bytes
    suffix: str
    beside: dict[str, bytes]


@dataclass
class _Group:
    """Consecutive members with one name up to the first dot: extension -> (member's name, content)."""

    stem: str = ""
    members: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def is_full(self, extension: str) -> bool:
        """Whether `HELD` members are held and `extension` begins another sample."""
        return (
            len(self.members) >= HELD
            and next(reversed(self.members)).rpartition(".")[0] != extension.rpartition(".")[0]
        )


class _Header(tarfile.TarInfo):
    """Records that an archive had its end mark, two blocks of zeros; tarfile accepts archives that end without it."""

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> _Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.has_ended = True
            raise


def samples(shards: list[str], extensions: tuple[str, ...], tally: Tally) -> Iterator[Sample]:
    """Yields every picture of the shards with its members of `extensions`; counts other files, and unreadable ones."""
    for shard in shards:
        tally.parts += 1
        group, before = _Group(), tally.seen
        for name, content in _members(shard, extensions, tally, lambda seen=before: tally.seen - seen):  # type: ignore[misc]
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            stem, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
            if stem != group.stem or extension in group.members or group.is_full(extension):
                if stem == group.stem and extension in group.members:
                    tally.note(
                        "a member of the same name as the one before, read as another record", f"{shard}: {name}"
                    )
                yield from _cut(shard, group, tally)
                group = _Group(stem)
            group.members[extension] = (name, content)
        yield from _cut(shard, group, tally)


def _cut(shard: str, group: _Group, tally: Tally) -> Iterator[Sample]:
    """Yields the samples of one group, as the module describes."""
    if not group.members:
        return
    pictures = [e for e in group.members if e.rpartition(".")[2] in KINDS]
    chosen = [e for e in sorted(pictures, key=lambda e: KINDS.index(e.rpartition(".")[2])) if "." not in e][:1]
    for extension in pictures:
        middle = extension.rpartition(".")[0]
        if middle and (not chosen or middle.replace(".", "").isdecimal()):
            chosen.append(extension)
    for extension in pictures:
        if extension not in chosen:
            tally.note(
                f"pictures beside that of their sample, not read (.{extension})",
                f"{shard}: {group.members[extension][0]}",
            )
    if not chosen:
        tally.seen += 1
        tally.skip("no picture among the members of this name, which must follow each other", f"{shard}: {group.stem}")
    for extension in chosen:
        tally.seen += 1
        name, content = group.members[extension]
        middle, _, suffix = extension.rpartition(".")
        # the companion of NAME.000.png is NAME.000.txt, or else NAME.txt
        beside = {e: c for e, (_, c) in group.members.items()}
        if middle:
            beside |= {e.removeprefix(f"{middle}."): c for e, c in beside.items() if e.startswith(f"{middle}.")}
        yield Sample(name[: -len(suffix) - 1], f"{shard}: {name}", content, suffix, beside)


def _members(
    shard: str, extensions: tuple[str, ...], tally: Tally, read: Callable[[], int]
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of pictures and members of `extensions`; counts a shard that ends early as a lost part.

    read: gives the number of records read so far, for the message.
    """
    try:
        with _open(shard) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                name = plain(member.name.removeprefix("./"))
                suffix = PurePosixPath(name).suffix.lower()
                matters = suffix.removeprefix(".") in KINDS or name.lower().endswith(tuple(f".{e}" for e in extensions))
                if member.isdir() or not matters:
                    continue
                parts = name.split("/")
                if any(is_companion(p) for p in parts) or (parts[0].startswith("__") and parts[0].endswith("__")):
                    tally.ignore("hidden members, and what file managers leave", f"{shard}: {name}")
                    continue
                file = tar.extractfile(member) if member.isreg() else None
                if file is None:
                    tally.seen += 1
                    tally.skip("a link, not a file", f"{shard}: {name}")
                    continue
                yield name, file.read()
            if not hasattr(tar, "has_ended"):
                raise tarfile.ReadError("no end mark: cut short, or never finished")
    except Exception as error:  # tarfile and decompressors raise exceptions of many kinds on damaged files
        tally.lose(_reason(shard, error), f"{shard} after {read()} records")


def _open(shard: str) -> IO[bytes]:
    if "://" not in shard:
        return Path(shard).open("rb")
    import webdataset

    return webdataset.gopen(shard)


def _reason(shard: str, error: Exception) -> str:
    if "://" not in shard and Path(shard).is_file():
        with Path(shard).open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return "a Git LFS pointer instead of the file (run `git lfs pull`)"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cut short or unreadable ({reason})"
