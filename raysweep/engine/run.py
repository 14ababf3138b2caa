"""Runs a sweep: preparation, anchors, search, audit, front, report."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass

from raysweep.config.schema import Sweep
from raysweep.context import Context
from raysweep.engine.attempt import attempt
from raysweep.engine.audits import measure_anchors
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.engine import Engine
from raysweep.engine.events import Events
from raysweep.engine.final_audit import FinalAudit
from raysweep.engine.prepare import open_choices, prepare, prepare_methods
from raysweep.engine.profiling import phase, record, write_timeline
from raysweep.engine.tuning import run_trials
from raysweep.models import stored
from raysweep.results.front import Front
from raysweep.results.trials import Trial, trial_table, write_trials
from raysweep.rundir import RunDir
from raysweep.tasks.records import data_lines


@dataclass
class Result:
    """The outcome of a run. incomplete: checks that failed on anchors or in the final audit, and audits that lack an objective."""

    folder: RunDir
    front: Front
    trials: list[Trial]
    incomplete: list[str]


def run_sweep(sweep: Sweep, events: Events) -> Result:
    """Runs a sweep to its report, or resumes it.

    Raises:
        ConfigError: the config, the run directory or the cluster does not allow it.
        RunFailed: it cannot end with a front; the run directory states the reason and contains a report of the results so far.
        Interrupted, KeyboardInterrupt: SIGINT or SIGTERM ended it, during the search or at another time; the same call resumes.
    """
    began = time.monotonic()
    task, spaces = resolve_sweep(sweep)
    folder = RunDir.of(sweep)
    with attempt(folder, sweep, task, lambda: _report_failure(folder, events)) as in_force:
        trials = trial_table(folder, folder.run_id)
        ended = sum(t.state != "RUNNING" for t in trials)
        resumed = f"  (resuming: {ended} of {sweep.search.trials} trials done)" if trials else ""
        events.say("run", f"{folder.path}{resumed}")
        for text in sweep.warnings:
            events.say("warning", text)
        for line in data_lines(task):
            events.say("data", line)
        with Engine.open(folder, in_force, task, events, tuple(spaces)) as engine:
            record(engine, "start", began)
            result = _run(engine)
            if sweep.profile:
                write_timeline(engine)
        folder.update(state="incomplete" if result.incomplete else "done", incomplete=result.incomplete)
    return result


def _run(engine: Engine) -> Result:
    sweep, folder, events = engine.sweep, engine.folder, engine.events
    for command in monitors(folder):
        events.say("url", command)
    with phase(engine, "prepare"):
        context = prepare(engine)
    stored.say_place(folder.candidates, context.base)
    with phase(engine, "anchors"):
        # before the search, which would be wasted on a base that has not learned what it must forget
        incomplete = measure_anchors(engine, context, "audit", sweep.audit.audit)
        incomplete += measure_anchors(engine, context, "probe", sweep.audit.probe)
    with phase(engine, "prepare"):
        prepare_methods(engine, context)
    outdated = probed_otherwise(trial_table(folder, engine.run_id), context, sweep)
    if outdated:
        events.say("warning", outdated)
    with phase(engine, "search"):
        run_trials(engine, [open_choices(space, context) for space in engine.spaces])
    trials = write_trials(folder, engine.run_id)
    audit = FinalAudit.of(engine, context, trials, incomplete)
    return Result(folder, audit.conclude(), trials, audit.incomplete)


def probed_otherwise(trials: list[Trial], context: Context, sweep: Sweep) -> str:
    """A warning if completed trials were probed by other code, models or judges than later ones will be; "" if none was."""
    done = [t for t in trials if t.state == "COMPLETE"]

    def key(t: Trial) -> str:
        return context.request("probe", sweep.audit.probe, t.trial, t.method, None, t.digest).key

    changed = [t for t in done if t.probe != key(t)]
    if not changed:
        return ""
    return (
        f"{len(changed)} of {len(done)} trials were probed before the checks' code, the anchors or the judges changed, so the "
        "search compares what was measured in two ways; all audited candidates are measured again. For a consistent "
        f"search run under another name, for example name={sweep.name}-2"
    )


def monitors(folder: RunDir) -> list[str]:
    """Commands that show a running sweep."""
    return [
        f"tensorboard --logdir {shlex.quote(str(folder.path / 'tune'))}",
        f"optuna-dashboard {shlex.quote(str(folder.journal))}",
    ]


def _report_failure(folder: RunDir, events: Events) -> None:
    """Writes the trials and a report of the results so far."""
    from raysweep.report.page import build

    try:
        write_trials(folder, folder.run_id)
        events.say("report", f"of the results so far: {build(folder)}")
    except Exception as error:  # the caller must see the run's failure, not this one
        events.say("warning", f"no report could be written: {type(error).__name__}: {error}")
