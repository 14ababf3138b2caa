"""Real sweeps of trials that sleep, to compare `simulation.py` with: the searcher, Tune, both desks and their workers are the run's own."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from desks import AUDIT, Workers
from ray import tune
from simulation import METHODS, Simulation

from raysweep.auditing.manager import AuditManager
from raysweep.config.sections import SearchConfig
from raysweep.engine.cluster import ENVIRONMENT
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.window import resolve_window
from raysweep.train.broker import NAMESPACE, Broker
from raysweep.train.jobs import Job, Outcome

NODES, GPUS = 2, 4  # 4 slots and 4 auditors
CONCURRENT = NODES * GPUS + 1
RANDOM_MS = 3.0  # suggestion and completion of a trial drawn at random
# the first trials, in which processes start, and how long each of them trains and is probed
WARM, WARM_S = 24, (8.0, 1.0)
CASES = {"lengths decide": (6.0, 0.9, 80), "Tune's loop decides": (0.04, 0.01, 500)}  # (train, probe, trials)


class Warmed(Simulation):
    """A simulation whose first trials have the length WARM_S."""

    def __init__(self, *arguments: Any):
        self.made: list[tuple[float, float]] = []  # by place
        super().__init__(*arguments)

    def lengths(self) -> tuple[float, float]:
        self.made.append(WARM_S if len(self.made) < WARM else super().lengths())
        return self.made[-1]


def real(lengths: list[tuple[float, float]], slots: int, auditors: int) -> float:
    """The seconds that a real sweep takes after its first trials have ended."""

    # in here, so that its process does not import this module, and torch with it
    def trial(config: dict[str, Any]) -> None:
        train, probe = config["lengths"][config["place"]]
        name = config["trial"]
        ray.get(config["broker"].submit.remote(name, Job(name, "train", "m", {"seconds": train}, 0, "t", "b", name)))
        audit = SimpleNamespace(tier_name="probe", hyperparameters={"seconds": probe})
        ray.get(config["manager"].submit.remote(name, audit))
        tune.report({"residue": train % 1, "damage": probe % 1, FINAL: True})

    with tempfile.TemporaryDirectory() as folder:
        broker, manager = Broker.remote(), AuditManager.remote(folder, 3)
        services = [
            Workers.remote().serve.remote(
                desk, f"{desk_name}{k}", outcome, count // 2, lambda t: t.hyperparameters["seconds"]
            )
            for desk_name, desk, count, outcome in (
                ("slot", broker, slots, Outcome("ok")),
                ("auditor", manager, auditors, AUDIT),
            )
            for k in range(2)
        ]
        trials = len(lengths)
        window = resolve_window(SearchConfig(trials=trials), CONCURRENT)
        search = ParetoSearch(
            Path(folder) / "study.journal",
            "check",
            [spaces.load(m) for m in METHODS],
            trials,
            window,
            0,
            "random",
            most=lambda: CONCURRENT,
        )
        ended: list[float] = []

        class Ends(tune.Callback):
            def on_trial_complete(self, *_: Any, **__: Any) -> None:
                ended.append(time.perf_counter())

        tune.Tuner(
            tune.with_resources(trial, {"cpu": 0, "trial_slot": 1}),
            param_space={"broker": broker, "manager": manager, "lengths": lengths},
            tune_config=tune.TuneConfig(search_alg=search, num_samples=trials, reuse_actors=True),
            run_config=tune.RunConfig(name="search", storage_path=f"{folder}/tune", verbose=0, callbacks=[Ends()]),
        ).fit()
        ray.get([broker.close.remote(), manager.close.remote()])
        ray.get(services)
        for actor in (broker, manager):
            ray.kill(actor)
    return ended[-1] - ended[WARM - 1]


def checked(options: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Each case simulated and run, for each seed."""
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, f"{root}/benchmarks"])
    ray.init(
        address="local",
        resources={"trial_slot": CONCURRENT},
        log_to_driver=False,
        logging_level="ERROR",
        namespace=NAMESPACE,
        include_dashboard=False,
        runtime_env={"env_vars": ENVIRONMENT | {"PYTHONPATH": paths}},
    )
    rows = []
    for case, (train_s, probe_s, trials) in CASES.items():
        for seed in range(seeds):
            of_case = options | {
                "nodes": NODES,
                "gpus": GPUS,
                "losses": 0.0,
                "start-s": 0.0,
                "search-ms": RANDOM_MS,
                "train-s": train_s,
                "probe-s": probe_s,
            }
            with tempfile.TemporaryDirectory() as folder:
                simulation = Warmed(of_case | {"trials": trials + WARM}, Path(folder), seed)
                simulation.run()
            simulated = simulation.endings[-1] - simulation.endings[WARM - 1]
            seconds = real(simulation.made, simulation.slots, simulation.auditors)
            rows.append(
                {
                    "case": case,
                    "seed": seed,
                    "trials": trials,
                    "simulated_s": round(simulated, 1),
                    "real_s": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    ray.shutdown()
    return {"options": {k: options[k] for k in ("cv", "tune-ms", "desk-ms")}, "rows": rows}
