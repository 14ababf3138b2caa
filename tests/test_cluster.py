"""Nodes die, join and are drained while a sweep runs on real raylets: every trial ends once, and no audit is missing."""

from __future__ import annotations

import json
import re
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
    times = [
        (datetime.strptime(line[:8], "%H:%M:%S"), line) for line in log(folder).splitlines() if re.match(r"\d\d:", line)
    ]
    start = next(at for at, line in times if first in line)
    return next((at - start).total_seconds() for at, line in times if at >= start and then in line)


def test_a_train_node_dies_and_another_joins(folder):
    with raylets("train", "audit") as made:
        process = sweep(folder, made)
        await_line(process, folder, " trial  ", count=1)
        made.kill(made.nodes[0])
        await_line(process, folder, "(train) left")
        made.add("train")
        check_whole(folder, process)
    assert seconds_between(folder, "(train) joined", " trial  ") < RECOVERY_S
