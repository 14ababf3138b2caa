"""Composes a sweep: task, workers, auditors, search, audit, results, report."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import tune
from ray.util.metrics import Gauge

from raysweep.audit.objectives import Unmeasured
from raysweep.audit.power import requirements
from raysweep.config.schema import ConfigError, Sweep
from raysweep.context import Context
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.cluster import Pool, RunFailed, connected, has_trial_slots, own_handlers, pool
from raysweep.engine.prepare import (
    Say,
    Tick,
    gather,
    measure_anchors,
    open_choices,
    prepare,
    prepare_methods,
    save_task,
)
from raysweep.engine.resources import TRIAL_SLOT, Plan, make_plan
from raysweep.engine.trial import make_executor, trial
from raysweep.results.front import (
    Front,
    audited_front,
    judged_by_attacks,
    write_front,
)
from raysweep.results.paired import write_paired
from raysweep.results.trials import Trial, pick_for_audit, trial_table, write_trials
from raysweep.rundir import RunDir, git_commit
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Space
from raysweep.storage.files import checkpoint_path
from raysweep.tasks.records import data_lines
from raysweep.tasks.task import Task


class Interrupted(RuntimeError):
    """The sweep was asked to stop; its state is on disk and the same command goes on."""


@dataclass
class Result:
    """How a run ended. incomplete: checks that failed on anchors or in the final audit, and audits that give no place."""

    folder: RunDir
    front: Front | None
    trials: list[Trial]
    incomplete: list[str]


def run_sweep(sweep: Sweep, say: Say, tick: Tick) -> Result:
    """Runs a sweep to its report, or resumes it.

    Raises:
        ConfigError: the config, the run directory or the cluster does not allow it.
        RunFailed: nothing came out of it.
        Interrupted: SIGINT or SIGTERM ended it; the same call resumes.
    """
    task, spaces = resolve_sweep(sweep)
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {"config": sweep.digest, "task": task.digest}, sweep.audit.checks_for(task)):
        run_id = folder.run_id
        before = trial_table(folder, run_id)
        ended = sum(t.has_ended for t in before)
        say("run", f"{folder.path}" + (f"  (resuming: {ended} of {sweep.search.trials} trials done)" if before else ""))
        for text in sweep.warnings:
            say("warning", text)
        for line in data_lines(task):
            say("data", line)
        commits, commit = folder.commits, git_commit()
        folder.update(data=list(task.accounts), commits=commits if commits[-1] == commit else [*commits, commit])
        save_task(folder, task)
        folder.update(reason="", incomplete=[])  # of an attempt before
        try:
            result = _with_ray(sweep, task, spaces, folder, run_id, say, tick)
        except (Interrupted, KeyboardInterrupt):
            folder.update(state="interrupted")
            raise
        except (RunFailed, Unmeasured) as error:
            _failed(folder, run_id, str(error), say)
            raise RunFailed(str(error)) from error
        except ConfigError as error:
            _failed(folder, run_id, str(error), say)
            raise
        except Exception as error:
            _failed(folder, run_id, f"{type(error).__name__}: {error}", say)
            raise
        folder.update(state="incomplete" if result.incomplete else "done", incomplete=result.incomplete)
    return result


def _failed(folder: RunDir, run_id: str, reason: str, say: Say) -> None:
    """Records why a run failed, and writes a report of what there is: what it came to must not be lost with it."""
    from raysweep.report.page import build

    folder.update(state="failed", reason=reason)
    try:
        write_trials(folder, run_id)
        say("report", f"of what there is: {build(folder)}")
    except Exception as error:  # the run's own failure is what the caller must hear of
        say("warning", f"no report could be written: {type(error).__name__}: {error}")


def _with_ray(
    sweep: Sweep, task: Task, spaces: list[Space], folder: RunDir, run_id: str, say: Say, tick: Tick
) -> Result:
    with connected(sweep) as cluster:
        plan = make_plan(cluster.nodes, sweep, has_trial_slots())
        say("plan", plan.describe())
        for line in urls(folder, cluster.dashboard):
            say("url", line)
        with pool(folder.path, run_id, sweep, plan) as actors:
            executor = make_executor(str(folder.path), run_id, sweep, plan)
            context = prepare(sweep, task, folder, run_id, executor, actors, say, tick)
            # before the search: on a base that has not learned what it must forget, all that follows would be for nothing
            incomplete = measure_anchors(task, context, actors, "audit", sweep.audit.audit, say)
            incomplete += measure_anchors(task, context, actors, "probe", sweep.audit.probe, say)
            prepare_methods(sweep, spaces, context, executor, actors, say)
            stale = probed_otherwise(trial_table(folder, run_id), context, sweep)
            if stale:
                say("warning", stale)
            spaces = [open_choices(space, context) for space in spaces]
            search(sweep, spaces, folder, run_id, plan, say, tick, actors)
            trials = write_trials(folder, run_id)
            return _conclude(sweep, task, folder, context, actors, trials, incomplete, say, tick)


def probed_otherwise(trials: list[Trial], context: Context, sweep: Sweep) -> str:
    """Says how many of the trials that are done were probed by other code, models or judges than those to come; "" for none."""
    done = [t for t in trials if t.is_complete]
    other = [t.trial for t in done if t.probe != context.request(
        "probe", sweep.audit.probe, t.trial, t.method, None, t.digest).key]  # fmt: skip
    if not other:
        return ""
    return (
        f"{len(other)} of {len(done)} trials were probed before the checks' code, the anchors or the judges changed, so the "
        "search compares what was measured in two ways; candidates that are audited are all measured anew. For a search of one "
        f"kind run under another name, for example name={sweep.name}-2"
    )


def search(
    sweep: Sweep,
    spaces: list[Space],
    folder: RunDir,
    run_id: str,
    plan: Plan,
    say: Say,
    tick: Tick,
    actors: Pool | None = None,
) -> None:
    """Runs the trials that are left through Ray Tune.

    At most a trial per slot and one per auditor is in flight: audits that fall behind hold back new trials.
    """
    searcher = ParetoSearch(
        folder.journal, run_id, spaces, sweep.search.trials, sweep.search.batch, sweep.search.seed, sweep.search.sampler,
        sweep.limits,
    )  # fmt: skip
    again = searcher.retry()
    if again:
        say("search", f"tried again, since the limit that ended them is wider by now: {', '.join(again)}")
    left = searcher.left()
    if left == 0:
        return
    if actors is not None:
        ray.get(actors.broker.watch.remote())
    resources = {TRIAL_SLOT: 1} if plan.trial_slots else {"cpu": plan.driver_cpus}
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0} | resources),
        param_space={"run": str(folder.path), "plan": asdict(plan)},
        tune_config=tune.TuneConfig(
            search_alg=searcher, num_samples=left, max_concurrent_trials=plan.concurrent_trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="search", storage_path=str(folder.path / "tune"), verbose=0,
            callbacks=[_Events(folder, run_id, sweep, say, tick)],
            failure_config=tune.FailureConfig(max_failures=2),
        ),
    )  # fmt: skip
    with own_handlers():
        tuner.fit()
    waited = None if actors is None else ray.get(actors.broker.waited.remote(plan.slots))
    if waited is not None:
        folder.update(train_workers_idle=waited)
        say("search", f"train workers had no job in {waited:.0%} of their time")
    if ParetoSearch(folder.journal, run_id, spaces, sweep.search.trials, sweep.search.batch, sweep.search.seed).left():
        raise Interrupted("stopped before all trials had ended")


class _Events(tune.Callback):
    """Tells of every trial's end, here and to Ray's metrics."""

    def __init__(self, folder: RunDir, run_id: str, sweep: Sweep, say: Say, tick: Tick):
        self.folder, self.run_id, self.sweep, self.say, self.tick = folder, run_id, sweep, say, tick
        states = [t.state for t in trial_table(folder, run_id)]  # of a run that goes on
        self.done, self.failed = sum(s != "RUNNING" for s in states), states.count("FAIL")
        self.gauges = {
            "trials": Gauge("raysweep_trials", "ended trials", ("run", "state")),
            "residue": Gauge("raysweep_residue", "residue of the last candidate", ("run", "method")),
            "damage": Gauge("raysweep_damage", "damage of the last candidate", ("run", "method")),
        }
        self.count()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a display does not pickle and is of no use elsewhere."""
        return {k: v for k, v in self.__dict__.items() if k not in ("say", "tick", "gauges")}

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended(trial.config, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended(trial.config, {"reason": "the trial's process died"})

    def ended(self, config: dict[str, Any], result: dict[str, Any]) -> None:
        self.done += 1
        if not result.get("limit"):  # under a wider one it would go on from there
            checkpoint_path(self.folder.candidates / config["trial"]).unlink(missing_ok=True)
        settings = " ".join(f"{k}={_short(v)}" for k, v in config["hyperparameters"].items())
        total = self.sweep.search.trials
        if result.get("reason"):
            self.failed += 1
            self.say("failed", f"{config['trial']}  {settings}  {result['reason']}")
        else:
            place = f"residue {result['residue']:.2f}  damage {result['damage']:.2f}"
            cost = f"{result['train_s']:.1f} s + {result['audit_s']:.1f} s"
            self.say("trial", f"{config['trial']:<16} {place}  {cost}  {settings}  {self.done}/{total}")
            for name in ("residue", "damage"):
                self.gauges[name].set(result[name], {"run": self.run_id, "method": config["method"]})
        self.count()
        self.tick("trials", self.done, total)

    def count(self) -> None:
        """Brings the counts of trials to Ray's metrics."""
        self.gauges["trials"].set(self.failed, {"run": self.run_id, "state": "failed"})
        self.gauges["trials"].set(self.done, {"run": self.run_id, "state": "ended"})


def _conclude(
    sweep: Sweep,
    task: Task,
    folder: RunDir,
    context: Context,
    actors: Pool,
    trials: list[Trial],
    incomplete: list[str],
    say: Say,
    tick: Tick,
) -> Result:
    """Audits the chosen candidates on fresh seeds, then writes front and report. incomplete: what is missing so far."""
    from raysweep.report.page import build

    failed = [t for t in trials if t.has_failed]
    picked = pick_for_audit(trials, sweep.audit.top)
    if not picked:
        reasons = sorted({t.reason for t in failed})[:3]
        raise RunFailed(f"no candidate: all {len(trials)} trials failed ({'; '.join(reasons)})")
    actors.audit_only()
    by_trial = {t.trial: t for t in picked}
    rounds: list[dict[str, str]] = []
    audits: dict[str, dict[str, str]] = {}
    again = list(by_trial)
    front = None
    # what draws nothing gives the same numbers again, and they would look like more evidence
    most = 1 if task.model_kind == "contrastive" else sweep.audit.rounds
    while again and len(rounds) < most:
        started, number = time.monotonic(), len(rounds) + 1
        name, tier = sweep.audit.round(number)
        what = "candidates" if number == 1 else "candidates whose place on the front is uncertain"
        anchors = "" if number == 1 else f", base, {len(context.oracles)} oracles and a destroyed model"
        say("audit", f"{len(again)} {what}{anchors} on fresh seeds")
        requests = {
            n: context.request(name, tier, n, by_trial[n].method, str(folder.candidates / n), by_trial[n].digest)
            for n in again
        }
        pending = {actors.manager.audit.remote(r): n for n, r in requests.items()}
        try:
            if number > 1:  # those of the first round were measured before the search
                incomplete += measure_anchors(task, context, actors, name, tier, say)
        except (RunFailed, Unmeasured) as error:
            incomplete.append(f"{name}: {error}")  # what the rounds before it showed stands
            say("failed", f"{name}: {error}")
            break
        keys, missing = gather(pending, requests, say, tick)
        rounds.append(keys)
        audits[name] = keys | {n: r.key for n, r in context.anchor_requests(name, tier).items()}
        incomplete += missing
        front = audited_front(folder, context, task, rounds, trials, requirements(sweep, task))
        again = front.undecided
        say("audit", f"done in {time.monotonic() - started:.0f} s")
    assert front is not None
    incomplete += front.unplaced
    finalists = front.finalists(sweep.audit.finalists)
    if finalists:
        started = time.monotonic()
        say("attack", f"{', '.join(finalists)}, base and {len(context.oracles)} oracles")
        tier_attacks = sweep.audit.durability
        attacks = context.control_requests("durability", tier_attacks) | {
            name: context.request(
                "durability", tier_attacks, name, by_trial[name].method, str(folder.candidates / name),
                by_trial[name].digest,
            )
            for name in finalists
        }  # fmt: skip
        pending = {actors.manager.audit.remote(r): name for name, r in attacks.items()}
        attacked, missing = gather(pending, attacks, say, tick)
        incomplete += missing
        audits["durability"] = attacked
        front.verdicts = judged_by_attacks(folder, context, audits["audit"], attacked)
        front.gaps = {n: "the attacks on it failed" for n in finalists if n not in front.verdicts} | {
            n: "no attack gave a result on it"
            for n, v in front.verdicts.items()
            if n in finalists and v.label == "not tested"
        }
        say("attack", f"done in {time.monotonic() - started:.0f} s")
        for name in finalists:
            if name in front.verdicts:
                say("verdict", f"{name}  {front.verdicts[name].sentence()}")
    front.audits = audits
    write_front(folder, front, sweep)
    write_paired(folder, context, audits["audit"], {t.trial: t.method for t in trials})
    folder.update(incomplete=incomplete)  # for the report
    build(folder)
    return Result(folder, front, trials, incomplete)


def urls(folder: RunDir, dashboard: str) -> list[str]:
    """Where a running sweep can be watched. dashboard: HOST:PORT of Ray's; "" for none."""
    lines = [f"Ray dashboard  http://{dashboard}"] if dashboard else []
    lines.append(f"tensorboard --logdir {shlex.quote(str(folder.path / 'tune'))}")
    lines.append(f"optuna-dashboard {shlex.quote(str(folder.journal))}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
