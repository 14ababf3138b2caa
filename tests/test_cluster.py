"""Nodes die, join and are drained while a sweep runs on real raylets: every trial ends once, and no audit is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from raylets import await_line, raylets, sweep
from small import SMALL, log

from raysweep.results.trials import trial_table
from raysweep.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
RECOVERY_S = 60


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "sweep.yaml").write_text(SMALL)
    return tmp_path


def check_whole(folder: Path, process) -> None:
    """The sweep has ended; each of its trials is complete, and each audit was recorded once."""
    assert process.wait(timeout=600) == 0, log(folder)
    run = RunDir(folder / "runs" / "small")
    trials = trial_table(run, run.run_id)
    assert [t.state for t in trials] == ["COMPLETE"] * 6, log(folder)
    keys = [json.loads(line)["key"] for line in (run.path / "audits.jsonl").read_text().splitlines() if line]
    assert len(keys) == len(set(keys))
    assert run.report.is_file()


def seconds_between(folder: Path, first: str, then: str) -> float:
    """From the first line that contains `first` to the next that contains `then`."""
    lines = [line for line in log(folder).splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    times = [datetime.strptime(line[:8], "%H:%M:%S") for line in lines]
    start = next(k for k, line in enumerate(lines) if first in line)
    end = next(k for k, line in enumerate(lines) if k > start and then in line)
    return (times[end] - times[start]).seconds


def test_a_train_node_dies_and_another_joins(folder):
    """Until the other one joins, the audit node does both."""
    with raylets("train", "audit") as made:
        process = sweep(folder, made)
        await_line(process, folder, " trial  ")
        made.kill(made.nodes[0])
        await_line(process, folder, "(train) left")
        made.add("train")
        check_whole(folder, process)
    assert "(train) joined" in log(folder)
    assert seconds_between(folder, "(train) left", " trial  ") < RECOVERY_S


def test_the_audit_node_dies_and_none_joins(folder):
    with raylets("train", "audit") as made:
        process = sweep(folder, made)
        await_line(process, folder, " anchor ")
        made.kill(made.nodes[1])
        check_whole(folder, process)
    assert seconds_between(folder, "(audit) left", " trial  ") < RECOVERY_S


def test_a_node_is_drained_and_its_trial_goes_on_elsewhere(folder):
    with raylets("train", "train", "audit") as made:
        process = sweep(folder, made, "resources.slots=2")
        await_line(process, folder, " trial  ")
        command = ["drain-node", "--address", made.address, "--node-id", made.nodes[0].node_id]
        reason = [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            "120",
        ]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command, *reason], check=True, env=made.environment
        )
        await_line(process, folder, "(train) left")
        check_whole(folder, process)


def test_a_run_waits_for_the_nodes_that_it_expects(folder):
    """It starts with the first that can work, and uses the others when they join."""
    expect = "{train: {nodes: 2, cpus: 2}, audit: {nodes: 1, cpus: 2}}"
    with raylets() as made:
        process = sweep(folder, made, f"resources.expect={expect}", "resources.slots=2")
        await_line(process, folder, "waiting for nodes")
        time.sleep(3)
        assert " prepare " not in log(folder)
        made.add("train")
        await_line(process, folder, " ready")
        made.add("audit")
        made.add("train")
        check_whole(folder, process)
    assert log(folder).count(" joined") >= 1


def test_a_run_on_a_control_node_alone_is_refused(folder):
    with raylets() as made:
        process = sweep(folder, made)
        assert process.wait(timeout=200) == 2, log(folder)
    assert "name the nodes to wait for" in log(folder)


def test_a_trial_over_two_nodes(folder):
    """By Ray Train, with a worker on each."""
    with raylets("train", "train", "audit", cpus=1) as made:
        process = sweep(folder, made, "train.workers=2", "resources.cpus_per_worker=1", "resources.slots=1")
        check_whole(folder, process)
