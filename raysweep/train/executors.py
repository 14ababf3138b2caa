"""Two ways to run jobs on Ray Train workers, behind one interface: `executor.run(job) -> Outcome`.

warm      long-lived slots (`train/slot.py`), which ask the broker for one job after another.
isolated  one TorchTrainer per job, for untrusted methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig

from raysweep.storage.files import temporary_path
from raysweep.train.broker import ATTEMPTS
from raysweep.train.jobs import Job, Outcome, finished
from raysweep.train.worker import run_one

CONTROLLER_FAILURES = 20  # of Ray Train's controller, as on a busy machine


class Executor(Protocol):
    """Runs jobs on train workers."""

    def run(self, job: Job) -> Outcome:
        """Runs a job and waits for its outcome; a job that is finished already is not run again."""

    def stop(self) -> None:
        """Ends all waiting for jobs in this process."""


class Warm:
    """Hands jobs to the slots through the broker."""

    def __init__(self, broker: ActorHandle):
        self.broker = broker

    def run(self, job: Job) -> Outcome:
        outcome: Outcome = finished(job) or ray.get(self.broker.submit.remote(job.id, job))
        return outcome

    def stop(self) -> None:
        """Does nothing: closing the broker ends all waiting."""


class Isolated:
    """Starts one TorchTrainer per job, in a Ray task, which can be cancelled. light: the task's own resources."""

    def __init__(self, scaling: ScalingConfig, storage: str, light: dict[str, float] | None = None):
        self.scaling, self.storage, self.light = scaling, storage, light or {}
        self.waiting: set[ray.ObjectRef] = set()

    def run(self, job: Job) -> Outcome:
        before = finished(job)
        if before is not None:
            return before
        reference = fit_in_task.options(resources=self.light).remote(job, self.scaling, self.storage)
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


# spread: each holds the controller of its workers, and the head would be full of them
fit_in_task = ray.remote(num_cpus=0, max_retries=ATTEMPTS - 1, scheduling_strategy="SPREAD")(fit)
