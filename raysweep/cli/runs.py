"""Verbs for sweeps and their results: run, validate, status, report, show."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raysweep.cli import completion
from raysweep.cli.common import (
    FAILED,
    INCOMPLETE,
    INTERRUPTED,
    OK,
    config_path,
    load_sweep,
    open_run,
    print_json,
    print_rows,
    print_warnings,
    read_front,
    reports_errors,
    run_display,
    short_path,
)

if TYPE_CHECKING:
    from raysweep.config.presets import About
    from raysweep.config.schema import Sweep
    from raysweep.engine.resources import Node
    from raysweep.engine.run import Result
    from raysweep.rundir import RunDir

CODES = {"done": OK, "incomplete": INCOMPLETE, "failed": FAILED, "interrupted": INTERRUPTED}  # by state of a run


@click.command()
@click.argument("config", required=False, shell_complete=completion.configs)
@click.argument("overrides", nargs=-1, shell_complete=completion.settings)
@click.option("--dry-run", is_flag=True, help="Show plan, cost and what is tested; start nothing.")
@reports_errors
def run(config: str | None, overrides: tuple[str, ...], dry_run: bool) -> int:
    """Run a sweep to its report, or resume it; without CONFIG, the embedded sweep.

    \b
    raysweep run
    raysweep run examples/class.yaml search.trials=17 name=quick

    Exit codes: 0 finished, whether or not a candidate is recommended (front.json says: recommended.trial), 1 failed,
    2 bad input, 3 finished but some checks failed or are missing, 130 interrupted.
    """
    sweep = load_sweep(config, overrides, absent=dry_run)
    if dry_run:
        from raysweep.config import presets

        about = presets.about_of(config_path(config), sweep.preset) if config and sweep.scale == "paper" else None
        return _plan_sweep(sweep) if about is None else _plan_preset(sweep, about)
    from raysweep.engine.attempt import Interrupted
    from raysweep.engine.run import run_sweep

    with run_display() as display:
        try:
            result = run_sweep(sweep, display)
        except Interrupted:
            raise KeyboardInterrupt from None
        _say_answer(result, display.say)
    if sweep.profile and display.mode != "none":
        _print_profile(result.folder)
    return INCOMPLETE if result.incomplete else OK


def _say_answer(result: Result, say: Callable[[str, str], None]) -> None:
    """Prints the outcome of a sweep: its front, missing checks, the answer, and the path of the report."""
    front = result.front
    assert front is not None  # of a sweep that ended
    failed = sum(t.has_failed for t in result.trials)
    failures = f"{failed} of {len(result.trials)} trials failed"
    if front.candidates:
        members = [r for r in front.candidate_rows if r.on_front]
        interval = f"95 % interval {front.hypervolume_lo:.3f} to {front.hypervolume_hi:.3f}"
        say(
            "front",
            f"{len(members)} of {len(front.candidates)} audited candidates on the front, {failures}; "
            f"hypervolume {front.hypervolume:.3f} ({interval})",
        )
    else:
        say("front", f"no front: no candidate was audited; {failures}")
    for check in result.incomplete:
        say("failed", f"check missing: {check}")
    choice = front.choice
    for line in choice.answer(front.candidate_rows, front.verdicts):
        say("answer", line)
    if choice.recommended is not None:
        command = shlex.join(["raysweep", "export", short_path(result.folder.path), choice.recommended, "OUT_DIR"])
        say("answer", f"export it: {command}")
    say("front", f"report: {short_path(result.folder.report)}")


def _print_profile(folder: RunDir) -> None:
    """Prints the seconds of a run by phase and by check."""
    from raysweep.cli.tables import print_table
    from raysweep.results.profile import check_table, phase_table, read_profile

    profile = read_profile(folder)
    for table in (phase_table(profile), check_table(profile)):
        print_table(table)


def _available_nodes(sweep: Sweep) -> list[Node]:
    """The nodes that the sweep expects, else those of the cluster of RAY_ADDRESS, else this machine as one node."""
    from raysweep.engine.arrival import expected_nodes
    from raysweep.engine.resources import Node

    expected = expected_nodes(sweep)
    if expected:
        return expected
    if os.environ.get("RAY_ADDRESS"):
        from raysweep.engine.cluster import connected

        with connected(sweep) as cluster:
            return cluster.nodes
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Node(float(sweep.resources.cpus or os.cpu_count() or 1), float(gpus))]


def _plan_sweep(sweep: Sweep) -> int:
    """Prints what a sweep would do, from a few timed steps."""
    from raysweep.engine.checks import resolve_sweep
    from raysweep.engine.resources import make_plan
    from raysweep.planning.dry_run import describe
    from raysweep.rundir import RunDir

    task, spaces = resolve_sweep(sweep)
    print_warnings(sweep)
    RunDir.of(sweep).check(sweep, task.digest)
    plan = make_plan(_available_nodes(sweep), sweep)
    for topic, text in describe(sweep, task, spaces, plan):
        click.echo(f"{topic:<9} {text}")
    click.echo("nothing was started")
    return OK


def _plan_preset(sweep: Sweep, about: About) -> int:
    """Prints what a paper's experiment would take on the cluster of cluster.yaml, from its config alone."""
    from raysweep.planning import forecast

    for topic, text in forecast.describe(sweep, about):
        click.echo(f"{topic:<9} {text}")
    print_warnings(sweep)
    click.echo("nothing was started")
    return OK


