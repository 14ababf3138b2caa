"""What the shell completes."""

from __future__ import annotations

from click.shell_completion import BashComplete

from raysweep.cli import main
from raysweep.models.folders import CARD


def completed(*words: str) -> list[str]:
    *before, begun = words
    shell = BashComplete(main, {}, "raysweep", "_RAYSWEEP_COMPLETE")
    return [item.value for item in shell.get_completions(before, begun) if item.type == "plain"]


def test_presets_and_settings_are_offered():
    assert completed("run", "rgd-c") == ["rgd-cifar10-edm"]
    assert completed("run", "search.tr") == ["search.trials="]
    assert {"audit.probe.samples=", "audit.durability.samples="} <= set(completed("validate", "a.yaml", "audit."))
    assert {"task.copies=", "task.train=", "task.override="} <= set(completed("run", "a.yaml", "task."))
    assert completed("run", "a.yaml", "search.trials=3") == []


def test_runs_and_their_trials_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    for trial in ("000-rgd", "001-siss"):
        (run / "candidates" / trial).mkdir(parents=True)
        (run / "candidates" / trial / CARD).write_text("{}")
    (run / "manifest.json").write_text("{}")
    assert completed("status", "") == ["mine"]
    assert completed("export", "mine", "") == ["000-rgd", "001-siss"]
    assert completed("show", "mine", "001") == ["001-siss"]
    assert completed("show", "mi") == ["mine"]
    assert completed("export", "other", "") == []
