"""Runs the trials of a sweep that are left, through Ray Tune."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.util.metrics import Gauge

from raysweep.config.schema import Sweep
from raysweep.engine.attempt import Interrupted
from raysweep.engine.engine import Engine
from raysweep.engine.events import Events
from raysweep.engine.resources import TRIAL_SLOT
from raysweep.engine.retention import Retention
from raysweep.engine.trial import trial
from raysweep.results.trials import trial_table
from raysweep.rundir import RunDir
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Space
from raysweep.search.window import resolve_window
from raysweep.storage.files import checkpoint_path

NODE_LOSSES = 20  # of a trial's function, which starts again on another node and finds the job that it waits for


def run_trials(engine: Engine, spaces: Sequence[Space]) -> None:
    """Runs the trials that are left; raises Interrupted if some are left afterwards.

    At most one trial per slot and one per auditor is in flight, so audits that fall behind hold back new trials.
    """
    searcher, plan, folder = searcher_of(engine, spaces), engine.plan, engine.folder
    retried = searcher.retry()
    if retried:
        engine.events.say(
            "search",
            f"tried again, since the limit that ended them is wider by now or the disk was full: {', '.join(retried)}",
        )
    left = searcher.left()
    if left == 0:
        return
    ray.get(engine.actors.broker.watch.remote())
    resources = {TRIAL_SLOT: 1} if plan.trial_slots else {"cpu": plan.driver_cpus}
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0} | resources),
        param_space={"run": str(folder.path), "plan": asdict(plan)},
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=left,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,  # which TensorBoard shows
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder.path / "tune"),
            verbose=0,
            callbacks=[TrialEvents(folder, engine.run_id, engine.sweep, engine.events)],
            failure_config=tune.FailureConfig(max_failures=NODE_LOSSES),
        ),
    )
    with restored_interrupts(), quiet_losses():
        tuner.fit()
    idle = ray.get(engine.actors.broker.waited.remote())
    if idle is not None:
        folder.update(train_workers_idle=idle)
        engine.events.say("search", f"train workers were idle {idle:.0%} of the time")
    if searcher_of(engine, spaces).left():
        raise Interrupted("stopped before all trials had ended")


def _name(trial: Any) -> str:
    """The name of one of Tune's trials: that of its candidate."""
    return str(trial.config["trial"])


def searcher_of(engine: Engine, spaces: Sequence[Space]) -> ParetoSearch:
    """The searcher of a sweep, attached to its study; records the window that it works with."""
    folder, sweep = engine.folder, engine.sweep.with_window(engine.folder.read_manifest().get("window"))
    settings = sweep.search
    window = resolve_window(settings, engine.plan.concurrent_trials)
    if window is not None and settings.window == "auto":
        folder.update(window=window)
    return ParetoSearch(
        folder.journal,
        engine.run_id,
        list(spaces),
        settings.trials,
        window,
        settings.seed,
        settings.sampler,
        sweep.limits,
        lambda: engine.actors.steward.plan.concurrent_trials,
    )


@contextlib.contextmanager
def restored_interrupts() -> Iterator[None]:
    """Restores the handler of SIGINT afterwards: Tune leaves one in place that no longer has any effect."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def quiet_losses() -> Iterator[None]:
    """Keeps Tune from printing a traceback for each trial function whose node is lost; the steward says which node that was."""
    logger = logging.getLogger("ray.tune.execution.tune_controller")

    def other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ray.exceptions.RayActorError))

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class TrialEvents(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Reports the end of each trial to the run's events and to Ray's metrics."""

    def __init__(self, folder: RunDir, run_id: str, sweep: Sweep, events: Events):
        self.folder, self.sweep, self.events = folder, sweep, events
        trials = trial_table(folder, run_id)  # of a run that is resumed
        states = [t.state for t in trials]
        self.retention = Retention(folder, sweep, trials)
        self.done, self.failed = sum(state != "RUNNING" for state in states), states.count("FAIL")
        self.gauges = {
            "trials": Gauge("raysweep_trials", "ended trials", ("run", "state")),
            "residue": Gauge("raysweep_residue", "residue of the last candidate", ("run", "method")),
            "damage": Gauge("raysweep_damage", "damage of the last candidate", ("run", "method")),
        }
        self.count()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; events and gauges do not pickle and are of no use elsewhere."""
        return {k: v for k, v in self.__dict__.items() if k not in ("events", "gauges")}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended(trial.config, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended(trial.config, {"reason": "the trial's process died"})

    def ended(self, config: dict[str, Any], result: dict[str, Any]) -> None:
        """Reports one trial: its config, and what it reported last."""
        self.done += 1
        if not result.get("limit"):  # under a wider limit it would resume from its checkpoint
            checkpoint_path(self.folder.candidates / config["trial"]).unlink(missing_ok=True)
        settings = " ".join(f"{k}={_short(v)}" for k, v in config["hyperparameters"].items())
        total = self.sweep.search.trials
        if result.get("reason"):
            self.failed += 1
            self.events.say("failed", f"{config['trial']}  {settings}  {result['reason']}")
        else:
            objectives = f"residue {result['residue']:.2f}  damage {result['damage']:.2f}"
            cost = f"{result['train_s']:.1f} s + {result['audit_s']:.1f} s"
            self.events.say("trial", f"{config['trial']:<16} {objectives}  {cost}  {settings}  {self.done}/{total}")
            for name in ("residue", "damage"):
                self.gauges[name].set(result[name], {"run": self.folder.path.name, "method": config["method"]})
        self.count()
        self.retention.ended(config, result)
        self.events.tick("trials", self.done, total)

    def count(self) -> None:
        """Brings the counts of trials to Ray's metrics."""
        self.gauges["trials"].set(self.failed, {"run": self.folder.path.name, "state": "failed"})
        self.gauges["trials"].set(self.done, {"run": self.folder.path.name, "state": "ended"})


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
