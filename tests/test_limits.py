"""A trial that a time limit ended continues from its checkpoint once the limit is longer. Real Ray."""

from __future__ import annotations

import pytest
from small import SMALL, install_faulty, log, start

from raysweep.rundir import RunDir
from raysweep.storage.schemas import TRIALS, read_table

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_a_trial_that_ran_out_of_time_continues_under_a_longer_limit(tmp_path, cache):
    (tmp_path / "small.yaml").write_text(SMALL)
    faulty = install_faulty(tmp_path / "faulty")
    calls = tmp_path / "calls"
    settings = ("name=late", "methods=[slow]", "spaces={}", "search.trials=1", "audit.rounds=1", "train.checkpoint_s=1")

    def ended(*more: str) -> int:
        run = start(tmp_path, cache, "run", "small.yaml", *settings, *more, PYTHONPATH=faulty, FAULTY_MARK=str(calls))
        return run.wait(timeout=400)

    assert ended("train.budget_s=10") == 1, log(tmp_path)
    assert "exceeded its budget of 10 s" in log(tmp_path)
    begun = len(calls.read_text().split())
    assert ended("train.budget_s=10") == 1, log(tmp_path)  # no limit is larger, so nothing is tried again
    assert len(calls.read_text().split()) == begun
    assert ended("train.budget_s=600") == 0, log(tmp_path)
    assert "tried again, since the limit that ended them is wider by now or the disk was full: 000-slow" in log(
        tmp_path
    )
    run = RunDir(tmp_path / "runs" / "late")
    trials = read_table(run.trials, TRIALS).to_pylist()
    assert [(t["trial"], t["state"], t["number"]) for t in trials] == [("000-slow", "COMPLETE", 1)]
    again = len(calls.read_text().split()) - begun
    assert (
        begun + again <= 6 + 2
    )  # it continued from its checkpoint: the step that was cut short, at most one more, and the rest
    assert run.sweep().train.budget_s == 600
