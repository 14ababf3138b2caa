"""Connects to a cluster, or starts Ray on this machine, and holds the actors of a run: audit manager, auditors, job broker."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysweep.auditing.auditor import Auditor
from raysweep.auditing.manager import AuditManager
from raysweep.config.schema import ConfigError, Sweep
from raysweep.engine.resources import AUDIT, TRIAL_SLOT, Node, Plan
from raysweep.engine.trial import scaling
from raysweep.storage.code_digests import ROOT
from raysweep.storage.places import PlaceError, ray_folder
from raysweep.train.broker import NAMESPACE, Broker, actor_name
from raysweep.train.executors import Executor, start_group, stop_groups

# Settings of Ray that a run needs in every one of its processes.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # groups notice a dead worker soon
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "30",
    "RAY_DEDUP_LOGS": "1",
    # a run has more processes than a laptop has cores, most of which wait; Ray would print a warning about them
    "RAY_worker_maximum_startup_concurrency": str(max(4, os.cpu_count() or 1)),
}
MEGABYTE = 1024 * 1024
AUDITORS_S = 120.0
CLOSE_S = 5.0
LEAVE_S = 20.0
REACH_S = 10.0


class RunFailed(RuntimeError):
    """A run cannot continue; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to. dashboard: HOST:PORT of Ray's dashboard; "" without one."""

    nodes: list[Node]
    dashboard: str


@contextlib.contextmanager
def connected(sweep: Sweep) -> Iterator[Cluster]:
    """Connects to the cluster of RAY_ADDRESS or of the submitting job, else starts a local Ray on loopback.

    Raises ConfigError if no cluster answers at that address or this process is connected to one already, RunFailed if no local
    Ray starts.
    """
    if ray.is_initialized():
        raise ConfigError("this process is connected to Ray already: call ray.shutdown() before a run")
    missing = {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    with _environment(missing), _sigterm_interrupts():
        context = _init(sweep, missing)
        try:
            nodes = [
                Node(
                    n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0), n.get("Labels", {}).get("role", "")
                )
                for n in ray.nodes()
                if n["Alive"]
            ]
            yield Cluster(nodes, context.dashboard_url or "")
        finally:
            ray.shutdown()


def _init(sweep: Sweep, missing: dict[str, str]) -> Any:
    """Connects or starts Ray; `missing` are variables that its processes need and this process did not have."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    path = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    if os.environ.get("RAY_ADDRESS"):
        # a submitted job ships its working directory; otherwise workers import from where this process does
        variables = missing if _in_job() else missing | {"PYTHONPATH": path}
        _reach(os.environ["RAY_ADDRESS"])
        context = ray.init(address="auto", runtime_env={"env_vars": variables}, **options)
    else:
        try:
            folder = ray_folder()
        except PlaceError as error:
            raise ConfigError(str(error)) from error
        try:
            context = ray.init(
                address="local",  # never a cluster that happens to run on this machine
                num_cpus=sweep.resources.cpus,
                resources={TRIAL_SLOT: 10_000},
                object_store_memory=200 * MEGABYTE,
                dashboard_host="127.0.0.1",
                runtime_env={"env_vars": missing | {"PYTHONPATH": path}},
                **options,
            )
        except Exception as error:  # Ray has no class for it; on a busy machine it gives up after 30 s
            ray.shutdown()
            reason = " ".join(str(error).split()) or type(error).__name__
            busy = ", which may be too busy" if "timed out" in reason else ""
            files = f" (temporary files in {folder})" if isinstance(error, OSError) else ""
            raise RunFailed(f"Ray did not start on this machine{busy}{files}: {reason}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)  # ray.init has put a handler in place that aborts the process
    return context


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the time of a block: processes that Ray starts inherit them."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM interrupts inside the block; its previous handler is restored afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python


def _reach(address: str) -> None:
    """Raises ConfigError if nothing answers at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in address:  # "auto" and the like, which Ray resolves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there: {error}") from error


