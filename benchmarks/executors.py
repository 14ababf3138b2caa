"""Overhead per trial of warm and of isolated train workers: time of a trial minus its optimisation steps.

    python benchmarks/executors.py [trials]

Both executors run the same job (neggrad, 5 steps, on the digits' base architecture) in one Ray instance. Prints medians,
spread, their ratio, machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import ray
from ray.train import ScalingConfig

from raysweep.config.reader import load
from raysweep.engine.cluster import ENVIRONMENT
from raysweep.models.pixel import PixelDDPM
from raysweep.rundir import versions
from raysweep.storage.files import write_folder
from raysweep.train.broker import NAMESPACE, Broker
from raysweep.train.executors import Executor, Isolated, Warm
from raysweep.train.jobs import Job
from raysweep.train.slot import Slot, slot_options

STEPS = 5


def overheads(executor: Executor, folder: Path, name: str, trials: int) -> list[float]:
    """Seconds of each trial that were not its optimisation steps."""
    seconds = []
    for k in range(trials):
        job = Job(
            id=f"{name}-{k}",
            kind="train",
            method="neggrad",
            seed=k,
            task=str(folder / "task"),
            base=str(folder / "base"),
            hyperparameters={"lr": 1e-4, "steps": STEPS, "batch_size": 32},
            out=str(folder / "out" / f"{name}-{k}"),
        )
        started = time.perf_counter()
        outcome = executor.run(job)
        assert outcome.status == "ok", outcome.reason
        seconds.append(time.perf_counter() - started - STEPS * outcome.step_seconds)
    return seconds


def main() -> None:
    """Runs both executors and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="?", default=5)
    trials = parser.parse_args().trials
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = load(None).task.build()
        write_folder(folder / "task", task.save)
        PixelDDPM.build(task.model, 0).save(folder / "base")
        root = str(Path(__file__).resolve().parent.parent)
        ray.init(
            address="local",
            log_to_driver=False,
            logging_level="ERROR",
            namespace=NAMESPACE,
            object_store_memory=200 * 2**20,
            runtime_env={"env_vars": ENVIRONMENT | {"PYTHONPATH": root}},
        )
        scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})
        isolated = overheads(Isolated(scaling, str(folder / "train")), folder, "isolated", trials)
        broker = Broker.remote()
        slot = Slot.options(**slot_options(scaling)).remote()
        service = slot.serve.remote(broker, "slot-0", scaling, str(folder / "train"))
        warm = overheads(Warm(broker), folder, "warm", 4 * trials + 1)
        ray.get(broker.close.remote())
        ray.get(service)
        ray.shutdown()
    first, warm = warm[0], warm[1:]
    print(
        json.dumps(
            {
                "isolated_s": {
                    "median": statistics.median(isolated),
                    "min": min(isolated),
                    "max": max(isolated),
                    "n": len(isolated),
                },
                "warm_s": {"median": statistics.median(warm), "min": min(warm), "max": max(warm), "n": len(warm)},
                "warm_first_s": first,
                "ratio_warm_to_isolated": statistics.median(warm) / statistics.median(isolated),
                "machine": f"{os.cpu_count()} CPUs, {platform.machine()}",
                "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "ray")},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
