"""Composes a sweep: task, workers, auditors, search, audit, results, report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.metrics import Gauge

from methods.base import Method
from raysweep import card
from raysweep.audit.auditor import AuditRequest, rows_path, scores_path
from raysweep.config import ConfigError, Sweep
from raysweep.context import Context, load_measured
from raysweep.informative import caveat
from raysweep.models import families
from raysweep.objectives import Objectives, Unmeasured, objectives
from raysweep.pool import Pool, connected, has_trial_slots, pool
from raysweep.power import requirements, undecidable
from raysweep.prepare import (
    RunFailed,
    Say,
    Tick,
    check_model,
    check_oracles,
    measure_anchors,
    open_choices,
    prepare,
    prepares,
    save_task,
)
from raysweep.registry import resolve
from raysweep.resources import TRIAL_SLOT, Plan, make_plan
from raysweep.results import (
    Front,
    audited_front,
    judged_by_attacks,
    pick_for_audit,
    trial_table,
    verdict_of,
    write_front,
    write_paired,
    write_trials,
)
from raysweep.rundir import RunDir, git_commit, versions
from raysweep.search import ParetoSearch
from raysweep.spaces import Space, SpaceError
from raysweep.spaces import load as load_space
from raysweep.tasks.task import Task
from raysweep.trial import make_executor, trial


class Interrupted(RuntimeError):
    """The sweep was asked to stop; its state is on disk and the same command goes on."""


@dataclass
class Result:
    """How a run ended. incomplete: checks that failed in the final audit."""

    folder: RunDir
    front: Front | None
    trials: list[dict[str, Any]]
    incomplete: list[str]


def resolve_sweep(sweep: Sweep) -> tuple[Task, list[Space]]:
    """The task and the search spaces, checked against each other; raises ConfigError."""
    try:
        task = sweep.task.build()
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
    if getattr(sweep.task, "base_steps", 1) == 0 and not sweep.oracle_models:
        raise ConfigError(
            "oracle_models: name folders of models retrained without the forgotten data, or set task.base_steps to train them here"
        )
    problems = task.near_duplicates()
    if problems:
        raise ConfigError("\n".join(f"task: {problem}" for problem in problems))
    try:
        model = families.example(task)
    except ValueError as error:
        raise ConfigError(f"task.base: {error}") from error
    check_training(sweep, task, model)
    spaces = []
    for name in sweep.methods:
        reasons = refusals(resolve("method", name), task)
        if reasons:
            raise ConfigError(f"methods: {name} cannot serve the task {task.name}: {'; '.join(reasons)}")
        try:
            spaces.append(load_space(name, sweep.spaces.get(name), task.kind))
        except SpaceError as error:
            raise ConfigError(str(error)) from error
        reasons = misfits(spaces[-1], task, model)
        if reasons:
            raise ConfigError("\n".join(f"spaces.{name}: {reason}" for reason in reasons))
    for tier_name in ("probe", "audit"):
        checks = getattr(sweep.audit, tier_name).checks_for(task)
        for metric in (*task.views, task.quality, task.validity):
            if metric.split(".")[0] not in checks:
                raise ConfigError(
                    f"audit.{tier_name}.checks: {metric.split('.')[0]!r} is missing: {metric} is an objective"
                )
    problems = undecidable(sweep)
    if problems:
        raise ConfigError("\n".join(problems))
    return task, spaces


def check_training(sweep: Sweep, task: Task, model: Any) -> None:
    """Raises ConfigError if the modules or adapters that are to be trained do not fit the task's model and the methods."""
    train = sweep.train
    if (train.modules or train.lora) and task.family != "text-ddpm":
        key = "modules" if train.modules else "lora"
        raise ConfigError(
            f"train.{key}: is for text-to-image models, and the task {task.name} is about {task.family} models"
        )
    unknown = [m for m in train.modules if m not in model.net] if train.modules else []
    if unknown:
        raise ConfigError(f"train.modules: the model has no {', '.join(unknown)}; valid: {', '.join(model.net)}")
    if train.lora is None:
        return
    if train.modules:
        raise ConfigError("train.lora: adapters lie on the U-Net; leave train.modules empty")
    if find_spec("peft") is None:
        raise ConfigError("train.lora: the library is missing: pip install 'raysweep[lora]'")
    for name in sweep.methods:
        if prepares(resolve("method", name)):
            raise ConfigError(f"train.lora: {name} works on the tensors of the base model by name, not on adapters")


