"""What Ray Tune adds to a trial: no-op trials through Tune with the real searcher, and its snapshots of the experiment.

    python benchmarks/tune.py [trials] [--period 30]    # prints one JSON object

Four trials are in flight, in a local Ray. `period` is TUNE_GLOBAL_CHECKPOINT_S: seconds between snapshots; inf: only the first and the
last, which Tune always writes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import ray
from ground import machine
from ray import tune
from ray.tune.execution.tune_controller import TuneController

from raysweep.engine.cluster import ENVIRONMENT
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch

FLIGHT = 4


def no_op(config: dict) -> None:
    """A trial without work."""
    tune.report({"residue": 0.5, "damage": 0.5, FINAL: True})


def main() -> None:
    """Runs the trials and prints times and sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trials", type=int, nargs="?", default=1000)
    parser.add_argument("--period", default=ENVIRONMENT["TUNE_GLOBAL_CHECKPOINT_S"])
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT | {"TUNE_GLOBAL_CHECKPOINT_S": arguments.period})
    snapshots: list[float] = []
    save = TuneController.save_to_dir

    def timed(controller: TuneController) -> None:
        started = time.perf_counter()
        save(controller)
        snapshots.append(time.perf_counter() - started)

    TuneController.save_to_dir = timed
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        search = ParetoSearch(
            Path(folder) / "study.journal", "tune", [spaces.load("rgd")], arguments.trials, None, 0, "random"
        )
        tuner = tune.Tuner(
            tune.with_resources(no_op, {"cpu": 0.25}),
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=arguments.trials, max_concurrent_trials=FLIGHT, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="search", storage_path=str(Path(folder) / "tune"), verbose=0),
        )
        started, cpu = time.perf_counter(), time.process_time()
        tuner.fit()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        state = list((Path(folder) / "tune" / "search").glob("experiment_state*.json"))
        size = sum(f.stat().st_size for f in state)
    ray.shutdown()
    print(
        json.dumps(
            {
                "trials": arguments.trials,
                "period_s": arguments.period,
                "seconds_per_trial": round(seconds / arguments.trials, 3),
                "driver_cpu_s_per_trial": round(cpu / arguments.trials, 3),
                "snapshots": len(snapshots),
                "snapshots_s": round(sum(snapshots), 2),
                "longest_snapshot_s": round(max(snapshots), 2),
                "snapshot_mb": round(size / 1e6, 2),
                "machine": machine() | {"ray": ray.__version__},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
