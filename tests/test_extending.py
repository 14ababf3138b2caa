"""The worked examples of docs/extending.md, read from the page: installed as a package, run, and added to raysweep itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
import yaml
from finished import front, row, run
from foreign import install
from small import log, start
from tiny import ROOT, SCHEDULER, batch_for, tiny_model

from evaluators.judge import Judge
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Tier
from raysweep.engine.checks import refusals, resolve_sweep
from raysweep.export.modelcard import loading_line
from raysweep.models import families
from raysweep.registry import PluginError, resolve, unserved
from raysweep.report.page import added_sections
from raysweep.rundir import RunDir
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.storage.schemas import ROWS, read_table
from raysweep.tasks.task import Task

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(BLOCK.findall(PAGE))
FILES = {path.removeprefix("extras/"): text for path, text in EXAMPLES.items() if path.startswith("extras/")}


def entry_points() -> str:
    """The entry points of the page's pyproject.toml, as an installed package lists them."""
    groups = tomllib.loads(EXAMPLES["pyproject.toml"])["project"]["entry-points"]
    return "".join(f"[{g}]\n" + "".join(f"{n} = {t}\n" for n, t in points.items()) for g, points in groups.items())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder in which the package is installed."""
    return install(tmp_path_factory.mktemp("site"), {"__init__.py": ""} | FILES, entry_points(), "extras")


@pytest.fixture(autouse=True)
def _installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def tier() -> Tier:
    sizes = {"groups": 5, "samples": 20, "class_samples": 20, "noises": 5, "loss_noises": 5}
    return Tier(seed=1, judge="probe", checks=("brightness", "second_look"), **sizes)


@pytest.fixture
def lines() -> Task:
    return load(None, ("task=lines", "methods=[dim]")).task.build()


def test_the_table_counts_the_files_of_the_examples():
    table = re.findall(r"^\| \[.+?\]\(#([\w-]+)\) \| (\d) \| (\d): (.+) \|$", PAGE, re.MULTILINE)
    sections = {
        t.lower().replace(" ", "-"): text for t, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    }
    assert len(table) == 7
    for anchor, files, inside, paths in table:
        assert len(BLOCK.findall(sections[anchor])) == int(files)
        named = re.findall(r"`(.+?)`", paths)
        assert len(named) == int(inside)
        assert all((ROOT / path).exists() for path in named if "NAME" not in path)


def test_the_method_takes_steps_within_its_space(class_task):
    method, space = resolve("method", "dim"), spaces.load("dim")
    assert refusals(method, class_task) == []
    assert [p.name for p in space.parameters] == ["lr"]
    trained = method(tiny_model(class_task), method.Hyperparameters(lr=1e-3, **space.fixed), {}, class_task.goal)
    for step in range(3):
        scalars = trained.step(batch_for(trained, class_task, step))
    assert torch.isfinite(scalars["loss"])
    assert trained.finish()["distance"] > 0


def test_the_check_and_the_attack_measure_a_model(class_task, tier):
    judge = Judge(1, 6)
    one, *oracles = (subject_of(tiny_model(class_task, seed=k), class_task, judge, tier) for k in range(3))
    one.peers = {f"oracle-{k}": oracle for k, oracle in enumerate(oracles)}
    result = measure(one, tier)
    assert {metric.status for metric in result.rows} == {"ok"}
    assert {"brightness.mean", "second_look.excess@steps x2", "second_look.excess@steps x4"} <= set(result.values)


def test_models_of_the_family_are_built_saved_recognised_trained_and_measured(tmp_path, class_task, tier):
    plain = {"unet": {"sample_size": 4, "num_class_embeds": 7}, "scheduler": SCHEDULER, "null_label": 6}
    task = replace(class_task, family="stack", model=plain)
    model = families.build(task, 0)
    model.save(tmp_path)
    again = families.load(tmp_path)
    assert (again.family, task.model_kind, again.digest) == ("stack", "diffusion", model.digest)
    assert (
        loading_line(resolve("family", "stack"), tmp_path)
        == 'extras.stack.Stack.from_pretrained(FOLDER, subfolder="unet")'
    )
    assert unserved(resolve("method", "sld"), "stack") == [
        "it needs a model that offers safe sampling, and stack models do not"
    ]
    method = resolve("method", "finetune")
    trained = method(again, method.Hyperparameters(lr=1e-3, steps=2, batch_size=8), {}, task.goal)
    trained.step(batch_for(trained, task))
    assert again.digest != model.digest
    result = measure(subject_of(again, task, Judge(1, 6), tier), tier)
    assert result.values["brightness.mean"] is not None
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    with pytest.raises(ValueError, match=r"holds a SomePipeline; supported: .*StackPipeline"):
        families.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("family", "faulty = object()\n", r"is not an instance of raysweep\.records\.Family"),
        (
            "family",
            FILES["family.py"].replace('("StackPipeline",)', "()") + "faulty = STACK\n",
            "no folder would be recognised",
        ),
        (
            "family",
            FILES["family.py"].replace("diffusion", "odd") + "faulty = STACK\n",
            "model_kind 'odd'; valid: diffusion, contrastive",
        ),
        ("sampler", "faulty = 3\n", "is not a function"),
    ],
)
def test_a_record_or_function_that_cannot_be_used_is_one_message(kind, text, message, tmp_path, monkeypatch):
    group = {"family": "families", "sampler": "samplers"}[kind]
    package = f"theirs_{tmp_path.name}"
    points = f"[raysweep.{group}]\nfaulty = {package}.code:faulty\n"
    monkeypatch.syspath_prepend(install(tmp_path, {"__init__.py": "", "code.py": text}, points, package))
    with pytest.raises(PluginError, match=message):
        resolve(kind, "faulty")


def test_a_task_on_the_family_depends_on_the_packages_code(class_task, monkeypatch):
    def on_stack() -> str:
        return replace(class_task, family="stack").digest

    before = on_stack()
    monkeypatch.setattr("raysweep.tasks.task.family_code", lambda family: "changed")
    assert on_stack() != before


def test_the_task_is_built_and_its_sweep_fits_together(tmp_path, lines):
    assert (lines.kind, lines.thing, lines.family) == ("class", "class 0", "pixel-ddpm")
    assert lines.splits["train"].x.shape == (160, 1, 8, 8)
    (tmp_path / "lines.yaml").write_text(EXAMPLES["lines.yaml"])
    task, (space,) = resolve_sweep(load(tmp_path / "lines.yaml"))
    assert (task.digest, space.method) == (lines.digest, "dim")


def test_the_sampler_suggests_the_same_again_and_learns(tmp_path):
    def suggestions(folder):
        folder.mkdir()
        search, values = ParetoSearch(folder / "journal", "s", [spaces.load("dim")], 6, 2, 0, "greedy"), []
        while isinstance(config := search.suggest(f"t{len(values)}"), dict):
            values.append(config["hyperparameters"]["lr"])
            result = {"residue": values[-1], "damage": values[-1], FINAL: True}
            search.on_trial_complete(f"t{len(values) - 1}", result)
        return values

    first = suggestions(tmp_path / "a")
    assert len(set(first)) == 6
    assert first == suggestions(tmp_path / "b")


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ConfigError, match=r"search\.sampler: .*'greed' is not a sampler; did you mean 'greedy'\?"):
        load(None, ("search.sampler=greed",))


def test_the_section_is_in_the_report_and_a_broken_one_says_so(tmp_path, monkeypatch):
    folder = run(tmp_path, front([row("000-rgd", 0.1, 0.1)]))
    (section,) = added_sections(folder)
    assert (section.name, section.provider) == ("training-time", "extras 1.5")
    assert "<th>seconds of training</th>" in section.html
    monkeypatch.setattr("extras.section.pq.read_table", lambda *a, **k: 1 / 0)
    (section,) = added_sections(folder)
    assert section.html == "It could not be made: ZeroDivisionError: division by zero"


INSIDE = """
import torch
from raysweep.config.reader import load
from raysweep.engine.checks import resolve_sweep
from raysweep.models import families
from raysweep.registry import attacks, reach_of, resolve
assert reach_of("second_look") == "input" and "second_look" in attacks()
sweep = load(None, ("task=lines", "methods=[dim]", "search.sampler=greedy", "search.trials=2"))
assert "brightness" in sweep.audit.audit.checks
task, (space,) = resolve_sweep(sweep)
assert (task.name, space.method) == ("lines", "dim")
assert families.handle("stack").family == "stack"
for kind, name in (("evaluator", "brightness"), ("evaluator", "second_look"), ("sampler", "greedy")):
    assert resolve(kind, name).__module__.split(".")[0] in ("evaluators", "raysweep")