def interrupt(*_: Any) -> None:
    """Handles SIGTERM, which `ray job stop` and schedulers send, as SIGINT, on which Tune stops gracefully."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in what a script starts in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def has_trial_slots() -> bool:
    """Whether the connected cluster offers trial slots."""
    return bool(ray.cluster_resources().get(TRIAL_SLOT, 0) > 0)


@dataclass
class Pool:
    """A run's actors: the audit manager and its auditors, the job broker and the threads that hold its worker groups.

    name: of an auditor, without its number. reserved: the auditors' placement groups. ending: threads that still shut down.
    """

    name: str
    plan: Plan
    manager: ActorHandle
    auditors: list[ActorHandle]
    broker: ActorHandle
    groups: list[threading.Thread]
    reserved: list[PlacementGroup]
    ending: list[threading.Thread] = field(default_factory=list)

    @contextlib.contextmanager
    def waiting(self, executor: Executor) -> Iterator[ThreadPoolExecutor]:
        """Threads that wait for jobs and actors. An interrupt does not wait for them: they end with the pool."""
        threads = ThreadPoolExecutor(max_workers=16)
        try:
            yield threads
        except BaseException:
            executor.stop()
            ending = threading.Thread(target=threads.shutdown, kwargs={"cancel_futures": True}, daemon=True)
            ending.start()
            self.ending.append(ending)
            raise
        threads.shutdown()

    def stop_training(self) -> None:
        """Lets the worker groups end."""
        stop_groups(self.broker, self.groups)

    def audit_only(self) -> None:
        """Ends training and gives its resources to more auditors: after the search nothing else would use them."""
        self.stop_training()
        if not self.plan.late_auditors:
            return
        names, auditors, group = _start_auditors(self.name, self.plan, len(self.auditors), self.plan.late_auditors)
        self.auditors += auditors
        self.reserved.append(group)
        ray.get(self.manager.add.remote(names))

    def close(self) -> None:
        """Ends everything."""
        self.stop_training()
        with contextlib.suppress(ray.exceptions.RayError):  # else Ray prints that pending calls will be retried
            ray.get(self.manager.close.remote(), timeout=CLOSE_S)
        for actor in (self.manager, self.broker, *self.auditors):
            ray.kill(actor)
        for group in self.reserved:
            remove_placement_group(group)
        for thread in self.ending:  # one that is inside Ray while Ray shuts down would abort the process
            thread.join(LEAVE_S)


@contextlib.contextmanager
def pool(run: Path, run_id: str, sweep: Sweep, plan: Plan) -> Iterator[Pool]:
    """Starts auditors (their placement group first, so that trials cannot take their resources), manager and worker groups."""
    name = actor_name("auditor", run, run_id)
    names, auditors, group = _start_auditors(name, plan, 0, plan.auditors)
    if not group.wait(AUDITORS_S):
        raise ConfigError(
            f"resources: the cluster had no room for the auditors within {AUDITORS_S:g} s; see `ray status`"
        )
    manager = AuditManager.options(name=actor_name("audits", run, run_id)).remote(  # type: ignore[attr-defined]
        str(run), names, NAMESPACE, sweep.audit.attempts, sweep.audit.timeout_s
    )
    broker = Broker.options(name=actor_name("broker", run, run_id)).remote()  # type: ignore[attr-defined]
    groups = []
    if sweep.train.executor == "warm":
        storage = str(run / "tune" / "train")
        groups = [start_group(broker, slot, scaling(plan), storage) for slot in range(plan.slots)]
    actors = Pool(name, plan, manager, auditors, broker, groups, [group])
    try:
        yield actors
    finally:
        actors.close()


def _start_auditors(
    name: str, plan: Plan, first: int, count: int
) -> tuple[list[str], list[ActorHandle], PlacementGroup]:
    """(names, handles, placement group) of `count` auditors, called `name` and numbered from `first`."""
    bundle = {"CPU": plan.auditor_cpus} | ({"GPU": plan.auditor_gpus} if plan.auditor_gpus else {})
    selector = [{"role": AUDIT}] * count if plan.roles and first == 0 else None
    group = placement_group([bundle] * count, strategy="SPREAD", bundle_label_selector=selector)
    options = {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
        "num_cpus": plan.auditor_cpus,
        "num_gpus": plan.auditor_gpus,
    }
    names = [f"{name}-{i}" for i in range(first, first + count)]
    return names, [Auditor.options(name=n, **options).remote() for n in names], group  # type: ignore[attr-defined]


def _in_job() -> bool:
    """Whether `ray job submit` started this process; its runtime environment is then given."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
