"""Connects to a cluster, or starts Ray on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from raysweep.config.schema import ConfigError, Sweep
from raysweep.engine.resources import TRIAL_SLOT, Node
from raysweep.storage.code_digests import ROOT
from raysweep.storage.places import PlaceError, ray_folder
from raysweep.train.broker import NAMESPACE

# Settings of Ray that a run needs in every one of its processes.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # groups notice a dead worker soon
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    # With "auto" Tune starts the processes of its trials one after the other, and ends those that it has no trial for at that moment.
    "TUNE_MAX_PENDING_TRIALS_PG": "100",
    "RAY_DEDUP_LOGS": "1",
    # a run has more processes than a laptop has cores, most of which wait; Ray would print a warning about them
    "RAY_worker_maximum_startup_concurrency": str(max(4, os.cpu_count() or 1)),
}
MEGABYTE = 1024 * 1024
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

    Raises ConfigError if no cluster answers at that address, it has another version of Ray or Python, or this process is connected
    to one already, RunFailed if no local Ray starts.
    """
    if ray.is_initialized():
        raise ConfigError("this process is connected to Ray already: call ray.shutdown() before a run")
    missing = {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    with _environment(missing), _sigterm_interrupts():
        context = _init(sweep, missing)
        try:
            yield Cluster(alive_nodes(), context.dashboard_url or "")
        finally:
            with uninterrupted():
                ray.shutdown()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores SIGINT and SIGTERM inside the block, which ends a run: senders such as `timeout` signal twice."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python


def _init(sweep: Sweep, missing: dict[str, str]) -> Any:
    """Connects or starts Ray; `missing` are variables that its processes need and this process did not have."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    path = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    if os.environ.get("RAY_ADDRESS"):
        # a submitted job ships its working directory; otherwise workers import from where this process does
        variables = missing if _in_job() else missing | {"PYTHONPATH": path}
        _reach(os.environ["RAY_ADDRESS"])
        try:
            context = ray.init(address="auto", runtime_env={"env_vars": variables}, **options)
        except (RuntimeError, ValueError, ConnectionError, ray.exceptions.RayError) as error:
            raise ConfigError(_refusal(os.environ["RAY_ADDRESS"], error)) from error
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


def _refusal(address: str, error: Exception) -> str:
    """Why a cluster takes no driver, in one sentence."""
    reason = " ".join(str(error).split())
    if not reason.startswith("Version mismatch"):
        return f"RAY_ADDRESS={address}: no connection to this cluster: {reason}"
    return f"RAY_ADDRESS={address}: this cluster has another Ray or Python than this process; install the same on both: {reason}"


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


def alive_nodes() -> list[Node]:
    """The nodes of the connected cluster, without those that are being drained."""
    # no public function of Ray says which nodes are draining; its own libraries use this one
    draining = ray._private.state.state.get_draining_nodes()
    return [
        Node(
            cpus=n["Resources"].get("CPU", 0.0),
            gpus=n["Resources"].get("GPU", 0.0),
            role=n.get("Labels", {}).get("role", ""),
            id=n["NodeID"],
            address=n["NodeManagerAddress"],
        )
        for n in ray.nodes()
        if n["Alive"] and n["NodeID"] not in draining
    ]


def _in_job() -> bool:
    """Whether `ray job submit` started this process; its runtime environment is then given."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
