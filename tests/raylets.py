"""A cluster of real raylets on this machine, whose nodes can be killed, added and drained, and sweeps that run on it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from small import log, start

from raysweep.engine.cluster import ENVIRONMENT

MEMORY = 80 * 2**20  # of an object store, the least that Ray allows
QUICK = {  # Ray declares a node dead after some 5 s, instead of 30 s
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


class Raylets:
    """A cluster of a control node and the given others, by role. address: for RAY_ADDRESS."""

    def __init__(self, *roles: str, cpus: int = 2):
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "labels": {"role": "control"},
                "object_store_memory": MEMORY,
                "include_dashboard": False,
                "_system_config": QUICK,
            },
        )
        self.nodes = [self.add(role, cpus) for role in roles]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def environment(self) -> dict[str, str]:
        """For commands of Ray that act on this cluster."""
        return os.environ | {"RAY_ADDRESS": self.address}

    def add(self, role: str, cpus: int = 2) -> ray._private.node.Node:
        """A further node."""
        return self.cluster.add_node(
            num_cpus=cpus, labels={"role": role}, resources={"trial_slot": 16}, object_store_memory=MEMORY
        )

    def kill(self, node) -> None:
        """The sudden death of a node: its raylet and its workers."""
        self.cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def raylets(*roles: str, cpus: int = 2) -> Iterator[Raylets]:
    """A cluster for the block, whose processes know what a run's processes need to know."""
    before = dict(os.environ)
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    made = Raylets(*roles, cpus=cpus)
    try:
        yield made
    finally:
        made.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def sweep(folder: Path, made: Raylets, *arguments: str):
    """Starts the sweep of `sweep.yaml` in a folder on the cluster."""
    return start(folder, folder / "cache", "run", "sweep.yaml", *arguments, RAY_ADDRESS=made.address)


def await_line(process, folder: Path, text: str, count: int = 1, seconds: float = 300) -> None:
    """Waits until the sweep has said something so many times."""
    deadline = time.monotonic() + seconds
    while log(folder).count(text) < count:
        assert process.poll() is None, log(folder)
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.2)
