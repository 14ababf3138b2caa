"""What a slot costs the head: memory and CPU time of everything on the driver's node, in sweeps of the same trials with few and many slots.

    python benchmarks/head.py                # 2 and 12 slots, 24 trials each; prints one JSON object

On real raylets of this machine: a node with the driver and the desks, one that trains and one that audits. The head's memory is the sum
of what its processes have for themselves, at its highest in the search; its CPU time is that of the whole sweep. Each slot brings
another trial in flight, whose function is on another node. What differs between the two sweeps is divided by the slots.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ground import machine
from ray.cluster_utils import Cluster

from raysweep.engine.cluster import ENVIRONMENT

SEARCHING = " trial "  # a line of the log
SWEEP = """
name: head
task: {name: digits-picture, base_steps: 70}
methods: [neggrad, siss_no_is]
spaces:
  neggrad: {steps: {logint: [20, 40]}}
  siss_no_is: {steps: {logint: [20, 50]}}
oracles: 2
audit:
  top: 1
  rounds: 1
  finalists: 0
  probe: {samples: 40, class_samples: 20, noises: 12, loss_noises: 10, loss_images: 2, timesteps: 4, groups: 10}
  audit: {samples: 60, class_samples: 20, noises: 20, loss_noises: 20, loss_images: 2, timesteps: 4}
"""


def node(cluster: Cluster, cpus: int, role: str, **options: Any) -> Any:
    """A further node of a cluster."""
    return cluster.add_node(num_cpus=cpus, labels={"role": role}, object_store_memory=80 * 2**20, **options)


def sweep(slots: int, trials: int) -> dict[str, float]:
    """Memory and CPU time of the head in a sweep with so many slots."""
    cluster = Cluster(initialize_head=False)
    head = node(cluster, 0, "control", include_dashboard=False)
    node(cluster, slots, "train", resources={"trial_slot": 4 * slots})
    node(cluster, 2, "audit")
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "head.yaml").write_text(SWEEP)
            log = Path(folder) / "log"
            command = [sys.executable, "-m", "raysweep", "run", "head.yaml", f"search.trials={trials}"]
            command += [f"resources.slots={slots}", "resources.auditors=2", f"search.window={trials}"]
            with log.open("w") as out:
                environment = os.environ | {"RAY_ADDRESS": cluster.address}
                process = psutil.Popen(
                    command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                )
                memory, seconds, count = 0.0, {}, 0
                while process.poll() is None:
                    used = 0.0
                    processes = of_node(head, process)
                    for p in processes:
                        with contextlib.suppress(psutil.Error):
                            times = p.cpu_times()
                            seconds[p.pid] = times.user + times.system
                            used += p.memory_full_info().uss / 2**20
                    if SEARCHING in log.read_text():
                        memory, count = max(memory, used), max(count, len(processes))
                    time.sleep(0.5)
            text = log.read_text()
            assert process.returncode == 0 or text.count(SEARCHING) >= trials, text
    finally:
        cluster.shutdown()
    return {"slots": slots, "head_mb": round(memory), "head_cpu_s": round(sum(seconds.values()), 1), "processes": count}


def of_node(head: Any, driver: psutil.Process) -> list[psutil.Process]:
    """The processes of the head: Ray's services, the workers that its raylet started, and the driver."""
    roots = [psutil.Process(i.process.pid) for infos in head.all_processes.values() for i in infos]
    found = {p.pid: p for root in (*roots, driver) for p in (root, *root.children(recursive=True))}
    return list(found.values())


def main() -> None:
    """Measures two sweeps and prints their difference per slot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs=2, default=(2, 12))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    results = []
    for _ in range(options.repeats):
        few, many = (sweep(slots, options.trials) for slots in options.slots)
        more = many["slots"] - few["slots"]
        per_slot = {
            "mb": round((many["head_mb"] - few["head_mb"]) / more, 1),
            "cpu_s": round((many["head_cpu_s"] - few["head_cpu_s"]) / more, 2),
        }
        results.append({"few": few, "many": many, "per_slot": per_slot})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"sweeps": results, "machine": machine() | {"ray": ray.__version__}}, indent=1))


if __name__ == "__main__":
    main()
