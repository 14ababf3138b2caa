"""Asks the autoscaler for the nodes that a run expects, and waits for the first that can work."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray.autoscaler.sdk import request_resources

from raysweep.config.schema import Sweep
from raysweep.engine.cluster import RunFailed, alive_nodes
from raysweep.engine.events import Events
from raysweep.engine.expectation import nodes_of_file
from raysweep.engine.resources import AUDIT, TRAIN, Node, Plan, refit

LOOK_S = 2.0
SAY_S = 30.0


def expected_nodes(sweep: Sweep) -> list[Node]:
    """The nodes of `resources.expect`; none if nothing is expected. Raises ConfigError for a launcher file that cannot be used."""
    expect = sweep.resources.expect
    if expect is None:
        return []
    if isinstance(expect, Path):
        return nodes_of_file(expect)
    groups = ((TRAIN, expect.train), (AUDIT, expect.audit), ("", expect.any))
    return [Node(g.cpus, g.gpus, role) for role, g in groups if g is not None for _ in range(g.nodes)]


@contextlib.contextmanager
def requested(nodes: Sequence[Node]) -> Iterator[None]:
    """Has Ray's autoscaler provide nodes, and keep them, during the block; without an autoscaler this has no effect."""
    if not nodes:
        yield
        return
    request_resources(
        bundles=[{"CPU": n.cpus} | ({"GPU": n.gpus} if n.gpus else {}) for n in nodes],
        bundle_label_selectors=[{"role": n.role} if n.role else {} for n in nodes],
    )
    try:
        yield
    finally:
        request_resources(bundles=[])


def await_nodes(plan: Plan, expected: Sequence[Node], sweep: Sweep, events: Events) -> list[Node]:
    """Waits until a slot and an auditor of a plan have room; the nodes that are there then. The others are used when they join.

    Raises RunFailed after `resources.wait_s`.
    """
    began, said = time.monotonic(), -SAY_S
    while True:
        nodes = alive_nodes()
        if refit(plan, nodes, sweep) is not None:
            return nodes
        waited = time.monotonic() - began
        missing = f"expected: {_kinds(expected)}; there: {_kinds(nodes) or 'none'}"
        if waited > sweep.resources.wait_s:
            raise RunFailed(
                f"no node that can work has joined the cluster within {sweep.resources.wait_s:g} s (resources.wait_s); {missing}; "
                "see `ray status` for what the autoscaler does"
            )
        if waited - said >= SAY_S:
            events.say("cluster", f"waiting for nodes, {waited:.0f} of {sweep.resources.wait_s:g} s; {missing}")
            said = waited
        time.sleep(LOOK_S)


def _kinds(nodes: Sequence[Node]) -> str:
    """Nodes for people, those alike together."""
    alike = Counter((f"{n.role} node" if n.role else "node", n.cpus, n.gpus) for n in nodes)
    return ", ".join(
        f"{count} {name}{'s' * (count > 1)} with {cpus:g} CPU" + f" and {gpus:g} GPU" * bool(gpus)
        for (name, cpus, gpus), count in alike.items()
    )
