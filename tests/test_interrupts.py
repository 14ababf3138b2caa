"""Signals end a run at any time and from any sender: also if SIGINT is ignored, and after Tune's own handler."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from small import SMALL, log, start
from tiny import ROOT

from raysweep.engine.tuning import restored_interrupts

WAITS = """
import signal, sys, time
sys.path.insert(0, {root!r})
from raysweep.engine.cluster import interrupt
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
        [sys.executable, "-c", WAITS.format(root=str(ROOT))],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "ended\n"


def test_the_handler_of_sigint_is_ours_again_after_tune():
    before = signal.getsignal(signal.SIGINT)
    with restored_interrupts():
        signal.signal(signal.SIGINT, lambda *_: None)
    assert signal.getsignal(signal.SIGINT) is before


def interrupted(folder, awaited: str, *arguments: str) -> str:
    """The output of a run that is signalled to end once `awaited` appears in it."""
    process = start(folder, folder / "cache", "run", "sweep.yaml", *arguments)
    try:
        while awaited not in log(folder):
            assert process.poll() is None, log(folder)
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, log(folder)
    finally:
        process.kill()
    said = log(folder)
    assert said.endswith("Interrupted. Run the same command again to resume.\n")
    assert "raylet" not in said
    assert "process will exit" not in said
    assert json.loads((folder / "runs" / "small" / "manifest.json").read_text())["state"] == "interrupted"
    return said


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["warm", "isolated"])
def test_an_interrupted_run_does_not_wait_for_the_training_of_its_base(tmp_path, executor):
    (tmp_path / "sweep.yaml").write_text(SMALL.replace("base_steps: 70", "base_steps: 400"))
    interrupted(tmp_path, "progress" if executor == "warm" else "prepare", f"train.executor={executor}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_interrupted_in_its_audit_resumes_there(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SMALL)
    interrupted(tmp_path, " audit  ")
    run = tmp_path / "runs" / "small"
    cards = {p: p.stat().st_mtime_ns for p in run.glob("candidates/*/raysweep.json")}
    assert len(cards) == 6
    again = start(tmp_path, tmp_path / "cache", "run", "sweep.yaml")
    assert again.wait(timeout=600) == 0, log(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in cards} == cards
    keys = [json.loads(line)["key"] for line in (run / "audits.jsonl").read_text().splitlines() if line]
    assert len(keys) == len(set(keys))
    assert (run / "report.html").is_file()