def refusals(method: type[Method], task: Task) -> list[str]:
    """Why a method cannot serve a task at all."""
    reasons = []
    if task.family not in method.families:
        reasons.append(f"it works on {' or '.join(sorted(method.families))} models, and the task's is {task.family}")
    if task.kind not in method.kinds:
        reasons.append(f"it forgets {' or '.join(sorted(method.kinds))}, and the task is of kind {task.kind!r}")
    return reasons + [f"it needs the {need} set" for need in sorted(method.needs - set(task.splits))]


def misfits(space: Space, task: Task, model: Any) -> list[str]:
    """Why values of a space cannot work on a task's model; each reason once."""
    method = resolve("method", space.method)
    start = space.fixed | {p.name: p.values[0] for p in space.parameters if not p.open and not p.when}
    trials = [start | {p.name: v} for p in space.parameters if not p.open and not p.when for v in p.values]
    trials += [start | point.values for point in space.points]
    found = [
        reason for values in trials for reason in method.unsuited(method.Hyperparameters(**values), model, task.goal)
    ]
    return list(dict.fromkeys(found))


def run_sweep(sweep: Sweep, say: Say, tick: Tick) -> Result:
    """Runs a sweep to its report, or resumes it.

    Raises:
        ConfigError: the config, the run directory or the cluster does not allow it.
        RunFailed: nothing came out of it.
        Interrupted: SIGINT or SIGTERM ended it; the same call resumes.
    """
    task, spaces = resolve_sweep(sweep)
    folder = RunDir.of(sweep)
    run_id = f"{sweep.name}-{sweep.digest[:8]}"
    with folder.claim(sweep, {"config": sweep.digest, "task": task.digest}):
        before = trial_table(folder, run_id)
        ended = sum(t["state"] != "RUNNING" for t in before)
        say("run", f"{folder.path}" + (f"  (resuming: {ended} of {sweep.search.trials} trials done)" if before else ""))
        save_task(folder, task)
        try:
            result = _with_ray(sweep, task, spaces, folder, run_id, say, tick)
        except (RunFailed, Unmeasured) as error:
            folder.update(state="failed", reason=str(error))
            raise RunFailed(str(error)) from error
        except (Interrupted, KeyboardInterrupt):
            folder.update(state="interrupted")
            raise
        except Exception as error:
            folder.update(state="failed", reason=f"{type(error).__name__}: {error}")
            raise
        folder.update(state="incomplete" if result.incomplete else "done", incomplete=result.incomplete)
    return result


