"""Signals end a run whoever sends them and whenever: also where SIGINT is ignored, and after Tune had its own handler."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from small import SMALL, log, start
from tiny import ROOT

from raysweep.pool import own_handlers

WAITS = """
import signal, sys, time
sys.path.insert(0, {root!r})
from raysweep.pool import interrupt
signal.signal(signal.SIGTERM, interrupt)
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "usual"])
def test_sigterm_ends_what_a_script_started_in_the_background(handler):
    """A shell starts such processes with SIGINT ignored, and Python then leaves it so."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(root=str(ROOT))], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "ended\n"


def test_the_handler_of_sigint_is_ours_again_after_tune():
    before = signal.getsignal(signal.SIGINT)
    with own_handlers():
        signal.signal(signal.SIGINT, lambda *_: None)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_an_interrupted_run_does_not_wait_for_the_training_of_its_base(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SMALL.replace("base_steps: 70", "base_steps: 400"))
    process = start(tmp_path, tmp_path / "cache", "run", "sweep.yaml")
    try:
        while "progress" not in log(tmp_path):
            assert process.poll() is None, log(tmp_path)
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, log(tmp_path)
    finally:
        process.kill()
    assert log(tmp_path).endswith("interrupted: the state is saved, the same command goes on from here\n")
    assert "process will exit" not in log(tmp_path)
    assert json.loads((tmp_path / "runs" / "small" / "manifest.json").read_text())["state"] == "interrupted"
