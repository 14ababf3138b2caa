"""A base that has not learned what it must forget ends the run before the search, and a run that fails leaves a report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types

import numpy as np
import pytest
from click.testing import CliRunner
from finished import run as finished
from small import SMALL, log, start

from raysweep.auditing.anchors import KNOWS, SCALED_BY, Anchors, Indistinct, Unmeasured, View, assess_views
from raysweep.auditing.power import AFFORDABLE, DECIDED_BY, decided_by, remedies
from raysweep.auditing.terms import Measured
from raysweep.cli import main
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine import run
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.events import Silent
from raysweep.registry import TASKS
from raysweep.rundir import RunDir
from raysweep.tasks.base import OBJECTIVES

TIER = load(None).audit.audit


def view(gap: float, se: float, metric: str = "reconstruction.correlation") -> View:
    return View(metric, 0.1 + gap, 0.1, se, False, "")


def test_every_metric_of_an_objective_names_what_decides_it():
    tasks = [load(None, (f"task={name}",)).task.build() for name in TASKS if name != "images"]
    metrics = {m for t in tasks for m in (*t.views, t.quality)}
    metrics |= {m for o in OBJECTIVES.values() for m in (*o.views, o.quality)}
    assert metrics - {"relearning.presence"} == set(DECIDED_BY)
    for metric in metrics:
        for kind in ("points", "class", "concept"):
            setting = decided_by(metric, kind).rpartition(".")[2]
            assert hasattr(TIER, setting) or DECIDED_BY[metric] is None


def test_remedies_are_longer_training_and_if_that_can_help_more_samples(points_task):
    advice = remedies([view(0.02, 0.01)], points_task, "audit", TIER)
    assert "task.base_steps, 20 so far" in advice
    assert f"raise audit.audit.noises from {TIER.noises} to about {math.ceil(TIER.noises * 4)}" in advice
    assert "raise" not in remedies(
        [view(0.001, 0.01)], points_task, "audit", TIER
    )  # more than AFFORDABLE times as many
    assert AFFORDABLE < (4 * 0.01 / 0.001) ** 2
    assert "raise" not in remedies([view(0.0, 0.0)], points_task, "audit", TIER)
    probe = remedies([view(0.02, 0.01)], points_task, "probe", TIER)
    assert "audit.probe.noises" in probe
    assert "hardly learned" not in probe  # the audit has told base and oracles apart by then
    given_base = dataclasses.replace(points_task, base="somewhere")
    assert "task.base may not have learned" in remedies([view(0.02, 0.01)], given_base, "audit", TIER)


def test_the_advised_number_of_samples_detects_the_same_gap():
    """Errors fall with the root of the samples: at the advised number the same gap is detected."""
    rng = np.random.default_rng(0)

    def anchors(count: int) -> Anchors:
        units = 0.02 + 0.25 * rng.normal(size=count)

        def measured(shift: np.ndarray) -> Measured:
            parts = np.array([np.delete(shift, np.arange(g, count, 10)).mean() for g in range(10)])
            return Measured({"v.m": float(shift.mean())}, {"v.m": parts})

        return Anchors(measured(units), (measured(0 * units),), measured(units))

    with pytest.raises(Indistinct) as caught:
        assess_views(anchors(60), ("v.m",))
    gap_se = caught.value.views[0].gap_se
    needed = 60 * (4 * gap_se / 0.02) ** 2
    assert assess_views(anchors(int(4 * needed)), ("v.m",))[0].informative


@pytest.mark.parametrize(("metric", "side"), sorted(item for item in KNOWS.items() if item[0] not in SCALED_BY))
def test_a_base_that_knows_less_than_the_oracles_has_nothing_to_forget(metric, side):
    """Such as a base after a single step of training: its distance to the oracles is real, but unrelated to forgetting."""

    def measured(value: float) -> Measured:
        return Measured({metric: value}, {metric: np.full(10, value) + 0.001 * np.arange(10)})

    right = Anchors(measured(0.5 + 0.3 * side), (measured(0.5),), measured(0.0))
    assert assess_views(right, (metric,))[0].informative
    wrong = Anchors(measured(0.5 - 0.3 * side), (measured(0.5),), measured(0.0))
    with pytest.raises(Indistinct, match="shows less of what must be forgotten than the oracle"):
        assess_views(wrong, (metric,))


def test_every_view_of_a_task_has_a_side():
    views = {m for o in OBJECTIVES.values() for m in o.views}
    views |= {m for name in TASKS if name != "images" for m in load(None, (f"task={name}",)).task.build().views}
    assert views == set(KNOWS)


@pytest.fixture
def without_ray(monkeypatch):
    """The engine with every part that needs Ray replaced; returns the calls, in order."""
    called: list[str] = []

    @contextlib.contextmanager
    def opened(folder, sweep, task, events, spaces):
        yield Engine(sweep, task, spaces, folder, folder.run_id, events, *4 * [None])

    context = types.SimpleNamespace(oracles=("oracle-0",), base="base")
    monkeypatch.setattr(run.Engine, "open", opened)
    monkeypatch.setattr(run, "prepare", lambda _: called.append("prepare") or context)
    monkeypatch.setattr(run, "measure_anchors", lambda *a: called.append(f"anchors {a[2]}") or [])
    monkeypatch.setattr(run, "prepare_methods", lambda *_: called.append("methods"))
    monkeypatch.setattr(run, "open_choices", lambda space, _: space)
    monkeypatch.setattr(run, "run_trials", lambda *_: called.append("search"))
    return called


def sweep(tmp_path):
    return load(
        None, (f"storage={tmp_path}", f"cache={tmp_path / 'cache'}", "name=failing", "methods=[rgd]", "search.trials=2")
    )


def test_the_base_is_checked_by_the_audits_samples_before_methods_and_search(tmp_path, monkeypatch, without_ray):
    with pytest.raises(RunFailed, match="all 0 trials failed"):  # since no trial was made
        run.run_sweep(sweep(tmp_path), Silent())
    assert without_ray == ["prepare", "anchors audit", "anchors probe", "methods", "search"]
    without_ray.clear()

    def indistinct(*arguments):
        raise Unmeasured(f"{arguments[2]}: base and oracle differ by 0.03")

    monkeypatch.setattr(run, "measure_anchors", indistinct)
    with pytest.raises(RunFailed, match=r"audit: base and oracle differ by 0\.03"):
        run.run_sweep(sweep(tmp_path), Silent())
    assert without_ray == ["prepare"]


@pytest.mark.parametrize(
    "error",
    [
        RunFailed("training base failed: it diverged"),
        Unmeasured("audit: no view tells"),
        ConfigError("resources: no place"),
        ZeroDivisionError("oh"),
    ],
)
def test_a_run_that_fails_leaves_a_report_that_says_why(tmp_path, monkeypatch, without_ray, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(run, "run_trials", fails)
    said = []
    with pytest.raises(type(error) if isinstance(error, ConfigError | ZeroDivisionError) else RunFailed):
        run.run_sweep(sweep(tmp_path), types.SimpleNamespace(say=lambda *event: said.append(event)))
    folder = RunDir(tmp_path / "failing")
    assert folder.read_manifest()["state"] == "failed"
    html = folder.report.read_text()
    assert "FAILED" in html
    assert (
        f"The run failed: {'ZeroDivisionError: ' if isinstance(error, ZeroDivisionError) else ''}{error}. No candidate is recommended."
        in html
    )
    assert ("report", f"of the results so far: {folder.report}") in said


def test_an_attempt_does_not_inherit_the_reason_of_the_one_before(tmp_path, monkeypatch, without_ray):
    folder = finished(tmp_path / "failing", None, state="failed", reason="Ray did not start", incomplete=["x"])
    folder.update(digests={"task": folder.sweep().task.build().digest})
    monkeypatch.setattr(
        run,
        "FinalAudit",
        types.SimpleNamespace(of=lambda *_: types.SimpleNamespace(conclude=lambda: None, incomplete=[])),
    )
    run.run_sweep(folder.sweep(), Silent())
    status = json.loads(CliRunner().invoke(main, ["status", str(folder.path), "--json"]).output)
    assert (status["state"], status["reason"], status["incomplete"]) == ("done", "", [])


def test_the_report_names_the_commits_that_a_run_was_resumed_at(tmp_path, monkeypatch, without_ray):
    for commit in ("a" * 40, "a" * 40, "b" * 40):
        monkeypatch.setattr("raysweep.engine.attempt.git_commit", lambda commit=commit: commit)
        monkeypatch.setattr("raysweep.rundir.git_commit", lambda commit=commit: commit)
        with pytest.raises(RunFailed):
            run.run_sweep(sweep(tmp_path), Silent())
    assert f"at commit {'a' * 40}, resumed at {'b' * 40}." in RunDir(tmp_path / "failing").report.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_undertrained_base_ends_a_real_run_before_its_search(tmp_path, cache):
    (tmp_path / "small.yaml").write_text(SMALL)
    process = start(tmp_path, cache, "run", "small.yaml", "task.base_steps=1")
    assert process.wait(timeout=500) == 1, log(tmp_path)
    output = log(tmp_path)
    assert "audit: no view shows that the base knows more of what must be forgotten than the oracles" in output
    assert "task.base_steps, 1 so far" in output
    assert " trial  " not in output
    assert "FAILED" in (tmp_path / "runs" / "small" / "report.html").read_text()