@click.command()
@click.argument("config", required=False, shell_complete=completion.configs)
@click.argument("overrides", nargs=-1, shell_complete=completion.settings)
@click.option("--json", "as_json", is_flag=True, help="Print the resolved config as JSON.")
@reports_errors
def validate(config: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a config without running it.

    Checks keys and types, names, ranges of search spaces and enqueued points; that methods fit the task, data can be
    read and splits are disjoint; that search and audit differ in seeds and judges; that the models it names (base,
    oracles, external networks) load and fit; that run directory, cache and Ray's temporary folder can be written, and
    the run directory holds no other config; and that everything fits the cluster. Prints the smallest differences that
    the configured sample sizes can detect, and refuses requirements that they cannot decide.
    """
    from raysweep.auditing.power import detectable
    from raysweep.engine.checks import resolve_sweep
    from raysweep.engine.resources import make_plan
    from raysweep.rundir import RunDir
    from raysweep.storage.places import ray_folder
    from raysweep.tasks.records import data_lines

    sweep = load_sweep(config, overrides)
    task, spaces = resolve_sweep(sweep)
    print_warnings(sweep)
    if not os.environ.get("RAY_ADDRESS"):
        ray_folder()
    RunDir.of(sweep).check(sweep, task.digest)
    plan = make_plan(_available_nodes(sweep), sweep)
    differences = detectable(sweep.audit.audit, task)
    if as_json:
        print_json(
            {
                "config": sweep.resolved(),
                "digest": sweep.digest,
                "task": task.digest,
                "data": list(task.accounts),
                "detectable": differences,
            }
        )
        return OK
    click.echo(f"ok: {sweep.name} (config {sweep.digest}, task {task.digest})")
    for space in spaces:
        click.echo(f"  {space.method:<18} searches {', '.join(p.name for p in space.parameters)}")
    for line in data_lines(task):
        click.echo(f"  data               {line}")
    click.echo(f"  cluster            {plan.describe()}")
    click.echo("differences that the audit detects (with 80 % power, by 95 % intervals):")
    for line in differences:
        click.echo(f"  {line}")
    return OK


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@reports_errors
def status(run: str, as_json: bool) -> int:
    """Show how far a run is, and what failed."""
    from raysweep.auditing.log import LOG, read_log
    from raysweep.results.trials import standings_of

    folder = open_run(run)
    manifest, trials = folder.read_manifest(), standings_of(folder)
    data = {
        "run": str(folder.path),
        "state": manifest["state"],
        "trials": dict(Counter(t.state for t in trials)),
        "of": folder.sweep().search.trials,
        "audits": len(read_log(folder.path / LOG)),
        "failures": [{"trial": t.trial, "reason": t.reason} for t in trials if t.state == "FAIL"],
        "incomplete": manifest.get("incomplete", []),
        "reason": manifest.get("reason", ""),
        "exit_code": CODES.get(manifest["state"]),
        "answer": read_front(folder).get("answer", []),
        "report": str(folder.report) if folder.report.is_file() else None,
    }
    if as_json:
        print_json(data)
        return OK
    click.echo(f"{data['run']}: {data['state']}" + (f" ({data['reason']})" if data["reason"] else ""))
    click.echo(f"trials {json.dumps(data['trials'])} of {data['of']}, audits {data['audits']}")
    for failure in data["failures"]:
        click.echo(f"  failed {failure['trial']}: {failure['reason']}")
    for check in data["incomplete"]:
        click.echo(f"  check missing: {check}")
    if data["answer"] and data["state"] not in ("done", "incomplete"):
        click.echo("answer of the previous attempt:")
    for line in data["answer"]:
        click.echo(line)
    if data["report"]:
        click.echo(f"report {data['report']}")
    return OK


@click.command()
@click.argument("runs", nargs=-1, required=True, shell_complete=completion.runs)
@click.option("--compare", is_flag=True, help="Put several runs, or several audit cards, side by side.")
@click.option("--out", type=click.Path(), default="comparison.html", show_default=True, help="Page of a comparison.")
@reports_errors
def report(runs: tuple[str, ...], compare: bool, out: str) -> int:
    """Rebuild a run's report and figures from its tables, or compare runs; needs neither Ray nor a GPU.

    \b
    raysweep report digits-picture
    raysweep report --compare seed-0 seed-1 seed-2      # runs: attainment bands and hypervolumes by method
    raysweep report --compare runs/a-audits/cards/*     # audit cards, a column each
    """
    from raysweep.config.schema import ConfigError
    from raysweep.report.compare import is_card, write
    from raysweep.report.page import build

    if not compare:
        if len(runs) > 1:
            raise ConfigError("one run at a time; use --compare to put several side by side")
        click.echo(str(build(open_run(runs[0]))))
        return OK
    if len(runs) < 2:
        raise ConfigError("--compare: needs at least two runs or cards")
    cards = [is_card(Path(name)) for name in runs]
    if any(cards) and not all(cards):
        raise ConfigError(f"--compare: {runs[cards.index(False)]} is not a card, and {runs[cards.index(True)]} is one")
    if all(cards):
        click.echo(str(write([Path(name) for name in runs], [], Path(out))))
    else:
        click.echo(str(write([], [open_run(name) for name in runs], Path(out))))
    return OK


@click.command()
@click.argument("subjects", nargs=-1, required=True, metavar="RUN TRIAL | CARD...", shell_complete=completion.trials)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@reports_errors
def show(subjects: tuple[str, ...], as_json: bool) -> int:
    """Show a trial (its settings, their sources, all its measurements), or audit cards side by side."""
    from raysweep.config.schema import ConfigError
    from raysweep.models import stored
    from raysweep.registry import suggest
    from raysweep.report.compare import is_card
    from raysweep.results.audited import keys_of, rows_of
    from raysweep.results.trials import trials_of

    if is_card(Path(subjects[0])):
        return _show_cards([Path(name) for name in subjects], as_json)
    if len(subjects) != 2:
        raise ConfigError("show: give a run and one of its trials, or audit cards")
    run, trial = subjects
    folder = open_run(run)
    trials = {t.trial: t for t in trials_of(folder)}
    if trial not in trials:
        raise ConfigError(f"{run}: no trial {trial!r}{suggest(trial, sorted(trials))}")
    rows = rows_of(folder, keys_of(folder, list(trials.values())), [trial])
    standing = read_front(folder).get("standing", {}).get(trial, "not audited")
    is_kept = stored.is_kept(folder.candidates / trial)
    if as_json:
        print_json({"trial": trials[trial].plain(), "standing": standing, "is_kept": is_kept, "rows": rows})
        return OK
    for key, value in trials[trial].plain().items():
        click.echo(f"{key:<16} {value}")
    click.echo(f"{'standing':<16} {standing}")
    if trials[trial].is_complete and not is_kept:
        command = shlex.join(["raysweep", "remake", short_path(folder.path), trial])
        click.echo(f"{'weights':<16} dropped to save disk; make them again: {command}")
    for tier in sorted({r["tier"] for r in rows}, key=lambda t: (t != "probe", t)):
        click.echo(f"{tier}:")
        print_rows([r for r in rows if r["tier"] == tier])
    return OK


def _show_cards(paths: list[Path], as_json: bool) -> int:
    from raysweep.report.compare import cards_table

    table = cards_table(paths)
    if as_json:
        print_json(asdict(table))
        return OK
    for line in table.warnings:
        click.echo(line)
    click.echo("values, with 95 % intervals in brackets:")
    width = max(26, *(len(cell) + 2 for row in table.rows for cell in row.cells))
    click.echo(f"{'':<38}" + "".join(f"{subject:<{width}}" for subject in table.subjects))
    for row in table.rows:
        click.echo(f"{row.name:<38}" + "".join(f"{cell:<{width}}" for cell in row.cells))
    return OK
