"""docs/cluster/grafana.json shows metrics that exist: those that raysweep exports, all of them, and some of Ray's."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import ray
from tiny import ROOT

BOARD = json.loads((ROOT / "docs" / "cluster" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """The gauges of raysweep: name -> tags. Ray exports a gauge X as ray_X."""
    gauges = {}
    for path in sorted((ROOT / "raysweep").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Gauge":
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                arguments = dict(zip(("name", "description", "tag_keys"), node.args, strict=False)) | named
                gauges[ast.literal_eval(arguments["name"])] = set(ast.literal_eval(arguments["tag_keys"]))
    return gauges


def test_the_panels_show_what_is_exported():
    shown = {name for text in EXPRESSIONS for name in re.findall(r"\bray_(raysweep_\w+)", text)}
    assert shown == set(exported())
    (run,) = (v for v in BOARD["templating"]["list"] if v["name"] == "run")
    assert run["definition"] == run["query"]["query"] == "label_values(ray_raysweep_trials, run)"


def test_the_docs_name_what_is_exported():
    rows = re.findall(r"^\| (`ray_raysweep.*?) \| (.*?) \|", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE)
    tables = {
        name: set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", tags)))
        for names, tags in rows
        for name in re.findall(r"ray_(raysweep_\w+)", names)
    }
    assert tables == exported()


def test_the_panels_use_tags_that_the_metrics_have():
    gauges = exported()
    for text in EXPRESSIONS:
        for name in re.findall(r"\bray_(raysweep_\w+)", text):
            used = set(re.findall(r"(\w+)=", text))
            grouped = re.search(r"by \(([^)]*)\)", text)
            assert grouped is not None
            assert used | set(grouped.group(1).split(", ")) <= gauges[name], text


def test_metrics_of_ray_are_those_of_its_own_dashboard():
    panels = (
        Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards" / "default_dashboard_panels.py"
    )
    known = set(re.findall(r"\b(?:ray|autoscaler)_\w+", panels.read_text()))
    used = {n for text in EXPRESSIONS for n in re.findall(r"\b(?:ray|autoscaler)_\w+", text) if "raysweep" not in n}
    assert used
    assert used <= known


def test_panels_are_laid_out():
    assert BOARD["schemaVersion"] >= 36
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells = [
        (x, y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # none covers another
    assert max(x for x, _ in cells) < 24
    for panel in BOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"]
