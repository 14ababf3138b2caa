"""The claim on a run directory: one process at a time, also from hosts whose file locks do not reach one another."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.rundir import RunDir
from raysweep.storage import claims
from raysweep.storage.claims import LOCK, RECORD, ClaimError, claimed, kernel

HOLD = "import sys, time; from pathlib import Path; from raysweep.storage.claims import claimed\n"
HOLD += "with claimed(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 0.1)
    monkeypatch.setattr(claims, "PATIENCE_S", 1.0)


def foreign(record: Path) -> None:
    """A record of another host, whose lock does not reach this one."""
    holder = {"host": "node-7", "pid": 4242, "kernel": "another", "since": "2026-01-01T00:00:00+0000"}
    record.write_text(json.dumps(holder))


def test_the_holder_is_named_and_its_end_frees_the_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    who = re.escape(f"(process {process.pid} on {socket.gethostname()}, since 20")
    with pytest.raises(ClaimError, match=who), claimed(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / RECORD).is_file()  # left over
    started = time.monotonic()
    with claimed(tmp_path):
        assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < claims.PATIENCE_S / 2  # on one host the lock alone decides
    assert not (tmp_path / RECORD).exists()


def test_a_run_on_another_host_is_seen_although_its_lock_is_not(tmp_path):
    sweep = load(None, (f"storage={tmp_path}",))
    folder = RunDir.of(sweep)
    folder.path.mkdir()
    foreign(folder.path / RECORD)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(folder.path / RECORD)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        message = r"process 4242 on node-7, since 2026.*remove .*lock and .*holder\.json"
        with pytest.raises(ConfigError, match=message), folder.claim(sweep, {}):
            pass
        assert not folder.exists()  # nothing was written
    finally:
        ended.set()
        thread.join()


def test_the_claim_of_a_dead_host_is_taken_over(tmp_path):
    foreign(tmp_path / RECORD)
    started = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - started >= claims.PATIENCE_S
        holder = json.loads((tmp_path / RECORD).read_text())
        assert (holder["host"], holder["pid"], holder["kernel"]) == (socket.gethostname(), os.getpid(), kernel())
        before = (tmp_path / RECORD).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / RECORD).stat().st_mtime_ns > before  # others see that this one lives


def test_a_lock_that_a_server_keeps_for_a_dead_host_is_removed_as_the_message_says(tmp_path):
    from filelock import FileLock

    kept = FileLock(tmp_path / LOCK)
    kept.acquire()
    with pytest.raises(ClaimError, match="If that host is dead"), claimed(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with claimed(tmp_path):
        pass
    kept.release()
