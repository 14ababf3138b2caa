"""Two ways to run jobs on Ray Train workers, behind one interface: `executor.run(job) -> Outcome`.

warm      one long-lived TorchTrainer per slot. Its rank 0 asks the broker for the next job and passes it to its group.
isolated  one TorchTrainer per job, for jobs that span nodes and for untrusted methods.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raysweep.storage.files import temporary_path
from raysweep.train.broker import ATTEMPTS
from raysweep.train.jobs import Job, Outcome, finished
from raysweep.train.worker import run_one, serve

CONTROLLER_FAILURES = 20  # of Ray Train's controller, as on a busy machine
CLOSE_S, END_S = 5, 60  # waiting for the broker, and for the groups to end


class Executor(Protocol):
    """Runs jobs on train workers."""

    def run(self, job: Job) -> Outcome:
        """Runs a job and waits for its outcome; a job that is finished already is not run again."""

    def stop(self) -> None:
        """Ends all waiting for jobs in this process."""


class Warm:
    """Hands jobs to the warm groups through the broker."""

    def __init__(self, broker: ActorHandle):
        self.broker = broker

    def run(self, job: Job) -> Outcome:
        outcome: Outcome = finished(job) or ray.get(self.broker.submit.remote(job))
        return outcome

    def stop(self) -> None:
        """Does nothing: closing the broker, which `stop_groups` does, ends all waiting."""


class Isolated:
    """Starts one TorchTrainer per job, in a Ray task, which can be cancelled."""

    def __init__(self, scaling: ScalingConfig, storage: str):
        self.scaling, self.storage = scaling, storage
        self.waiting: set[ray.ObjectRef] = set()

    def run(self, job: Job) -> Outcome:
        before = finished(job)
        if before is not None:
            return before
        reference = fit_in_task.remote(job, self.scaling, self.storage)
        self.waiting.add(reference)
        try:
            outcome: Outcome = ray.get(reference)
            return outcome
        finally:
            self.waiting.discard(reference)

    def stop(self) -> None:
        for reference in list(self.waiting):
            ray.cancel(reference, force=True)


def fit(job: Job, scaling: ScalingConfig, storage: str) -> Outcome:
    """Runs a job by its own TorchTrainer. The Train run is named after the job, because Train resumes by name.

    A worker that ran out of time marks that by a file of this attempt alone: the job may be submitted again with a longer
    budget.
    """
    from ray.train.torch import TorchTrainer

    name = f"{job.id}-{job.digest}"
    overdue = temporary_path(Path(storage) / f"{name}.overdue")
    overdue.parent.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        run_one,
        train_loop_config={"job": job, "overdue": str(overdue)},
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=ATTEMPTS - 1, controller_failure_limit=CONTROLLER_FAILURES),
        ),
    )
    try:
        outcome: Outcome = trainer.fit().return_value
        return outcome
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()
        return Outcome("failed", f"its workers died {ATTEMPTS} times ({reason[-1] if reason else 'no reason given'})")
    finally:
        overdue.unlink(missing_ok=True)


fit_in_task = ray.remote(num_cpus=0, max_retries=ATTEMPTS - 1)(fit)


def start_group(broker: ActorHandle, slot: int, scaling: ScalingConfig, storage: str) -> threading.Thread:
    """Starts a warm group in the background; it ends when the broker is closed."""

    def fit_group() -> None:
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            serve,
            train_loop_config={"broker": broker, "slot": slot},
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"group-{slot}-{uuid.uuid4().hex[:16]}",  # new each time: Train would resume a name that exists
                storage_path=storage,
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=CONTROLLER_FAILURES),
            ),
        )
        # Ray raises SystemExit in waiting threads when it shuts down
        with contextlib.suppress(ray.exceptions.RayError, ray.train.TrainingFailedError, SystemExit):
            trainer.fit()

    thread = threading.Thread(target=fit_group, name=f"group-{slot}", daemon=True)
    thread.start()
    return thread


def stop_groups(broker: ActorHandle, groups: Iterable[threading.Thread]) -> None:
    """Ends the warm groups, also those at work, and waits for their threads.

    A thread that is still inside Ray while Ray shuts down can crash the process. Ray Train starts the group of a killed worker
    again, which then learns from the broker that the run has ended.
    """
    with contextlib.suppress(ray.exceptions.RayError):
        for worker in ray.get(broker.close.remote(), timeout=CLOSE_S):
            ray.kill(worker)
    deadline = time.monotonic() + END_S
    for group in groups:
        group.join(max(0.0, deadline - time.monotonic()))
