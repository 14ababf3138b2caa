"""Finds the pictures below a folder, with captions from `NAME.txt`, `metadata.jsonl` and `metadata.csv`."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysweep.storage.texts import TextError, read_text
from raysweep.tasks.decoding import SUFFIXES, UNREAD
from raysweep.tasks.records import SourceError, Tally, Unreadable, plain
from raysweep.tasks.textfiles import table

METADATA = ("metadata.jsonl", "metadata.csv")
# Files and folders that file managers, archives and network drives create, besides names that begin with a dot.
COMPANIONS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
)  # fmt: skip
NOT_TEXT = "a caption that is not UTF-8 text (save it as UTF-8)"


def is_companion(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or created by a file manager."""
    return name.startswith(".") or name.lower() in COMPANIONS


@dataclass(frozen=True)
class PictureFile:
    """A picture below a folder. key: its path relative to the folder, with slashes.

    `caption` reads its caption, None without one; raises Unreadable for a caption file that is not text.
    """

    path: Path
    key: str
    caption: Callable[[], str | None]


@dataclass
class _Metadata:
    """A metadata file's captions by path relative to its folder; unmet: paths at which no picture was met yet."""

    path: Path
    captions: dict[str, str | None]
    unmet: set[str] = field(default_factory=set)


def pictures(root: Path, tally: Tally, caption_key: str | None = None) -> Iterator[PictureFile]:
    """Yields every picture below `root`, sorted by name within each folder; links to folders are followed.

    Ignores hidden files and folders and those of file managers, and counts the folders and pictures among them, as well as files
    that are neither pictures nor captions. caption_key: key of captions in metadata files; None: text, or else caption. Raises
    SourceError for a metadata file that is not in its format.
    """
    tally.hint = (
        "looked for NAME.txt beside each picture, and for metadata.jsonl or metadata.csv with `file_name` and "
        f"{'`' + caption_key + '`' if caption_key else '`text` or `caption`'} in its folder and those above"
    )
    yield from _walk(root, root, tally, [], (os.path.realpath(root),), caption_key)


def _walk(
    folder: Path, root: Path, tally: Tally, above: list[_Metadata], parents: tuple[str, ...], caption_key: str | None
) -> Iterator[PictureFile]:
    """Yields the pictures of one folder and of those in it.

    above: metadata files of the folders above; parents: real paths of this folder and those above, to detect circular links.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror})") from error
    by_lower = {e.name.lower(): e for e in entries}
    in_folder = [_metadata(folder / name, caption_key, tally) for name in METADATA if (folder / name).is_file()]
    known = [*in_folder, *above]
    pictured = {Path(e.name).stem.lower() for e in entries if Path(e.name).suffix.lower() in (*SUFFIXES, *UNREAD)}
    for entry in entries:
        path, relative = folder / entry.name, posixpath.join(*(folder / entry.name).relative_to(root).parts)
        suffix = path.suffix.lower()
        if is_companion(entry.name):
            if entry.is_dir() or suffix in (*SUFFIXES, *UNREAD):
                tally.ignore("hidden files and folders, and what file managers leave", plain(relative))
            continue
        if entry.is_dir():
            real = os.path.realpath(path)
            if real not in parents:
                yield from _walk(path, root, tally, known, (*parents, real), caption_key)
        elif suffix in SUFFIXES:
            text_file = by_lower.get(f"{path.stem}.txt".lower())
            yield PictureFile(path, plain(relative), _caption(path, text_file, known))
        elif suffix in UNREAD:
            tally.seen += 1
            tally.skip(f"a format that is not read ({suffix})", plain(relative))
        elif entry.name not in METADATA and not (suffix == ".txt" and path.stem.lower() in pictured):
            tally.ignore("files that are not pictures, by their names", plain(relative))
    for metadata in in_folder:
        for name in sorted(metadata.unmet):
            tally.note(f"{metadata.path.name} names a picture that is not there", name)


def _caption(path: Path, text_file: os.DirEntry[str] | None, known: list[_Metadata]) -> Callable[[], str | None]:
    """A function that reads a picture's caption: from the nearest metadata file that has one, else from its text file."""
    for metadata in known:
        name = plain(posixpath.join(*path.relative_to(metadata.path.parent).parts))
        if name in metadata.captions:
            metadata.unmet.discard(name)
            caption = metadata.captions[name]
            if caption is not None:
                return lambda: caption
    if text_file is None:
        return lambda: None
    return lambda: _read(Path(text_file.path))


def _read(path: Path) -> str:
    try:
        return read_text(path).strip()
    except TextError as error:
        location = plain(f"{path}:{error.line}" if error.line else str(path))
        raise Unreadable(NOT_TEXT, location) from error


def _metadata(path: Path, caption_key: str | None, tally: Tally) -> _Metadata:
    """Reads a metadata file of the Hugging Face image-folder layout."""
    try:
        text = read_text(path)
        rows = table(path, text, ",", "file_name") if path.suffix == ".csv" else _lines(path, text)
    except TextError as error:
        raise SourceError(str(error)) from error
    captions: dict[str, str | None] = {}
    keys = dict[str, None]()
    for location, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            shown = ", ".join(str(k) for k in row)
            raise SourceError(f"{location}: no file_name, the path of a picture relative to this file; it has: {shown}")
        keys |= dict.fromkeys(k for k in row if isinstance(k, str))
        name = posixpath.normpath(plain(name.replace("\\", "/")))
        if name in captions:
            tally.note(f"{path.name} names a picture twice, and the last line counts", name)
        value = row.get(caption_key) if caption_key else row.get("text") or row.get("caption")
        if value is not None and not isinstance(value, str):
            raise SourceError(f"{location}: the caption must be text, not {value!r:.60}")
        captions[name] = value if value else None
    if captions and all(caption is None for caption in captions.values()):
        tally.hint += f"; {path} has {', '.join(keys)} (`caption: KEY` says which holds captions)"
    return _Metadata(path, captions, set(captions))


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # not splitlines(): captions may contain Unicode's other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f'{location}: not a line such as {{"file_name": ..., "text": ...}} ({error})') from error
        if not isinstance(row, dict):
            raise SourceError(f'{location}: not a line such as {{"file_name": ..., "text": ...}}')
        yield location, row
