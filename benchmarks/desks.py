"""How many jobs and audits a second the broker and the audit manager hand out, with the real actors and work that does nothing.

    python benchmarks/desks.py               # 3 rounds of 3,000 tasks for each desk

All tasks are submitted at once and wait at the desk; workers in two processes take them one after another. The audit manager flushes
its log to disk before it answers. Meanwhile the desk is asked for its census, which must be answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from raysweep.auditing.manager import AuditManager
from raysweep.dispatch.holder import Holder
from raysweep.engine.cluster import ENVIRONMENT
from raysweep.rundir import versions
from raysweep.train.broker import NAMESPACE, Broker
from raysweep.train.jobs import Job, Outcome

THREADS = 8  # workers in a process
AUDIT: dict[str, Any] = {"status": "ok", "reason": "", "seconds": 0.0, "images": 1, "failed": [], "limit": ""}


@ray.remote(num_cpus=0)
class Workers:
    """Workers that do nothing, or sleep, each in a thread of its own."""

    def serve(
        self,
        desk: ActorHandle,
        name: str,
        outcome: Any,
        workers: int = THREADS,
        length: Callable[[Any], float] = lambda task: 0.0,
    ) -> None:
        """Works until the desk closes. length: of a task, in seconds."""

        def work(worker: str) -> None:
            holder: Holder[Any, Any] = Holder(desk, worker)
            while (task := holder.next()) is not None:
                time.sleep(length(task))
                holder.finish(outcome)

        threads = [threading.Thread(target=work, args=(f"{name}-{k}",)) for k in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@ray.remote(num_cpus=0, max_concurrency=10)
class Callers:
    """Submits tasks and waits for all of them."""

    async def submit(self, desk: ActorHandle, tasks: list[tuple[str, Any]]) -> float:
        started = time.perf_counter()
        await asyncio.gather(*[desk.submit.remote(key, task) for key, task in tasks])
        return time.perf_counter() - started


def measure(desk: ActorHandle, tasks: list[list[tuple[str, Any]]], outcome: Any) -> dict[str, Any]:
    """Tasks per second of each round, the slowest census, and the memory of the desk's process."""
    workers = [Workers.remote() for _ in range(2)]
    services = [w.serve.remote(desk, f"w{k}", outcome) for k, w in enumerate(workers)]
    callers, rates, slowest = Callers.remote(), [], 0.0
    warm_up, *rounds = tasks  # processes start in the first round
    ray.get(callers.submit.remote(desk, warm_up))
    for batch in rounds:
        running = callers.submit.remote(desk, batch)
        while not ray.wait([running], timeout=0.2)[0]:
            asked = time.perf_counter()
            ray.get(desk.census.remote())
            slowest = max(slowest, time.perf_counter() - asked)
        rates.append(len(batch) / ray.get(running))
    memory = next(
        p.memory_info().rss for p in psutil.process_iter() if any(type_of(desk) in part for part in p.cmdline()[:1])
    )
    ray.get(desk.close.remote())
    ray.get(services)
    return {
        "per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "n": len(rates)},
        "slowest_census_s": slowest,
        "desk_mb": memory / 2**20,
    }


def type_of(desk: ActorHandle) -> str:
    """The name that Ray gives the desk's process."""
    return "ray::Broker" if "Broker" in repr(desk) else "ray::AuditManager"


def main() -> None:
    """Measures both desks and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        ray.init(
            address="local",
            log_to_driver=False,
            logging_level="ERROR",
            namespace=NAMESPACE,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            runtime_env={"env_vars": ENVIRONMENT | {"PYTHONPATH": root}},
        )
        keys = [[f"{r}-{k}" for k in range(options.tasks)] for r in range(options.rounds + 1)]
        jobs = [[(k, Job(k, "train", "m", {"lr": 1e-3}, 0, "t", "b", k)) for k in batch] for batch in keys]
        result = {
            "jobs": measure(Broker.remote(), jobs, Outcome("ok")),
            "audits": measure(
                AuditManager.remote(folder, 3),
                [[(k, SimpleNamespace(tier_name="probe")) for k in batch] for batch in keys],
                AUDIT,
            ),
            "machine": f"{os.cpu_count()} CPUs, {platform.machine()}",
            "versions": {k: v for k, v in versions().items() if k in ("python", "ray")},
        }
        ray.shutdown()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