"""


def test_inside_raysweep_the_examples_touch_no_more_files_than_the_page_says(tmp_path):
    """All except the section, whose two files are a template and the function that fills it."""
    for package in ("raysweep", "methods", "evaluators", "search_spaces"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    added = {
        "methods/dim.py": FILES["method.py"],
        "search_spaces/dim.yaml": yaml.safe_dump({"method": "dim", **resolve("method", "dim").space}),
        "evaluators/brightness.py": FILES["check.py"],
        "evaluators/second_look.py": FILES["attack.py"].replace('    reach = "input"', "   "),
        "raysweep/models/stack.py": FILES["stack.py"].replace("extras.stack", "raysweep.models.stack"),
        "raysweep/tasks/lines.py": FILES["task.py"],
    }
    for path, text in added.items():
        (tmp_path / path).write_text(text)
    samplers, registry = tmp_path / "raysweep" / "search" / "samplers.py", tmp_path / "raysweep" / "registry.py"
    samplers.write_text(samplers.read_text() + FILES["sampler.py"].partition('"""\n')[2])
    record = FILES["family.py"].partition("STACK = ")[2].replace("extras.stack", "raysweep.models.stack")
    rows = {
        "METHODS": '"dim": "methods.dim:Dim",',
        "EVALUATORS": '"brightness": Check("evaluators.brightness:Brightness"),\n'
        '    "second_look": Check("evaluators.second_look:SecondLook", reach="input"),',
        "FAMILIES": f'"stack": {record},',
        "SAMPLERS": '"greedy": "raysweep.search.samplers:greedy",',
        "TASKS": '"lines": "raysweep.tasks.lines:Lines",',
    }
    text = registry.read_text()
    for table, line in rows.items():
        assert f"\n{table} = {{\n" in text
        text = text.replace(f"\n{table} = {{\n", f"\n{table} = {{\n    {line}\n")
    registry.write_text(text)
    alone = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", INSIDE], check=True, env=alone, cwd=tmp_path, timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_sweep_of_all_of_them(tmp_path, cache, site):
    (tmp_path / "lines.yaml").write_text(EXAMPLES["lines.yaml"])
    sizes = (
        "audit.audit.samples=60",
        "audit.audit.class_samples=40",
        "audit.probe.samples=40",
        "audit.rounds=1",
        "audit.top=1",
        "audit.finalists=1",
        "audit.durability.class_samples=40",
        "resources.slots=1",
        "resources.auditors=1",
    )
    process = start(tmp_path, cache, "run", "lines.yaml", *sizes, PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]))
    assert process.wait(timeout=450) == 0, log(tmp_path)
    folder = RunDir(tmp_path / "runs" / "lines")
    assert {"brightness", "second_look"} <= {
        r["check"] for r in read_table(folder.rows, ROWS).to_pylist() if r["status"] == "ok"
    }
    assert set(folder.read_manifest()["plugins"]) == {
        "method dim",
        "evaluator brightness",
        "evaluator second_look",
        "task lines",
        "sampler greedy",
    }
    assert "<h2>training-time</h2>" in folder.report.read_text()
