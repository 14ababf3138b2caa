"""Time, memory and size of a run's report, and time of `raysweep status`, for sweeps of up to 10,000 trials.

    python benchmarks/report.py [TRIALS ...] [--audited N]

Writes run directories with the project's own writers: drawn settings, an audit of every audited candidate with as many metrics,
replicates, scores and pictures as one of the digits has, and the front that follows from these. A candidate's residue and damage
are drawn; nothing is trained. Each measurement is a process of its own, whose imports are timed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.metrics import Metric
from evaluators.statistics import LEVEL
from raysweep.auditing.anchors import Anchors, assess_views
from raysweep.auditing.log import LOG
from raysweep.auditing.request import AuditRequest
from raysweep.auditing.terms import columns_of
from raysweep.config.reader import load
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.results.front import audited_front, write_front
from raysweep.results.paired import write_paired
from raysweep.results.trials import Trial, pick_for_audit, save_trials, study_size
from raysweep.rundir import RunDir, versions
from raysweep.search.spaces import Space
from raysweep.search.spaces import load as load_space
from raysweep.storage.files import write_file
from raysweep.storage.schemas import ROWS, SCORES, write_table
from raysweep.tasks.task import Task

METHODS = ("siss", "rgd", "graddiff", "erasediff", "salun")
FILLERS = 60  # further metrics of an audit, besides those of the objectives
GROUPS = 20  # of units that the jackknife leaves out
FEATURES = (800, 48)  # the largest score of an audit: samples, features
STRIP = 8  # pictures of each kind
ORACLES = 3
FAILED = 0.05  # share of trials that failed
PROBE_ERROR = 0.03  # standard deviation of the probe's estimates
MEASURE = """
import json, re, sys, time
from pathlib import Path
def clocks(): return time.perf_counter(), time.process_time()
started = clocks()
import {imports}
from raysweep.cli import main
imported = clocks()
from click.testing import CliRunner
result = CliRunner().invoke(main, sys.argv[1:], catch_exceptions=False)
assert result.exit_code == 0, result.output
ended = clocks()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
seconds = [[after - before for before, after in zip(*times)] for times in ((started, imported), (imported, ended))]
print(json.dumps({{"imports": seconds[0], "work": seconds[1], "peak_mb": peak}}))
"""
IMPORTS = {
    "report": "raysweep.report.page",
    "status": "raysweep.results.trials, raysweep.auditing.log",
}


class Draws:
    """Draws hyperparameters as an Optuna trial does."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return choices[self.rng.integers(len(choices))]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        return round(self.suggest_float(name, low, high, log=log))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return float(np.exp(self.rng.uniform(*np.log([low, high]))) if log else self.rng.uniform(low, high))


def make_run(
    folder: Path, trials: int, audited: int, methods: Sequence[str] = METHODS, task: Task | None = None
) -> RunDir:
    """A finished run directory of synthetic trials, of which `audited` were audited. task: None for that of the default sweep."""
    settings = (f"name={folder.name}", f"storage={folder.parent}", f"cache={folder.parent / 'cache'}")
    sizes = (f"search.trials={trials}", f"audit.top={audited}", "audit.audit.seed=2", "audit.durability.seed=3")
    sweep = load(None, (*settings, *sizes, f"methods=[{', '.join(methods)}]"))
    task, run = task or sweep.task.build(), RunDir.of(sweep)
    with run.claim(sweep, {"config": sweep.digest, "task": task.digest}, sweep.audit.checks_for(task), task.family):
        run.task.mkdir(parents=True)
        task.save(run.task)
        context = _context(run, task)
        context.save()
        rng = np.random.default_rng(0)
        table = list(_trials(trials, [load_space(name, {}) for name in methods], rng, context, sweep))
        save_trials(run, table, study_size(run))
        write_log(run, table)
        _write_front(run, sweep, task, context, table, rng)
        run.update(state="done")
    return run


def _context(run: RunDir, task: Task) -> Context:
    model = (str(run.path / "model"), "0" * 16)
    return Context(
        run=str(run.path),
        run_id=run.run_id,
        task_digest=task.digest,
        quality=task.quality,
        validity=task.validity,
        base=model[0],
        base_digest=model[1],
        oracles={f"oracle-{k}": model for k in range(ORACLES)},
        judges={"probe": model, "audit": model},
        prepared={},
        cache=str(run.path / "cache"),
        views=task.views,
    )


def _trials(
    count: int, spaces: Sequence[Space], rng: np.random.Generator, context: Context, sweep: Sweep
) -> Iterator[Trial]:
    """Trials whose residue and damage trade off, differently for each method; some failed."""
    for place in range(count):
        space = spaces[place % len(spaces)]
        name, failed = f"{place:03d}-{space.method}", rng.random() < FAILED
        strength, excess = rng.random(), rng.exponential(0.25) + 0.02 * (place % len(spaces))
        probe = context.request("probe", sweep.audit.probe, name, space.method, None, f"{place:016x}")
        yield Trial(
            trial=name,
            number=place,
            method=space.method,
            source="",
            state="FAIL" if failed else "COMPLETE",
            hyperparameters=space.ask(Draws(rng), {}),
            seed=int(rng.integers(2**31)),
            residue=None if failed else float((1 - strength) ** 2 + excess),
            damage=None if failed else float(strength**2 + excess),
            residue_se=None if failed else PROBE_ERROR,
            damage_se=None if failed else PROBE_ERROR,
            train_s=float(rng.gamma(4, 5)),
            audit_s=None if failed else 2.0,
            digest="" if failed else f"{place:016x}",
            probe="" if failed else probe.key,
            reason=f"the loss is not finite after {rng.integers(8)} steps" if failed else "",
        )


