"""The claim on a folder: one process at a time works in it, on whatever host.

A lock of the file system decides. The system drops it when its process ends; on NFS (version 4, or 3 with its lock service) it
also holds between hosts, and the server drops the locks of a host that died. Because mounts exist whose locks end at the host, the
holder also keeps a record beside the lock and touches it every `BEAT_S` seconds. A record of another host that is still being
touched is a claim, too; one that is not touched for `PATIENCE_S` seconds is left over, and taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from raysweep.storage.files import write_json

LOCK, RECORD = "lock", "holder.json"
BEAT_S = 2.0
PATIENCE_S = 15.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


class ClaimError(RuntimeError):
    """Another process holds the folder; the message names it, and what to do if it is dead."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds an existing folder inside a `with` block.

    Raises ClaimError if another process holds it, StoreError or OSError if it cannot be written.
    """
    lock, record = FileLock(folder / LOCK), folder / RECORD
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ClaimError(_refusal(folder)) from error
    try:
        if _kernel_of(record) not in ("", kernel()) and is_touched(record):
            raise ClaimError(_refusal(folder))
        write_json(
            record,
            {"host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel(), "since": time.strftime("%FT%T%z")},
        )
        try:
            with _touching(record):
                yield
        finally:
            record.unlink(missing_ok=True)
    finally:
        lock.release()


def kernel() -> str:
    """Names the running system: processes of one, in whatever container, see each other's locks."""
    return BOOT.read_text().strip() if BOOT.is_file() else socket.gethostname()


def is_touched(record: Path, patience_s: float | None = None) -> bool:
    """Whether a record changes while it is watched: clocks of hosts differ, so its age alone says nothing."""
    first, end = _touched(record), time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while first is not None and time.monotonic() < end:
        time.sleep(BEAT_S / 4)
        if _touched(record) not in (first, None):
            return True
    return False


@contextlib.contextmanager
def _touching(record: Path) -> Iterator[None]:
    """Touches the record every `BEAT_S` seconds; that needs no space, so a full disk does not look like a dead host."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(record)

    thread = threading.Thread(target=touch, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _touched(record: Path) -> int | None:
    """When the record was last changed, in its file server's nanoseconds; None without a record.

    Opened for it, because only then does NFS ask the server.
    """
    try:
        with open(record, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _content(record: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _kernel_of(record: Path) -> str:
    return _content(record).get("kernel", "")


def _refusal(folder: Path) -> str:
    holder = _content(folder / RECORD)
    by = f" (process {holder['pid']} on {holder['host']}, since {holder['since']})" if holder else ""
    return (
        f"{folder}: another raysweep run is at work on this directory{by}; wait for it, stop it, or choose another name. If that host is "
        f"dead and its file server keeps the lock, remove {folder / LOCK} and {folder / RECORD}, and run the same command again"
    )
