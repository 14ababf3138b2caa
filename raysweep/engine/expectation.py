"""Reads from a Ray launcher file the nodes that its cluster can grow to, so that a run can be planned before they have joined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raysweep.config.schema import ConfigError
from raysweep.engine.resources import AUDIT, TRAIN, Node
from raysweep.registry import suggest

ROLES = (TRAIN, AUDIT)


def nodes_of_file(path: Path) -> list[Node]:
    """`expected_nodes` of a launcher file; raises ConfigError if it cannot be read."""
    try:
        launcher = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a launcher file: {' '.join(str(error).split())}") from error
    return expected_nodes(launcher, str(path))


def expected_nodes(launcher: Any, source: str = "cluster.yaml") -> list[Node]:
    """The nodes that a launcher file allows at most, `max_workers` of each type, in the order of the file.

    The head, which runs the sweep itself, counts if it has GPUs or if there is no other node. launcher: the file's content;
    source: its name in messages. Raises ConfigError if it is not a launcher file, says less than a plan needs, or if its
    global `max_workers` is too small for all of its types together: which nodes come would then depend on chance.
    """
    not_one = f"{source}: not a launcher file"
    types = _mapping(_mapping(launcher, not_one).get("available_node_types"), f"{not_one}: available_node_types")
    head = launcher.get("head_node_type")
    if head not in types:
        raise ConfigError(f"{source}: head_node_type: {head!r} is not a node type{suggest(str(head), list(types))}")
    nodes: list[Node] = []
    for name, kind in types.items():
        where = f"{source}: available_node_types.{name}"
        count = 0 if name == head else _count(_mapping(kind, where), launcher, where)
        nodes += [_worker(kind, where)] * count if count else []
    most = launcher.get("max_workers")
    if isinstance(most, int) and len(nodes) > most:
        raise ConfigError(
            f"{source}: max_workers is {most}, but its node types allow {len(nodes)} workers together; raise it, or set "
            "max_workers of the types that are not to be used to 0"
        )
    where = f"{source}: available_node_types.{head}"
    first = _node(_mapping(types[head], where), where)
    return [first, *nodes] if first.gpus or not nodes else nodes


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value if it is a mapping; raises ConfigError otherwise."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: a mapping is needed, got {value!r}")
    return value


def _count(kind: Mapping[str, Any], launcher: Mapping[str, Any], where: str) -> int:
    """Number of workers of a type that Ray starts at most: without a limit of its own, the global one."""
    most = kind.get("max_workers", launcher.get("max_workers"))
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ConfigError(f"{where}.max_workers: {most!r}; a whole number is needed to know which nodes to expect")
    return most


def _worker(kind: Mapping[str, Any], where: str) -> Node:
    """The node of a worker type, which states its CPUs, and a role that a plan knows or none."""
    node = _node(kind, where)
    if not node.cpus:
        raise ConfigError(
            f"{where}.resources: CPU and GPU are needed to know what its nodes offer, e.g. {{CPU: 192, GPU: 8}}"
        )
    if node.role not in ("", *ROLES):
        raise ConfigError(f"{where}.labels.role: {node.role!r} is not a role{suggest(node.role, list(ROLES))}")
    return node


def _node(kind: Mapping[str, Any], where: str) -> Node:
    resources = _mapping(kind.get("resources", {}), f"{where}.resources")
    role = _mapping(kind.get("labels", {}), f"{where}.labels").get("role", "")
    try:
        return Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), str(role))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.resources: {dict(resources)}: {error}") from error
