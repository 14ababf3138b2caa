"""Events and counts of a sweep's trials, at its start and when it resumes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raysweep.config.reader import load
from raysweep.engine import tuning
from raysweep.rundir import RunDir
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Parameter, Space
from raysweep.storage.files import checkpoint_path

LR = Space("rgd", {}, (Parameter("lr", "log", (1e-5, 1e-3), {}),), ())


class Gauge:
    """Replaces Ray's gauge and keeps the last value of each name and its tags."""

    seen: dict[tuple, float] = {}

    def __init__(self, name, description, tags):
        self.name = name

    def set(self, value, tags):
        self.seen[self.name, *sorted(tags.items())] = value


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(tuning, "Gauge", Gauge)
    monkeypatch.setattr(Gauge, "seen", {})
    return lambda state: Gauge.seen.get(("raysweep_trials", ("run", "digits-picture"), ("state", state)))


def test_counts_continue_after_a_resumption(tmp_path, counted):
    sweep, said = load(None, (f"storage={tmp_path}", "methods=[rgd]", "search.trials=5")), []
    folder = RunDir.of(sweep)
    folder.path.mkdir()
    search = ParetoSearch(folder.journal, "r", [LR], 5, 5, 0)
    configs = [search.suggest(k) for k in "abcde"]
    for k in "ab":
        search.on_trial_complete(k, {"reason": "diverged", FINAL: True})
    search.on_trial_complete("c", {"residue": 0.5, "damage": 0.5, FINAL: True})
    shown = SimpleNamespace(say=lambda *event: said.append(event), tick=lambda *_: None)
    events = tuning.TrialEvents(folder, "r", sweep, shown)
    assert (counted("failed"), counted("ended")) == (2, 3)
    left = checkpoint_path(folder.candidates / configs[3]["trial"])
    left.parent.mkdir()
    left.write_bytes(b"")
    events.ended(configs[3], {"reason": "exceeded its budget of 3 s"})
    assert (counted("failed"), counted("ended")) == (3, 4)
    assert not left.exists()  # a trial that ended needs its checkpoint no longer
    events.ended(configs[4], {"residue": 0.1, "damage": 0.2, "train_s": 1.0, "audit_s": 2.0})
    assert (counted("failed"), counted("ended")) == (3, 5)
    assert [kind for kind, _ in said] == ["failed", "trial"]
    assert said[1][1].endswith("5/5")