def _with_ray(
    sweep: Sweep, task: Task, spaces: list[Space], folder: RunDir, run_id: str, say: Say, tick: Tick
) -> Result:
    with connected(sweep) as nodes:
        plan = make_plan(nodes, sweep, has_trial_slots())
        say("plan", plan.describe())
        for line in urls(folder):
            say("url", line)
        with pool(folder.path, run_id, sweep, plan) as actors:
            executor = make_executor(str(folder.path), run_id, sweep, plan)
            context = prepare(sweep, task, spaces, folder, run_id, executor, actors, say, tick)
            measure_anchors(task, context, actors, "probe", sweep.audit.probe, say)
            spaces = [open_choices(space, context) for space in spaces]
            search(sweep, spaces, folder, run_id, plan, say, tick, actors)
            trials = write_trials(folder, run_id)
            return _conclude(sweep, task, folder, context, actors, trials, say, tick)


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
        folder.journal, run_id, spaces, sweep.search.trials, sweep.search.batch, sweep.search.seed, sweep.search.sampler
    )
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
        self.done = sum(t["state"] != "RUNNING" for t in trial_table(folder, run_id))
        self.failed = 0
        self.gauges = {
            "trials": Gauge("raysweep_trials", "ended trials", ("run", "state")),
            "residue": Gauge("raysweep_residue", "residue of the last candidate", ("run", "method")),
            "damage": Gauge("raysweep_damage", "damage of the last candidate", ("run", "method")),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a display does not pickle and is of no use elsewhere."""
        return {k: v for k, v in self.__dict__.items() if k not in ("say", "tick", "gauges")}

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended(trial.config, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ended(trial.config, {"reason": "the trial's process died"})

    def ended(self, config: dict[str, Any], result: dict[str, Any]) -> None:
        self.done += 1
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
        self.gauges["trials"].set(self.failed, {"run": self.run_id, "state": "failed"})
        self.gauges["trials"].set(self.done, {"run": self.run_id, "state": "ended"})
        self.tick("trials", self.done, total)


def _conclude(
    sweep: Sweep, task: Task, folder: RunDir, context: Context, actors: Pool, trials: list[dict], say: Say, tick: Tick
) -> Result:
    """Audits the chosen candidates on fresh seeds, then writes front and report."""
    from raysweep.report.page import build

    failed = [t for t in trials if t["state"] == "FAIL"]
    picked = pick_for_audit(trials, sweep.audit.top)
    if not picked:
        reasons = sorted({t["reason"] for t in failed})[:3]
        raise RunFailed(f"no candidate: all {len(trials)} trials failed ({'; '.join(reasons)})")
    actors.audit_only()
    by_trial = {t["trial"]: t for t in picked}
    rounds: list[dict[str, str]] = []
    incomplete: list[str] = []
    again = list(by_trial)
    front = None
    # what draws nothing gives the same numbers again, and they would look like more evidence
    most = 1 if task.family == "clip" else sweep.audit.rounds
    while again and len(rounds) < most:
        started, number = time.monotonic(), len(rounds) + 1
        name, tier = sweep.audit.round(number)
        what = "candidates" if number == 1 else "candidates whose place on the front is uncertain"
        say("audit", f"{len(again)} {what}, base, {len(context.oracles)} oracles and a destroyed model on fresh seeds")
        requests = {
            n: context.request(name, tier, n, by_trial[n]["method"], str(folder.candidates / n), by_trial[n]["digest"])
            for n in again
        }
        pending = {actors.manager.audit.remote(r): n for n, r in requests.items()}
        measure_anchors(task, context, actors, name, tier, say)
        keys, missing = _gather(pending, requests, say, tick)
        rounds.append(keys)
        incomplete += missing
        front = audited_front(folder, context, task, rounds, trials, requirements(sweep))
        again = front.undecided
        say("audit", f"done in {time.monotonic() - started:.0f} s")
    assert front is not None
    keys, tier = rounds[0], sweep.audit.audit
    finalists = front.finalists(sweep.audit.finalists)
    if finalists:
        started = time.monotonic()
        say("attack", f"{', '.join(finalists)}, base and {len(context.oracles)} oracles")
        tier_attacks = sweep.audit.durability
        attacks = context.control_requests("durability", tier_attacks) | {
            name: context.request(
                "durability", tier_attacks, name, by_trial[name]["method"], str(folder.candidates / name),
                by_trial[name]["digest"],
            )
            for name in finalists
        }  # fmt: skip
        pending = {actors.manager.audit.remote(r): name for name, r in attacks.items()}
        attacked, missing = _gather(pending, attacks, say, tick)
        incomplete += missing
        audits = keys | {n: r.key for n, r in context.control_requests("audit", tier).items()}
        front.verdicts = judged_by_attacks(folder, context, audits, attacked)
        say("attack", f"done in {time.monotonic() - started:.0f} s")
        for name in finalists:
            if name in front.verdicts:
                say("verdict", f"{name}  {front.verdicts[name].sentence()}")
    write_front(folder, front, sweep)
    anchors = {name: r.key for name, r in context.anchor_requests("audit", tier).items()}
    write_paired(folder, context, keys | anchors, {t["trial"]: t["method"] for t in trials})
    build(folder)
    return Result(folder, front, trials, incomplete)


def _gather(
    pending: dict[Any, str], requests: dict[str, AuditRequest], say: Say, tick: Tick
) -> tuple[dict[str, str], list[str]]:
    """Waits for audits by reference; (subject -> key of those that ended well, in the order of `requests`; what is missing)."""
    ended, incomplete = {}, []
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        name = pending.pop(ready[0])
        answer = ray.get(ready[0])
        tick("audits", len(requests) - len(pending), len(requests))
        incomplete += [f"{name}: {check}" for check in answer["failed"]]
        if answer["status"] == "ok":
            ended[name] = requests[name].key
        else:
            incomplete.append(f"{name}: {answer['reason']}")
            say("failed", f"audit of {name}: {answer['reason']}")
    return {name: ended[name] for name in requests if name in ended}, incomplete


def audit_model(model: Path, sweep: Sweep, say: Say, tick: Tick) -> tuple[Path, dict[str, Any]]:
    """Audits a diffusers folder in the full tier and by all attacks, next to base and oracles; (path of the card, card).

    Raises ConfigError if the folder holds no model that fits the task.
    """
    sweep = sweep.model_copy(update={"name": f"{sweep.name[:50]}-audits"})
    task, _ = resolve_sweep(sweep)
    digest, name = check_model(str(model), task, str(model)), model.absolute().name
    check_oracles(sweep, task)
    folder, run_id = RunDir.of(sweep), f"{sweep.name}-{sweep.digest[:8]}"
    with folder.claim(sweep, {"config": sweep.digest, "task": task.digest}), connected(sweep) as nodes:
        save_task(folder, task)
        plan = make_plan(nodes, sweep, has_trial_slots())
        with pool(folder.path, run_id, sweep, plan) as actors:
            executor = make_executor(str(folder.path), run_id, sweep, plan)
            context = prepare(sweep, task, [], folder, run_id, executor, actors, say, tick)
            actors.audit_only()
            requests = {
                tier: context.request(tier, getattr(sweep.audit, tier), name, "", str(model.absolute()), digest)
                for tier in ("audit", "durability")
            }
            pending = {actors.manager.audit.remote(r): tier for tier, r in requests.items()}
            measure_anchors(task, context, actors, "audit", sweep.audit.audit, say)
            keys, incomplete = _gather(pending, requests, say, tick)
        if set(keys) != set(requests):
            raise RunFailed("; ".join(incomplete))
        anchors, views = context.load_anchors("audit")
        place = objectives(load_measured(folder.path, keys["audit"]), anchors, views, task.quality, task.validity)
        write_paired(folder, context, {name: keys["audit"]}, {})
        made = write_card(sweep, task, context, folder, name, str(model.absolute()), digest, requests, place)
        folder.update(state="done")
    return made, card.read(made)


def write_card(
    sweep: Sweep,
    task: Task,
    context: Context,
    folder: RunDir,
    name: str,
    model: str,
    digest: str,
    requests: dict[str, AuditRequest],
    place: Objectives,
) -> Path:
    """Writes the audit card of one model from what its audits left in the run."""
    verdict = verdict_of(folder, name, {tier: r.key for tier, r in requests.items()}, context)
    findings = [f for tier, r in requests.items() for f in card.findings_of(
        rows_path(folder.path, r.key), folder.rows / f"paired-{r.key}.parquet", tier)]  # fmt: skip
    for f in findings:
        f["reason"] = "; ".join(filter(None, (f["reason"], caveat(task.kind, f"{f['check']}.{f['metric']}"))))
    forget = len(task.splits["forget"].distinct())
    thing = task.thing or f"{forget} distinct image{'s' * (forget > 1)}"
    given = "given" if sweep.oracle_models else "trained here"
    skipped = [f for f in findings if f["status"] == "skipped" and f["metric"] in ("auc", "presence")]
    untested = ["Adversarial prompts were not tried.", *(f"{f['check']}: {f['reason']}" for f in skipped)]
    content = {
        "subject": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "answer": [
            f"Residue {place.residue:.3f} ± {place.residue_se:.3f} (0 like a model that never saw the forgotten data, 1 like "
            f"the base) at damage {place.damage:.3f} ± {place.damage_se:.3f} (0 like the oracles, 1 like a destroyed model).",
            f"Under attack: {verdict.sentence()}.",
        ],
        "asked": f"Has {name} forgotten {thing} of the task {task.name}, and what did that cost? Compared with the base model and "
        f"{len(context.oracles)} oracles ({given}) that never saw it.",
        "objectives": {k: v for k, v in place.plain().items() if k != "replicates"},
        "verdict": verdict.plain(),
        "findings": findings,
        "untested": untested,
        "tiers": {tier: r.tier.model_dump(mode="json") for tier, r in requests.items()},
        "models": {name: {"folder": model, "digest": digest}}
        | {n: {"folder": f, "digest": d} for n, f, d in requests["audit"].anchors},
        "task": {"name": task.name, "digest": task.digest, "folder": str(folder.task)},
        "judge_digest": requests["audit"].judge_digest,
        "code": {"version": versions()["raysweep"], "commit": git_commit(), "audit": requests["audit"].code},
        "versions": versions(),
    }
    tables = {
        f"{tier}-{kind}.parquet": where(folder.path, r.key)
        for tier, r in requests.items()
        for kind, where in (("rows", rows_path), ("scores", scores_path))
    }
    out = folder.path / "cards" / f"{name}-{digest[:8]}"
    return card.write(out, content, tables, Path(requests["audit"].judge) if requests["audit"].judge else None)


def urls(folder: RunDir) -> list[str]:
    """Where a running sweep can be watched."""
    address = ray._private.worker.global_worker.node.address_info.get("webui_url") if ray.is_initialized() else None
    lines = [f"Ray dashboard  http://{address}"] if address else []
    lines.append(f"tensorboard --logdir {folder.path / 'tune'}")
    lines.append(f"optuna-dashboard {folder.journal}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
