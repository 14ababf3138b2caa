"""The command line: verbs only. Heavy imports stand inside the verbs; only this module and `display` print."""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

OK, FAILED, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
STORAGE = Path("runs")


def _errors(function: Callable[..., int | None]) -> Callable[..., None]:
    """Turns the errors that are meant for people into one message and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from raysweep.config.schema import ConfigError
        from raysweep.registry import RegistryError
        from raysweep.search.spaces import SpaceError
        from raysweep.storage.files import StoreError
        from raysweep.storage.places import PlaceError, check_home

        try:
            check_home()
            code = function(*args, **kwargs) or OK
        except (ConfigError, PlaceError, SpaceError, RegistryError) as error:
            click.echo("\n".join(f"error: {line}" for line in str(error).splitlines()), err=True)
            code = BAD_INPUT
        except StoreError as error:
            click.echo(f"error: {error}", err=True)
            code = FAILED
        except KeyboardInterrupt:
            click.echo("interrupted: the state is saved, the same command goes on from here", err=True)
            code = INTERRUPTED
        sys.exit(code)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raysweep")
def main() -> None:
    """Pareto sweeps and audits of unlearning methods for diffusion models, on Ray."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning


_shown: set[str] = set()  # libraries that silence warnings for a while make Python forget which it has shown


def _show_warning(
    message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """What a model's folder was read as is for people; of other warnings Python tells where they come from."""
    plain = category.__name__ == "ReadOtherwise"
    text = f"warning: {message}\n" if plain else warnings.formatwarning(message, category, filename, lineno, line)
    if text not in _shown:
        click.echo(text, err=True, nl=False)
    _shown.add(text)


def _config(path: str | None, overrides: tuple[str, ...], absent: bool = False) -> Any:
    from raysweep.config.reader import load

    if path is not None and "=" in path:
        overrides, path = (path, *overrides), None
    return load(None if path is None else _file(path), overrides, absent)


def _file(path: str) -> Path:
    """A config by its path, or a preset by its name."""
    from raysweep.config import presets

    return presets.path_of(path) if path in presets.names() and not Path(path).exists() else Path(path)


def _run_dir(path: str) -> Any:
    """A run by its directory, or by its name below ./runs."""
    from raysweep.rundir import RunDir

    folder = RunDir(Path(path))
    if not folder.exists() and RunDir(STORAGE / path).exists():
        folder = RunDir(STORAGE / path)
    folder.read_manifest()
    return folder


@main.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Show plan, cost and what is tested; start nothing.")
@_errors
def run(config: str | None, overrides: tuple[str, ...], dry_run: bool) -> int:
    """Run a sweep to its report; without CONFIG, the embedded one. The same command resumes.

    \b
    raysweep run
    raysweep run examples/class.yaml search.trials=14 name=quick

    Exit codes: 0 finished, whether or not a candidate is recommended (front.json says: recommended.trial), 1 failed,
    2 bad input, 3 finished but some checks failed or are missing, 130 interrupted.
    """
    sweep = _config(config, overrides, absent=dry_run)
    if dry_run:
        from raysweep.config import presets

        about = presets.about_of(_file(config), sweep.preset) if config and sweep.scale == "paper" else None
        return _dry_run(sweep) if about is None else _dry_run_of_preset(sweep, about)
    from raysweep.cli.display import Display
    from raysweep.engine.cluster import RunFailed
    from raysweep.engine.run import Interrupted, run_sweep

    with Display() as display:
        try:
            result = run_sweep(sweep, display.say, display.tick)
        except RunFailed as error:
            display.say("failed", str(error))
            return FAILED
        except Interrupted:
            raise KeyboardInterrupt from None
        _say_answer(result, display.say)
    return INCOMPLETE if result.incomplete else OK


def _say_answer(result: Any, say: Callable[[str, str], None]) -> None:
    front = result.front
    failed = sum(t["state"] == "FAIL" for t in result.trials)
    members = [r for r in front.rows if r["kind"] == "candidate" and r["on_front"]]
    failures = f"{failed} of {len(result.trials)} trials failed"
    if front.candidates:
        say("front", f"{len(members)} of {len(front.candidates)} audited candidates on the front, {failures}; hypervolume "
            f"{front.hypervolume:.3f} (95 % interval {front.hypervolume_lo:.3f} to {front.hypervolume_hi:.3f})")  # fmt: skip
    else:
        say("front", f"no front: no candidate was audited; {failures}")
    for missing in result.incomplete:
        say("failed", f"check missing: {missing}")
    choice = front.choice
    for line in choice.answer([r for r in front.rows if r["kind"] == "candidate"], front.verdicts):
        say("answer", line)
    if choice.recommended is not None:
        command = shlex.join(["raysweep", "export", _short(result.folder.path), choice.recommended, "OUT_DIR"])
        say("answer", f"export it: {command}")
    say("front", f"report: {_short(result.folder.report)}")


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _nodes(sweep: Any) -> list[Any]:
    """What the local machine offers, or the cluster of RAY_ADDRESS."""
    from raysweep.engine.resources import Node

    if os.environ.get("RAY_ADDRESS"):
        from raysweep.engine.cluster import connected

        with connected(sweep) as cluster:
            return cluster.nodes
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Node(float(sweep.resources.cpus or os.cpu_count() or 1), float(gpus))]