def write_log(run: RunDir, trials: Sequence[Trial]) -> None:
    """Writes the log of the trials' probes, as the audit manager does."""
    ends = {"status": "ok", "reason": "", "seconds": 2.0, "images": 60, "failed": []}
    lines = [json.dumps({"key": t.probe} | ends) for t in trials if t.is_complete]
    write_file(run.path / LOG, lambda file: file.write("\n".join(lines).encode()))


def _write_front(
    run: RunDir, sweep: Sweep, task: Task, context: Context, trials: Sequence[Trial], rng: np.random.Generator
) -> None:
    """Writes the audits of anchors and picked candidates, then what the final audit writes: front and paired differences."""
    tier = sweep.audit.audit
    anchors = context.anchor_requests("audit", tier)
    places = {"base": (1.0, 0.0), "destroyed": (0.5, 1.0)}
    for name, request in anchors.items():
        write_audit(request, task, *places.get(name, (0.0, 0.0)), rng)
    measured = {name: load_measured(run.path, request.key) for name, request in anchors.items()}
    oracles = tuple(m for name, m in measured.items() if name.startswith("oracle"))
    views = assess_views(Anchors(measured["base"], oracles, measured["destroyed"]), task.views)
    context.save_anchors("audit", {name: request.key for name, request in anchors.items()}, views)
    picked = pick_for_audit(trials, sweep.audit.top)
    rest = [t for t in trials if t.is_complete and t not in picked]
    keys = {}
    for t in (picked + rest)[: sweep.audit.top]:
        request = context.request("audit", tier, t.trial, t.method, None, t.digest)
        residue, damage = np.maximum(0.0, t.point + PROBE_ERROR * rng.normal(size=2))
        write_audit(request, task, residue, damage, rng)
        keys[t.trial] = request.key
    front = audited_front(run, context, task, [keys], trials)
    front.audits = {"audit": keys | {name: request.key for name, request in anchors.items()}}
    write_front(run, front, sweep)
    write_paired(run, context, front.audits["audit"], {t.trial: t.method for t in trials})


def write_audit(request: AuditRequest, task: Task, residue: float, damage: float, rng: np.random.Generator) -> None:
    """Writes the rows and scores of one audit of a model at this place on the scales, with noise."""
    values = dict.fromkeys(task.views, 0.1 + 0.8 * residue)
    values |= {task.quality: 4.0 * float(np.exp(3 * damage)), task.validity: 0.95 - 0.4 * min(1.0, damage)}
    values |= {f"{('loss', 'fidelity', 'per_class')[k % 3]}.metric_{k}": 0.5 for k in range(FILLERS)}
    write_table(request.rows_path, list(_rows(request, values, rng)), ROWS)
    shapes = {"fidelity.features": FEATURES, "loss.forget": (10, 5), "loss.forget_holdout": (100, 5)}
    shapes |= {"loss.retain": (100, 5), "loss.holdout": (100, 5)}
    shapes |= {
        f"strip.{kind}": (STRIP, task.splits["forget"].x[0].numel()) for kind in ("noised", "rebuilt", "samples")
    }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays["loss.calibration"] = np.array([[2.0, -1.0]])
    common = {"subject": request.subject, "tier": request.tier_name}
    rows = [
        common | {"score": name, "unit": k, "values": unit.tolist(), "shape": list(unit.shape)}
        for name, array in arrays.items()
        for k, unit in enumerate(array)
    ]
    write_table(request.scores_path, rows, SCORES)


def _rows(request: AuditRequest, values: Mapping[str, float], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for name, value in values.items():
        error = 0.01 * abs(value)
        value += error * rng.normal()
        replicates = value + error / np.sqrt(GROUPS) * rng.normal(size=GROUPS)
        check, metric = name.split(".", 1)
        row = asdict(Metric.jackknife(metric, value, 200, replicates, over="groups of samples"))
        del row["comparison"], row["name"]
        yield (
            row
            | columns_of(None)
            | {
                "subject": request.subject,
                "method": request.method,
                "subject_digest": request.digest,
                "tier": request.tier_name,
                "check": check,
                "metric": metric,
                "paired_with": "",
                "level": LEVEL,
                "replicates": replicates.tolist(),
                "seed": request.tier.seed,
                "judge_digest": request.judge_digest,
                "task_digest": request.task_digest,
                "tier_digest": request.tier.digest,
            }
        )


def measured(verb: str, run: RunDir) -> dict[str, Any]:
    """(wall, CPU) seconds of the imports and of the work of a verb on a run, in a process of its own, and its peak memory."""
    script = MEASURE.format(imports=IMPORTS[verb])
    process = subprocess.run([sys.executable, "-c", script, verb, str(run.path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Makes and measures each run, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--audited", type=int, default=100, help="largest number of audited candidates")
    parser.add_argument("--keep", type=Path, help="folder in which the runs are kept")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {', '.join(f'{k} {v}' for k, v in versions().items() if k in ('python', 'pyarrow'))}")
    print(
        "| trials | audited | verb | seconds (of CPU) | imports (of CPU) | peak MB | page MB |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.trials:
            folder = (arguments.keep or Path(temporary)) / f"trials-{count}"
            run = RunDir(folder) if folder.exists() else make_run(folder, count, min(arguments.audited, count))
            audited = len(json.loads(run.front_json.read_text())["candidates"])
            for verb in IMPORTS:
                result = measured(verb, run)
                times = [f"{wall:.1f} ({cpu:.1f})" for wall, cpu in (result["work"], result["imports"])]
                page = f"{run.report.stat().st_size / 1e6:.1f}" if verb == "report" else "-"
                print(
                    f"| {count} | {audited} | {verb} | {times[0]} | {times[1]} | {result['peak_mb']:.0f} | {page} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
