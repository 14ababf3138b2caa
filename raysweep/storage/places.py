"""Absolute paths, and checks that folders can be written.

A relative path in a config or a command is relative to the working directory of the command. It is made absolute when the config
is read, because workers have other working directories.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from raysweep.storage.files import StoreError

SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103  # longest path of a Unix socket
# The longest path of a socket below Ray's temporary folder; the last number is a process id.
RAY_SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
# A Path keeps one of the two slashes; one letter alone is a drive, C:/.
URI = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


FREE = "free some space there, and run the same command again to resume: nothing that had ended is lost"


class PlaceError(ValueError):
    """A path that cannot be used; the message names it and says what to do."""


def absolute(path: Path | str) -> Path:
    """An absolute path with `~` expanded; links are not resolved.

    Raises PlaceError if it is a URI, if there is no such home folder, or if the system does not allow such a path.
    """
    if URI.match(str(path)):
        raise PlaceError(
            f"{path}: is a URI, and a folder is needed; mount that storage as a file system on every node and name the mounted folder"
        )
    try:
        result = Path(path).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            result.lstat()
    except RuntimeError as error:
        raise PlaceError(f"{path}: there is no home folder for '~'; write the path out") from error
    except (OSError, ValueError) as error:  # a name that is too long, or contains a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise PlaceError(f"{str(path)[:60]!r}: cannot be a path ({reason})") from error
    return result


def location(text: str) -> str:
    """An absolute path, or a URI (s3://...) unchanged."""
    return text if "://" in text else str(absolute(text))


Place = Annotated[Path, AfterValidator(absolute)]
Location = Annotated[str, AfterValidator(location)]


def check_home() -> None:
    """Raises PlaceError if the user has no home folder, which Ray needs; container users may have no entry in passwd."""
    if os.path.expanduser("~") == "~":
        raise PlaceError(
            "this user has no home folder: set HOME to a folder that can be written, for example HOME=/tmp"
        )


def check_writable(folder: Path, remedy: str) -> None:
    """Raises PlaceError unless the folder can be written, or created if it does not exist; creates nothing.

    remedy: ends the message.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise PlaceError(f"{folder}: cannot be made, {existing} is not a folder; {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        because = "" if existing == folder else f", because {existing} cannot be written"
        raise PlaceError(f"{folder}: cannot be {'made' if because else 'written'}{because}; {remedy}")


def out_of_space(error: BaseException | None) -> str:
    """A message for an error that comes from a full disk or quota, at any depth and also in a process of Ray; "" for others."""
    while error is not None:
        inner = getattr(error, "cause", None) or error.__cause__ or error.__context__  # the first is of Ray's errors
        if isinstance(error, StoreError) and out_of_space(inner):
            return f"{error}; {FREE}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.filename or 'a file of the run'}: {error.strerror}; {FREE}"
        error = inner
    return ""


def ray_folder() -> Path:
    """The folder in which a local Ray keeps its sockets and logs: RAY_TMPDIR, else TMPDIR, else /tmp.

    Raises PlaceError if it cannot be written, or if the sockets' paths would be longer than the system allows.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = absolute(os.environ[variable] if variable else "/tmp")
    shown, length = f"{variable}={folder}" if variable else str(folder), len(os.fsencode(folder / RAY_SOCKET))
    if length > SOCKET_BYTES:
        raise PlaceError(
            f"{shown}: is too long for Ray, whose sockets below it would have paths of {length} bytes where {SOCKET_BYTES} are allowed; "
            "set RAY_TMPDIR to a short one, for example RAY_TMPDIR=/tmp"
        )
    try:
        check_writable(folder / "ray", "set RAY_TMPDIR to a folder that can be written")
    except PlaceError as error:
        raise PlaceError(f"Ray's temporary files: {error}") from error
    return folder