def _dry_run(sweep: Any) -> int:
    from raysweep.engine.checks import resolve_sweep
    from raysweep.engine.resources import make_plan
    from raysweep.planning.dry_run import describe
    from raysweep.rundir import RunDir

    task, spaces = resolve_sweep(sweep)
    _warn(sweep)
    RunDir.of(sweep).check(sweep, task.digest)
    plan = make_plan(_nodes(sweep), sweep)
    for kind, text in describe(sweep, task, spaces, plan):
        click.echo(f"{kind:<9} {text}")
    click.echo("nothing was started")
    return OK


def _dry_run_of_preset(sweep: Any, about: Any) -> int:
    from raysweep.planning import forecast

    for kind, text in forecast.describe(sweep, about):
        click.echo(f"{kind:<9} {text}")
    _warn(sweep)
    click.echo("nothing was started")
    return OK


def _warn(sweep: Any) -> None:
    for text in sweep.warnings:
        click.echo(f"warning: {text}", err=True)


@main.command()
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the resolved config as JSON.")
@_errors
def validate(config: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check a config without running it.

    Checks keys and types, names, ranges of search spaces and enqueued points, that methods fit the task, that data can
    be read and splits are disjoint, that search and audit differ in seeds and judges, that a base, oracles and outside
    networks that are given load and fit, that the run directory is free for this config and, with the cache and Ray's
    temporary folder, can be written, and that everything fits the cluster; says what differences the configured samples
    can show, and refuses requirements that they cannot decide.
    """
    from raysweep.audit.power import detectable
    from raysweep.engine.checks import resolve_sweep
    from raysweep.engine.resources import make_plan
    from raysweep.rundir import RunDir
    from raysweep.storage.places import ray_folder
    from raysweep.tasks.records import data_lines

    sweep = _config(config, overrides)
    task, spaces = resolve_sweep(sweep)
    _warn(sweep)
    if not os.environ.get("RAY_ADDRESS"):
        ray_folder()
    RunDir.of(sweep).check(sweep, task.digest)
    plan = make_plan(_nodes(sweep), sweep)
    told = detectable(sweep.audit.audit, task)
    if as_json:
        data = {
            "config": sweep.resolved(), "digest": sweep.digest, "task": task.digest, "data": list(task.accounts),
            "detectable": told,
        }  # fmt: skip
        click.echo(json.dumps(data, indent=2))
        return OK
    searched = {s.method: ", ".join(p.name for p in s.parameters) for s in spaces}
    click.echo(f"ok: {sweep.name} (config {sweep.digest}, task {task.digest})")
    for method, parameters in searched.items():
        click.echo(f"  {method:<18} searches {parameters}")
    for line in data_lines(task):
        click.echo(f"  data               {line}")
    click.echo(f"  cluster            {plan.describe()}")
    click.echo("the audit can tell apart (80 % power at 95 %):")
    for line in told:
        click.echo(f"  {line}")
    return OK


@main.command()
@click.argument("model_dir")
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--base", type=click.Path(), help="The model before unlearning; default: the config's.")
@click.option("--oracle", "oracles", type=click.Path(), multiple=True, help="A retrained model; default: trained here.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
@_errors
def audit(
    model_dir: str,
    config: str | None,
    overrides: tuple[str, ...],
    base: str | None,
    oracles: tuple[str, ...],
    as_json: bool,
) -> int:
    """Audit any diffusers folder on the task of a config, next to base and oracles, and write its audit card.

    \b
    raysweep audit runs/digits-picture/candidates/012-rgd
    raysweep audit MODEL --base BASE --oracle RETRAINED-1 --oracle RETRAINED-2 config.yaml name=mine
    """
    from raysweep.cli.display import Display
    from raysweep.engine.audit_model import audit_model
    from raysweep.engine.cluster import RunFailed

    if base is not None:
        overrides = (*overrides, f"task.base={json.dumps(base)}")
    if oracles:
        overrides = (*overrides, f"oracle_models={json.dumps(list(oracles))}")
    with Display("none" if as_json else None) as display:
        try:
            path, card = audit_model(Path(model_dir), _config(config, overrides), display.say, display.tick)
        except RunFailed as error:
            display.say("failed", str(error))
            return FAILED
    if as_json:
        click.echo(json.dumps(card, indent=2))
    else:
        _print_rows([f | {"paired_with": ""} for f in card["findings"]])
        for line in card["answer"]:
            click.echo(line)
        click.echo(f"card {path.parent}")
    return INCOMPLETE if card["incomplete"] else OK


@main.command()
@click.argument("card")
@click.option("--task", type=click.Path(), help="Folder of the task's data, if it is not where the card says.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_errors
def verify(card: str, task: str | None, as_json: bool) -> int:
    """Check an audit card: its hashes, and every number recomputed from the scores per sample.

    Ends with 1 if anything differs, and with 3 if something could not be checked because it is not here.
    """
    from raysweep.audit.card import verify as check

    findings = check(Path(card), None if task is None else Path(task))
    if as_json:
        click.echo(json.dumps([vars(f) for f in findings], indent=2))
    else:
        for f in findings:
            click.echo(f"{ {True: 'ok', False: 'DIFFERS', None: 'unknown'}[f.holds]:<8} {f.what:<32} {f.detail}")
    if any(f.holds is False for f in findings):
        return FAILED
    return INCOMPLETE if any(f.holds is None for f in findings) else OK


@main.command()
@click.argument("run")
@click.argument("trial")
@click.option("--models", default=16, show_default=True, help="Shadows: pairs of an unlearned and a retrained model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_errors
def shadows(run: str, trial: str, models: int, as_json: bool) -> int:
    """Attack a trial's method with shadow models (U-LiRA): can unlearned models be told from retrained ones?

    Trains a base, its unlearned version and a retrained model per shadow, on small models only: it costs as much as that
    many sweeps' preparation. What was trained is found again.
    """
    from raysweep.cli.display import Display
    from raysweep.engine.cluster import RunFailed
    from raysweep.engine.shadows import run_shadows

    with Display("none" if as_json else None) as display:
        try:
            path, content = run_shadows(_run_dir(run), trial, models, display.say)
        except RunFailed as error:
            display.say("failed", str(error))
            return FAILED
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return OK
    found = content["summary"]
    for name, text in (("accuracy", "accuracy over images"), ("auc_over_models", "AUC over models")):
        click.echo(f"{text:<24} {found[name]['value']:.3f} ({found[name]['lo']:.3f} to {found[name]['hi']:.3f})")
    told = found["candidate"]
    click.echo(
        f"{trial}: {told['images_told']} of {found['images']} forgotten images look unlearned rather than never seen"
    )
    click.echo(f"written {path}")
    return OK


def _print_rows(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        name = f"{r['check']}.{r['metric']}" + (f" - {r['paired_with']}" if r["paired_with"] else "")
        if r["status"] != "ok":
            click.echo(f"  {name:<34} {r['status']}: {r['reason']}")
            continue
        interval = "" if r["lo"] is None else f"[{r['lo']:.3g}, {r['hi']:.3g}] {r['interval']}"
        click.echo(f"  {name:<34} {r['value']:>9.4g}  n={r['n']:<5} {interval}")


@main.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_errors
def status(run: str, as_json: bool) -> int:
    """Show how far a run is, and what failed."""
    from raysweep.audit.manager import LOG, read_log
    from raysweep.results.front import trial_table

    folder = _run_dir(run)
    manifest, sweep = folder.read_manifest(), folder.sweep()
    trials = trial_table(folder, folder.run_id)
    counts: dict[str, int] = {}
    for t in trials:
        counts[t["state"]] = counts.get(t["state"], 0) + 1
    failures = [{"trial": t["trial"], "reason": t["reason"]} for t in trials if t["state"] == "FAIL"]
    data = {
        "run": str(folder.path), "state": manifest["state"], "trials": counts, "of": sweep.search.trials,
        "audits": len(read_log(folder.path / LOG)), "failures": failures,
        "incomplete": manifest.get("incomplete", []), "reason": manifest.get("reason", ""),
        "exit_code": {"done": OK, "incomplete": INCOMPLETE, "failed": FAILED, "interrupted": INTERRUPTED}.get(manifest["state"]),
        "answer": _front_of(folder).get("answer", []),
        "report": str(folder.report) if folder.report.is_file() else None,
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return OK
    click.echo(f"{data['run']}: {data['state']}" + (f" ({data['reason']})" if data["reason"] else ""))
    click.echo(f"trials {json.dumps(counts)} of {data['of']}, audits {data['audits']}")
    for f in failures:
        click.echo(f"  failed {f['trial']}: {f['reason']}")
    for missing in data["incomplete"]:
        click.echo(f"  check missing: {missing}")
    if data["answer"] and data["state"] not in ("done", "incomplete"):
        click.echo("answer of the attempt before:")
    for line in data["answer"]:
        click.echo(line)
    if data["report"]:
        click.echo(f"report {data['report']}")
    return OK


def _front_of(folder: Any) -> dict[str, Any]:
    """What front.json of a run says; empty if it has none."""
    return json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--compare", is_flag=True, help="Put several runs, or several audit cards, side by side.")
@click.option("--out", type=click.Path(), default="comparison.html", show_default=True, help="Page of a comparison.")
@_errors
def report(runs: tuple[str, ...], compare: bool, out: str) -> int:
    """Rebuild a run's report and figures from its tables, or compare; needs neither Ray nor a GPU.

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
        click.echo(str(build(_run_dir(runs[0]))))
        return OK
    if len(runs) < 2:
        raise ConfigError("--compare: needs at least two runs or cards")
    cards = [is_card(Path(r)) for r in runs]
    if any(cards) and not all(cards):
        raise ConfigError(f"--compare: {runs[cards.index(False)]} is not a card, and {runs[cards.index(True)]} is one")
    paths = [Path(r) for r in runs] if all(cards) else []
    click.echo(str(write(paths, [] if paths else [_run_dir(r) for r in runs], Path(out))))
    return OK


@main.command()
@click.argument("what", nargs=-1, required=True, metavar="RUN TRIAL | CARD...")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_errors
def show(what: tuple[str, ...], as_json: bool) -> int:
    """Show a trial (its settings, where they come from, every measurement of it), or audit cards side by side."""
    from raysweep.config.schema import ConfigError
    from raysweep.registry import suggest
    from raysweep.report.compare import is_card
    from raysweep.results.audited import keys_of, rows_of
    from raysweep.results.front import trial_table

    if is_card(Path(what[0])):
        return _show_cards([Path(w) for w in what], as_json)
    if len(what) != 2:
        raise ConfigError("show: give a run and a trial of it, or audit cards")
    run, trial = what
    folder = _run_dir(run)
    trials = {t["trial"]: t for t in trial_table(folder, folder.run_id)}
    if trial not in trials:
        raise ConfigError(f"{run}: no trial {trial!r}{suggest(trial, sorted(trials))}")
    rows = rows_of(folder, keys_of(folder, list(trials.values())), [trial])
    standing = _front_of(folder).get("standing", {}).get(trial, "not audited")
    if as_json:
        click.echo(json.dumps({"trial": trials[trial], "standing": standing, "rows": rows}, indent=2))
        return OK
    for key, value in trials[trial].items():
        click.echo(f"{key:<16} {value}")
    click.echo(f"{'standing':<16} {standing}")
    for tier in sorted({r["tier"] for r in rows}, key=lambda t: (t != "probe", t)):
        click.echo(f"{tier}:")
        _print_rows([r for r in rows if r["tier"] == tier])
    return OK


def _show_cards(paths: list[Path], as_json: bool) -> int:
    from raysweep.report.compare import cards_table

    table = cards_table(paths)
    if as_json:
        click.echo(json.dumps(table, indent=2))
        return OK
    for line in table["warnings"]:
        click.echo(line)
    width = max(26, *(len(cell) + 2 for row in table["rows"] for cell in row["cells"]))
    click.echo(f"{'':<38}" + "".join(f"{s:<{width}}" for s in table["subjects"]))
    for row in table["rows"]:
        click.echo(f"{row['name']:<38}" + "".join(f"{cell:<{width}}" for cell in row["cells"]))
    return OK


@main.command()
@click.argument("run")
@click.argument("trial")
@click.argument("out")
@click.option("--delta", "as_delta", is_flag=True, help="Write only the tensors that changed, as one file OUT.")
@_errors
def export(run: str, trial: str, out: str, as_delta: bool) -> int:
    """Copy a candidate as a folder of its own library with a model card, its weights checked against their hash.

    Warns if the run does not recommend the candidate, or only with reservations; the model card says so, too.
    """
    from raysweep.config.schema import ConfigError
    from raysweep.context import Context
    from raysweep.export import delta, modelcard
    from raysweep.models.families import load
    from raysweep.registry import suggest
    from raysweep.storage.files import StoreError, write_folder
    from raysweep.train.jobs import CARD

    source, target = _run_dir(run).candidates / trial, Path(out)
    if not (source / CARD).is_file():
        there = sorted(p.name for p in source.parent.glob("*") if (p / CARD).is_file())
        raise ConfigError(f"{run}: no candidate {trial!r}{suggest(trial, there)}")
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another place")
    card = json.loads((source / CARD).read_text())
    expected = card["outcome"]["digest"]
    found = load(source).digest
    if found != expected:
        raise StoreError(f"{source}: the weights hash to {found}, but the card says {expected}; not exported")
    _warn_of(_run_dir(run), trial)
    if as_delta:
        header = delta.write(target, Path(Context.load(str(_run_dir(run).path)).base), source)
        click.echo(f"{target}  {header['tensors']} tensors, {header['bytes'] / 1e6:.2f} MB")
        return OK

    def fill(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        modelcard.write(_run_dir(run), card, folder)

    write_folder(target, fill)
    click.echo(str(target))
    return OK


def _warn_of(folder: Any, trial: str) -> None:
    """Says before an export what the run's answer holds against a candidate."""
    standing = _front_of(folder).get("standing", {}).get(trial, "not audited: only the search has seen it")
    if standing != "recommended":
        click.echo(f"warning: {trial} is {standing}", err=True)


@main.command()
@click.argument("delta_file")
@click.argument("model_dir")
@click.argument("out_dir")
@click.option("--revert", is_flag=True, help="Take the delta back: from the candidate to the base.")
@_errors
def patch(delta_file: str, model_dir: str, out_dir: str, revert: bool) -> int:
    """Apply a delta that `export --delta` wrote to the model it was made from; hashes are checked before and after."""
    from raysweep.config.schema import ConfigError
    from raysweep.export import delta

    if Path(out_dir).exists():
        raise ConfigError(f"{out_dir}: exists already; choose another folder")
    digest = delta.apply(Path(delta_file), Path(model_dir), Path(out_dir), revert)
    click.echo(f"{out_dir}  {digest}")
    return OK


@main.command()
@click.argument("snapshot")
@click.argument("out_dir")
@_errors
def convert(snapshot: str, out_dir: str) -> int:
    """Make a model folder of a published EDM snapshot (.pkl): its tensors alone are read, its code never.

    \b
    raysweep convert edm-cifar10-32x32-cond-vp.pkl models/edm-cifar10-32x32-cond
    """
    from raysweep.config.schema import ConfigError
    from raysweep.models.snapshot import read
    from raysweep.storage.files import write_folder

    target = Path(out_dir)
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another place")
    try:
        model = read(Path(snapshot))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write_folder(target, model.save)
    config, count = model.net.config, sum(p.numel() for p in model.net.parameters())
    classes = f"{config.num_class_embeds} classes" if config.num_class_embeds else "no classes"
    click.echo(f"{target}  {config.sample_size} pixels, {classes}, {count / 1e6:.1f} M weights, hash {model.digest}")
    return OK


@main.command(name="draw")
@click.argument("model_dir")
@click.argument("out_dir")
@click.option(
    "--prompt", "prompts", multiple=True, help="What to draw, in a folder of its own; may be given several times."
)
@click.option(
    "--for", "config", help="Draw the search prompts of this config or preset instead, in a folder per label."
)
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Images per folder.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another one draws other images.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Steps of the sampler.")
@click.option("--guidance", type=click.FloatRange(0), default=7.5, show_default=True, help="Classifier-free guidance.")
@click.option(
    "--sort", is_flag=True, help="Sort one prompt's images into `memorised` and `other` by k-means on pixels."
)
@_errors
def draw_(
    model_dir: str,
    out_dir: str,
    prompts: tuple[str, ...],
    config: str | None,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    sort: bool,
) -> int:
    """Draw images with a text-to-image model, each with its prompt beside it: data for a task.

    \b
    raysweep draw models/sd21 data/characters --prompt "Mickey Mouse" --prompt "a dog" --count 500
    raysweep draw models/sd14 data/artists --for rgd-sd-artist
    raysweep draw models/sd14 data/memorised --prompt "CAPTION" --count 128 --sort
    """
    from raysweep.cli.display import Display
    from raysweep.config.schema import ConfigError
    from raysweep.models.families import load
    from raysweep.models.folders import located
    from raysweep.storage.files import write_folder
    from raysweep.tasks import drawing as draw

    target, how = Path(out_dir), draw.Drawing(count, seed, steps, guidance)
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another place")
    if sort and len(prompts) > 1:
        raise ConfigError("--sort: takes the images of one --prompt")
    if bool(prompts) == bool(config):
        raise ConfigError("say what to draw: --prompt or --for")
    kinds: list[draw.Cluster] = []
    try:
        wanted = draw.by_prompt(prompts)
        if config:
            asked = getattr(_config(config, (), absent=True).task, "search_prompts", None)
            if asked is None:
                raise ConfigError(f"{config}: has no task.search_prompts")
            wanted = draw.by_label(asked.rows())
        model = load(located(model_dir))
        if model.family != "text-ddpm":
            raise ConfigError(f"{model_dir}: is a {model.family} model; prompts are for text-to-image models")
        model.to(draw.device())
        with Display() as display:

            def fill(folder: Path) -> None:
                draw.draw(model, wanted, how, folder, lambda done, all_: display.tick("images", done, all_))
                if sort:
                    kinds.extend(draw.sort_in_two(folder / next(iter(wanted))))

            write_folder(target, fill)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for kind in kinds:
        click.echo(f"{target / kind.name}  {kind.images} images, {kind.spread:.1f} of 255 from their mean")
    if kinds:
        click.echo("k-means always finds two kinds: look whether the first is one picture again and again")
    else:
        click.echo(f"{target}  {count} images in each of {len(wanted)} folders")
    return OK


@main.command(name="ls")
@click.argument("what", type=click.Choice(["methods", "evaluators", "spaces", "tasks", "presets", "runs"]))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_errors
def list_(what: str, name: str | None, as_json: bool) -> int:
    """List what there is: methods, evaluators, spaces, tasks, presets, runs.

    `raysweep ls spaces NAME`, of a preset, a config or a method: every point that is tried first, with the value of each
    hyperparameter and its source.
    """
    from raysweep.cli.listing import listing, points_of
    from raysweep.config.schema import ConfigError
    from raysweep.search.released import shown

    if name is not None and what != "spaces":
        raise ConfigError(f"ls {what}: takes no name; `raysweep ls spaces NAME` does")
    rows = listing(what, STORAGE) if name is None else points_of(name)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return OK
    for row in rows:
        first, *rest = (v for k, v in row.items() if k != "values")
        click.echo(f"{first:<18} " + "  ".join(str(v) for v in rest))
        for key, told in row.get("values", {}).items():
            value = "-" if told["searched"] else shown(told["value"])
            click.echo(f"    {key:<20} {value:<14} {told['from']}")
    return OK


@main.command()
@click.argument("name")
@click.option(
    "--task", type=click.Choice(["digits-picture", "digits-class"]), default="digits-picture", show_default=True
)
@_errors
def init(name: str, task: str) -> int:
    """Write NAME.yaml, a commented config with every setting at its default."""
    from raysweep.cli.listing import commented_config
    from raysweep.config.schema import NAME, ConfigError
    from raysweep.storage.files import write_bytes

    path = Path(f"{name}.yaml")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: a name has 1 to 64 letters, digits, '.', '_' or '-'")
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name")
    write_bytes(path, commented_config(name, task).encode())
    click.echo(f"{path}: check it with `raysweep validate {path}`, run it with `raysweep run {path}`")
    return OK


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_errors
def doctor(as_json: bool) -> int:
    """Check this machine: Python, packages, torch, memory, disk, /dev/shm, temporary files, ports, installs, Ray's token."""
    from raysweep.cli.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([vars(f) for f in findings], indent=2))
    else:
        for f in findings:
            click.echo(f"{f.level:<5} {f.name:<12} {f.text}")
    return FAILED if any(f.level == "fail" for f in findings) else OK
