"""The nodes that a launcher file allows, and expectations that it cannot meet."""

from __future__ import annotations

import copy

import pytest
from tiny import ROOT

from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.arrival import expected_nodes as expected_by
from raysweep.engine.expectation import expected_nodes, nodes_of_file
from raysweep.engine.resources import Node

TRAIN, AUDIT = Node(192, 8, "train"), Node(192, 8, "audit")
LAUNCHER = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 16}, "labels": {"role": "control"}},
        "train": {"resources": {"CPU": 192, "GPU": 8}, "labels": {"role": "train"}, "min_workers": 0, "max_workers": 3},
        "audit": {"resources": {"CPU": 192, "GPU": 8}, "labels": {"role": "audit"}, "max_workers": 1},
        "spot": {"resources": {"CPU": 192, "GPU": 8}, "labels": {"role": "train"}, "max_workers": 0},
    },
}


def changed(path, value):
    """The launcher file with one value set, or removed if it is `...`."""
    launcher = copy.deepcopy(LAUNCHER)
    *parents, last = path.split(".")
    level = launcher
    for key in parents:
        level = level[key]
    if value is ...:
        del level[last]
    else:
        level[last] = value
    return launcher


def test_the_nodes_of_a_launcher_file():
    assert expected_nodes(LAUNCHER) == [TRAIN] * 3 + [AUDIT]
    without = changed("available_node_types.train.max_workers", ...)
    without["available_node_types"]["audit"]["max_workers"] = 0
    assert expected_nodes(without) == [TRAIN] * 4  # the global limit, as Ray has it
    assert nodes_of_file(ROOT / "cluster.yaml") == [TRAIN] * 3 + [AUDIT]


def test_the_head_counts_with_gpus_or_alone():
    types = {"head": {"resources": {"CPU": 8, "GPU": 1}}, "more": {"resources": {"CPU": 8}, "max_workers": 1}}
    launcher = {"head_node_type": "head", "available_node_types": types}
    assert expected_nodes(launcher) == [Node(8, 1), Node(8)]
    types["head"]["resources"] = {"CPU": 8}
    assert expected_nodes(launcher) == [Node(8)]
    types["more"]["max_workers"] = 0
    assert expected_nodes(launcher) == [Node(8)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("available_node_types", ..., "cluster.yaml: not a launcher file: available_node_types: a mapping is needed"),
        ("available_node_types.train", 3, "available_node_types.train: a mapping is needed, got 3"),
        ("available_node_types.train.resources", {}, r"train.resources: CPU and GPU are needed"),
        ("available_node_types.train.resources", {"CPU": "many"}, r"train.resources: .*many"),
        ("available_node_types.train.max_workers", "3", r"train.max_workers: '3'; a whole number"),
        ("available_node_types.train.max_workers", -1, r"train.max_workers: -1; a whole number"),
        ("available_node_types.spot.max_workers", 2, r"max_workers is 4, but its node types allow 6 workers together"),
        ("available_node_types.train.labels.role", "trian", r"'trian' is not a role; did you mean 'train'\?"),
        ("head_node_type", "haed", r"head_node_type: 'haed' is not a node type; did you mean 'head'\?"),
    ],
)
def test_a_launcher_file_that_says_too_little(path, value, message):
    with pytest.raises(ConfigError, match=message):
        expected_nodes(changed(path, value))


def test_a_file_of_another_kind(tmp_path):
    for content in (None, ["a", "list"], {"just": "this"}):
        with pytest.raises(ConfigError, match=r"^other.yaml: not a launcher file"):
            expected_nodes(content, "other.yaml")
    (tmp_path / "torn.yaml").write_text("head_node_type: [")
    for name in ("torn.yaml", "absent.yaml"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as a launcher file"):
            nodes_of_file(tmp_path / name)


def test_expectations_in_a_config():
    """By role, or as the path of a launcher file."""
    roles = load(None, ("resources.expect={train: {nodes: 2, cpus: 8, gpus: 1}, any: {nodes: 1, cpus: 4}}",))
    assert expected_by(roles) == [Node(8, 1, "train")] * 2 + [Node(4)]
    assert expected_by(load(None, (f"resources.expect={ROOT / 'cluster.yaml'}",))) == [TRAIN] * 3 + [AUDIT]
    assert expected_by(load(None)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{trian: {nodes: 1, cpus: 8}}", r"resources\.expect\.trian: unknown key; did you mean 'train'\?"),
        ("{audit: {nods: 1, cpus: 8}}", r"resources\.expect\.audit\.nods: unknown key; did you mean 'nodes'\?"),
        ("{train: {nodes: 0, cpus: 8}}", r"resources\.expect\.train\.nodes: .*greater than or equal to 1 \(got 0\)"),
        ("5", r"resources\.expect: .*\(got 5\)"),
    ],
)
def test_a_mistake_in_an_expectation_names_its_key(value, message):
    with pytest.raises(ConfigError, match=message):
        load(None, (f"resources.expect={value}",))
