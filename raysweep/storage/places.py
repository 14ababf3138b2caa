"""Where things are: paths made absolute once, and folders that can be written, or a sentence that says why not.

A relative path of a config or a command means one below the working directory of the command. It is made absolute when the
config is read, because workers have working directories of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103  # of a Unix socket's path
# below its temporary folder; the number at the end is a process's
RAY_SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"


class PlaceError(ValueError):
    """A path that cannot be used; the message names it and says what to do."""


def absolute(path: Path | str) -> Path:
    """A path from the root, `~` replaced by the home it stands for; links stay as they are.

    Raises PlaceError where there is no such home, or for what cannot be a path on this system.
    """
    try:
        found = Path(path).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            found.lstat()
    except RuntimeError as error:
        raise PlaceError(f"{path}: there is no home folder for '~'; write the path out") from error
    except (OSError, ValueError) as error:  # a name that is too long, or that holds a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise PlaceError(f"{str(path)[:60]!r}: cannot be a path ({reason})") from error
    return found


def location(text: str) -> str:
    """A path as by `absolute`, or a URI (s3://...) as it is."""
    return text if "://" in text else str(absolute(text))


Place = Annotated[Path, AfterValidator(absolute)]
Location = Annotated[str, AfterValidator(location)]


def check_home() -> None:
    """Raises PlaceError if the user has no home folder, as in a container whose user has no entry in passwd: Ray needs one."""
    if os.path.expanduser("~") == "~":
        raise PlaceError(
            "this user has no home folder: set HOME to a folder that can be written, for example HOME=/tmp"
        )


def check_writable(folder: Path, remedy: str) -> None:
    """Raises PlaceError unless the folder can be written, or made where it is not there yet; nothing is created."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise PlaceError(f"{folder}: cannot be made, {there} is not a folder; {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        below = "" if there == folder else f", because {there} cannot be written"
        raise PlaceError(f"{folder}: cannot be {'made' if below else 'written'}{below}; {remedy}")


def ray_folder() -> Path:
    """The folder below which a local Ray keeps its sockets and logs: that of RAY_TMPDIR, else of TMPDIR, else /tmp.

    Raises PlaceError if it cannot be written, or if the sockets' paths would be longer than the system allows.
    """
    chosen = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = absolute(os.environ[chosen] if chosen else "/tmp")
    said, length = f"{chosen}={folder}" if chosen else str(folder), len(os.fsencode(folder / RAY_SOCKET))
    if length > SOCKET_BYTES:
        raise PlaceError(
            f"{said}: is too long for Ray, whose sockets below it would have paths of {length} bytes where {SOCKET_BYTES} are allowed; "
            "set RAY_TMPDIR to a short one, for example RAY_TMPDIR=/tmp"
        )
    try:
        check_writable(folder / "ray", "set RAY_TMPDIR to a folder that can be written")
    except PlaceError as error:
        raise PlaceError(f"Ray's temporary files: {error}") from error
    return folder
