"""Presets of the papers' experiments: complete, planned without their files, and run on miniatures."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from small import recipe_of, start

from raysweep.cli import main
from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Sweep
from raysweep.engine.expectation import nodes_of_file
from raysweep.engine.resources import make_plan
from raysweep.models import families, stored
from raysweep.planning import disk, forecast
from raysweep.rundir import RunDir
from raysweep.search.spaces import load as load_space
from raysweep.storage.schemas import ROWS, read_table

PAPERS = {"rgd": "2412.07808", "siss": "2503.01034", "sfd": "2409.11219", "slug": "2407.11867"}
ALL = presets.names()


def at_paper_scale(name: str) -> Sweep:
    return load(presets.path_of(name), (), absent=True)


def setting(data, key: str):
    """The value at a dotted key of a config as plain data; a number is an index into a list."""
    for part in key.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_every_paper_has_presets():
    assert {name.split("-")[0] for name in ALL} == set(PAPERS)
    listed = json.loads(call("ls", "presets", "--json").output)
    assert [row["name"] for row in listed] == ALL
    assert all(PAPERS[row["name"].split("-")[0]] in row["paper"] for row in listed)


@pytest.mark.parametrize("name", ALL)
def test_a_preset_is_complete(name):
    about, sweep = presets.about(name), at_paper_scale(name)
    assert (sweep.name, sweep.preset, sweep.scale) == (name, name, "paper")
    assert about.protocol
    assert about.differs
    for method in sweep.methods:
        space = load_space(method, sweep.spaces.get(method), forecast.images_task(sweep).kind)
        assert space.parameters
        if method != "sld":
            assert all("scaled" not in point.source for point in space.points), "the settings of the embedded models"
    data = sweep.resolved()
    for bring in about.bring:
        assert setting(data, bring.key), f"{bring.key} is not a setting of {name}"
        value = "[brought]" if bring.key == "oracle_models" else "brought"
        changed = load(presets.path_of(name), (f"{bring.key}={value}",), absent=True).resolved()
        assert "brought" in str(setting(changed, bring.key)), f"{bring.key} cannot be set"
    needed = {
        "task.base",
        "task.train",
        "task.holdout",
        *(f"audit.audit.weights.{w}" for w in data["audit"]["audit"]["weights"]),
    }
    brought = {bring.key for bring in about.bring}
    assert all(any(key.startswith(prefix) for key in brought) for prefix in needed)


@pytest.mark.parametrize("name", ALL)
def test_a_dry_run_needs_none_of_the_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("run", name, "--dry-run")
    assert result.exit_code == 0, result.output
    lines = [line.split(None, 1) for line in result.output.splitlines()]
    plan: dict[str, list[str]] = {}
    for topic, *text in lines:
        plan.setdefault(topic, []).append(" ".join(text))
    assert len(plan["missing"]) == len(presets.about(name).bring)
    assert "cluster.yaml: 24 trials at once" in plan["cluster"][0]
    assert "of an H100" in plan["cost"][0]
    assert "GB" in plan["memory"][0]
    assert re.match(r"at most [\d.]+ [MGT]B of candidates and checkpoints during the search \(", plan["disk"][0])
    assert not list(tmp_path.iterdir())
    refused = call("validate", name)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


def test_a_copy_of_a_preset_is_planned_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = presets.path_of("siss-mnist-tshirt").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("name: siss-mnist-tshirt", "name: mine"))
    result = call("run", "mine.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "missing   task.base" in result.output


def test_a_mistake_in_the_description_of_a_copy(tmp_path):
    text = presets.path_of("siss-mnist-tshirt").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace('{key: task.base, what: "', '{key: task.base, wath: "'))
    with pytest.raises(ConfigError, match=r"mine.yaml:11: about\.bring\.0\.wath: unknown key; did you mean 'what'\?"):
        load(tmp_path / "mine.yaml", (), absent=True)


def test_only_presets_are_planned_without_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("run", "audit.audit.weights.sscd=none.pt", "--dry-run")
    assert result.exit_code == 2
    assert f"weights.sscd: {tmp_path / 'none.pt'} does not exist" in result.output


def test_existing_files_are_not_reported_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    sweep = at_paper_scale("siss-mnist-tshirt")
    missing = {bring.key for bring, _ in forecast.missing(sweep, presets.about(sweep.preset))}
    assert missing == {"task.base", "task.train.mix.1.root"}


def test_cost_grows_with_the_work():
    name = "siss-celebahq"
    about, few = presets.about(name), at_paper_scale(name)
    network = forecast.footprint.of(about.network)
    spaces = [load_space(m, few.spaces.get(m)) for m in few.methods]
    more = load(presets.path_of(name), ("search.trials=120",), absent=True)
    half = load(presets.path_of(name), ("train.precision=bf16",), absent=True)
    a, b, c = (forecast.forecast(s, network, spaces) for s in (few, more, half))
    assert a.training == 0
    assert b.search == pytest.approx(2 * a.search, rel=0.05)
    assert c.search < a.search
    assert all(c.memory[m] < a.memory[m] for m in a.memory)
    assert (
        a.memory["siss"] > a.memory["siss_no_is"] > a.memory["finetune"]
    )  # the former keeps a graph for two gradients


def test_the_disk_of_a_search_does_not_grow_with_its_trials():
    """Candidates of Stable Diffusion: the weights that train, for a number of trials that only settings and cluster bound."""

    def planned(*overrides: str) -> disk.Disk:
        sweep = load(presets.path_of("rgd-sd-artist"), overrides, absent=True)
        plan = make_plan(nodes_of_file(forecast.cluster_file()), sweep)
        return disk.of(sweep, plan, candidate, 2 * candidate, 0)

    candidate = 3.4e9
    many, more = planned("search.trials=1000"), planned("search.trials=10000")
    assert many == more
    assert (more.kept, more.flying) == (4 * 8, 24 + 8 + 1)
    assert more.search == (32 + 33 + 24 * (2 + 6)) * candidate < 1e12
    assert more.after == 8 * candidate
    everything = planned("search.trials=10000", "candidates.keep=all")
    assert everything.after == 10000 * candidate == everything.kept * candidate
    assert "at most 874 GB of candidates and checkpoints during the search (32 candidates, 33 more" in more.in_words(
        "audited"
    )
    network = forecast.footprint.of(presets.about("rgd-sd-artist").network)
    assert 0 < network.adaptable < network.trained(("unet",)) < network.trained(())


def test_a_users_own_launcher_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    types = {"head": {"resources": {"CPU": 8}}, "gpus": {"resources": {"CPU": 64, "GPU": 4}, "max_workers": 2}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"head_node_type": "head", "available_node_types": types}))
    assert "cluster.yaml: 6 trials at once" in call("run", "siss-mnist-tshirt", "--dry-run").output
    (tmp_path / "cluster.yaml").write_text("just: this")
    result = call("run", "siss-mnist-tshirt", "--dry-run")
    assert result.exit_code == 2
    assert "cluster.yaml: not a launcher file" in result.output


def test_only_presets_have_a_scale(tmp_path):
    with pytest.raises(ConfigError, match="only presets have one"):
        load(None, ("scale=tiny",))
    text = presets.path_of("siss-mnist-tshirt").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("name: siss-mnist-tshirt", "name: mine"))
    with pytest.raises(ConfigError, match="huge"):
        load(tmp_path / "mine.yaml", ("scale=huge",), absent=True)
    broken = yaml.safe_load(text)
    del broken["about"]["title"]
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(ConfigError, match="title"):
        load(tmp_path / "broken.yaml", (), absent=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ALL)
def test_a_preset_runs_to_its_report(tmp_path: Path, cache: Path, name: str):
    process = start(tmp_path, cache, "run", name, "scale=tiny")
    code, out = process.wait(1400), (tmp_path / "out.log").read_text()
    assert code == 0, out
    run = tmp_path / "runs" / f"{name}-tiny"
    page = html.unescape((run / "report.html").read_text())
    assert presets.about(name).title in page
    assert "which say nothing about the paper" in page
    assert json.loads((run / "front.json").read_text())["points"]
    rows = read_table(run / "rows", ROWS).to_pylist()
    assert not [r for r in rows if r["status"] == "failed"]
    assert load(recipe_of(run, tmp_path)).digest == RunDir(run).in_force().digest
    kept = [p.parent for p in (run / "candidates").glob("*/raysweep.json") if stored.is_kept(p.parent)]
    assert kept
    for candidate in kept:
        card = json.loads((candidate / "raysweep.json").read_text())
        assert families.load(candidate).digest == card["outcome"]["digest"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({"x": {"tree": {"syles": []}}}, "tiny.make.x: tree cannot work with"),
        ({"x": {"forest": None}}, "tiny.make.x: takes one of"),
        ({"x": {}}, "tiny.make.x: takes one of"),
        ({"x": {"files": {"images": "many"}}}, "tiny.make.x: files cannot work with"),
    ],
)
def test_mistakes_in_miniatures_are_named_by_their_key(make, message, tmp_path):
    data = yaml.safe_load(presets.path_of("siss-celebahq").read_text())
    data["tiny"]["make"] = make
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "mine.yaml", ("scale=tiny", f"cache={tmp_path}"))
