"""Methods, evaluators, attacks and tasks of other packages: discovered, checked, run, hashed, and recorded."""

from __future__ import annotations

import json
import os
import sys

import pytest
from click.testing import CliRunner
from foreign import FILES, install
from small import log, start
from tiny import ROOT, tiny_task

from raysweep import plugins
from raysweep.auditing.request import AuditRequest
from raysweep.cli import main
from raysweep.config.reader import load
from raysweep.config.schema import AuditConfig, ConfigError, Tier
from raysweep.engine.checks import resolve_sweep
from raysweep.registry import PluginError, UnknownName, names, resolve
from raysweep.results.recompute import Audit, Recomputer
from raysweep.results.verify import compare_code
from raysweep.rundir import RunDir
from raysweep.storage.schemas import ROWS, SCORES, TRIALS, read_table, write_table
from raysweep.tasks.base import StoredTask

CONFIG = """
name: odd
task: {name: patches}
methods: [nudge]
oracles: 1
search: {trials: 2, window: 2}
audit:
  top: 1
  rounds: 1
  probe: {samples: 40, class_samples: 20, noises: 12, loss_noises: 10, loss_images: 2, timesteps: 4, groups: 10}
  audit: {samples: 60, class_samples: 20, noises: 20, loss_noises: 20, loss_images: 2, timesteps: 4,
          checks: [altered, brightness, classifier, brittle, denoising, fidelity, generation, reconstruction]}
  finalists: 1
  durability: {checks: [planted], noises: 20}
resources: {slots: 1, auditors: 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, cache):
    """A folder in which a sweep ran that uses the package's parts for everything that they cover."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd.yaml").write_text(CONFIG)
    path = os.pathsep.join([str(install(folder / "site")), str(ROOT)])
    run = start(folder, cache, "run", "odd.yaml", PYTHONPATH=path)
    assert run.wait(timeout=400) == 3, log(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_sweep_of_another_packages_parts_ends_as_any_other(home, monkeypatch):
    """One check breaks on the oracle: the view that needs it is left out, trials go on, and the end says so."""
    run = RunDir(home / "runs" / "odd")
    trials = read_table(run.trials, TRIALS).to_pylist()
    assert [(t["method"], t["state"]) for t in trials] == [("nudge", "COMPLETE")] * 2
    rows = read_table(run.rows, ROWS).to_pylist()
    assert {r["status"] for r in rows if r["check"] == "brightness"} == {"ok"}
    manifest = run.read_manifest()
    assert manifest["state"] == "incomplete"
    assert sorted(manifest["incomplete"]) == ["audit of oracle-0: brittle", "probe of oracle-0: brittle"]
    assert manifest["plugins"] == {
        "method nudge": "oddments 1.5",
        "evaluator brightness": "oddments 1.5",
        "evaluator brittle": "oddments 1.5",
        "evaluator planted": "oddments 1.5",
        "task patches": "oddments 1.5",
    }
    views = {v["metric"]: v for v in json.loads(run.anchors("audit").read_text())["views"]}
    assert views["brittle.mean"]["reason"] == "not measured on oracle-0 (failed: RuntimeError: oracles break it)"
    assert views["reconstruction.correlation"]["informative"]
    front = json.loads(run.front_json.read_text())
    finalist = next(n for n in front["verdicts"] if n.endswith("nudge"))
    assert front["verdicts"][finalist]["sentence"] == "merely avoided: planted at once (+1.00)"
    assert front["verdicts"]["oracle-0"]["label"] == "not tested"  # it has no other oracle to be compared with
    assert run.report.is_file()
    # without the package the run can be read but not resumed
    monkeypatch.chdir(home)
    assert run.sweep().task.seed == 0
    told = CliRunner().invoke(main, ["status", "odd", "--json"])
    assert json.loads(told.output)["exit_code"] == 3
    assert CliRunner().invoke(main, ["report", "odd"]).exit_code == 0
    refused = CliRunner().invoke(main, ["run", "odd.yaml"])
    assert refused.exit_code == 2
    assert "task.name: 'patches' is not a task" in refused.output


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package, importable in this process, in a separate folder."""
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    yield tmp_path / "site" / "oddments"
    plugins.files_digest.cache_clear()


def test_an_edited_package_changes_the_keys_of_what_it_makes(installed):
    def codes():
        plugins.files_digest.cache_clear()
        return (
            plugins.audit_code(["brightness", "loss"]),
            plugins.audit_code(["loss"]),
            plugins.method_code("nudge"),
            plugins.method_code("finetune"),
        )

    before = codes()
    assert before[0] != before[1]
    (installed / "numbers.py").write_text("SCALE = 2.0\n")  # no entry point leads to this file itself
    after = codes()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False, True]
    (installed / "table.json").write_text("{}")
    assert codes()[0] != after[0]
    (installed / "__pycache__").mkdir()
    (installed / "__pycache__" / "check.pyc").write_bytes(b"0")
    assert codes() == codes()
    assert plugins.method_code("nudge") != plugins.method_code("neggrad")


def test_a_change_of_ours_reaches_the_methods_that_import_it(installed, monkeypatch):
    assert plugins.methods_behind(plugins.external("method")["nudge"][0]) == ["methods.neggrad"]
    before = plugins.method_code("nudge")
    monkeypatch.setattr("raysweep.storage.code_digests.training_code", lambda module: f"another {module}")
    assert plugins.method_code("nudge") != before


def test_the_settings_of_another_packages_task_are_checked_like_ours(installed, tmp_path):
    assert "patches" in names("task")
    sweep = load(None, ("task=patches", "task.base_steps=30", "methods=[nudge]", "search.trials=1"))
    assert (sweep.task.base_steps, sweep.resolved()["task"]) == (30, {"name": "patches", "seed": 0, "base_steps": 30})
    assert load(None, ("task=patches", "task.base_steps=31")).digest != load(None, ("task=patches",)).digest
    assert sweep.task.build().views[-1] == "brittle.mean"
    path = tmp_path / "odd.yaml"
    path.write_text("task:\n  name: patches\n  base_step: 3\n")
    with pytest.raises(ConfigError, match=r"odd\.yaml:3: task\.base_step: unknown key; did you mean 'base_steps'"):
        load(path)
    path.write_text("task:\n  name: patches\n  base_steps: 0\n")
    with pytest.raises(ConfigError, match=r"odd\.yaml:3: task\.base_steps: .* greater than or equal to 1 \(got 0\)"):
        load(path)


def test_a_package_that_is_installed_changes_no_sweep_that_does_not_name_it(installed):
    sweep = load(None)
    assert not {"brightness", "brittle", "planted"} & set(sweep.audit.checks_for(sweep.task.build()))
    with pytest.raises(UnknownName):
        plugins.audit_code(["absent"])


FAULTS = {
    "broken": ("method", "import nothing_of_this_name\n", "cannot be imported: ModuleNotFoundError"),
    "plain": ("evaluator", "class Plain:\n    name = 'plain'\n", r"is not a subclass of evaluators\.base\.Evaluator"),
    "renamed": (
        "method",
        "from methods.neggrad import NegGrad\nclass Renamed(NegGrad):\n    pass\n",
        "has the name 'neggrad'",
    ),
    "half": (
        "evaluator",
        "from evaluators.base import Evaluator\nclass Half(Evaluator):\n    name = 'half'\n",
        "lacks rows, scores, values, directions, needs, cost",
    ),
    "mild": (
        "evaluator",
        "from evaluators.classifier import Classifier\nclass Mild(Classifier):\n    name = 'mild'\n    reach = 'input'\n",
        "must have the metric excess",
    ),
    "odd_reach": (
        "evaluator",
        "from evaluators.durability import Quantisation\nclass Odd_Reach(Quantisation):\n    name = 'odd_reach'\n    reach = 'x'\n",
        "one of input, weights, base",
    ),
    "dated": (
        "method",
        "from methods.neggrad import NegGrad\nclass Dated(NegGrad):\n    name = 'dated'\n    families = frozenset({'edm'})\n",
        "sets families, which is no longer read: state model_kinds",
    ),
    "strange": (
        "evaluator",
        "from evaluators.classifier import Classifier\nclass Strange(Classifier):\n    name = 'strange'\n"
        "    model_kinds = frozenset({'edm'})\n",
        r"has the model_kinds \['edm'\]; valid: diffusion, contrastive",
    ),
    "blunt": (
        "evaluator",
        "from evaluators.durability import Quantisation\nclass Blunt(Quantisation):\n    name = 'blunt'\n",
        "is an attack and lacks reach",
    ),
    "bare": (
        "task",
        "from typing import Literal\nfrom raysweep.tasks.base import TaskSettings\n"
        "class Bare(TaskSettings):\n    name: Literal['bare'] = 'bare'\n",
        "lacks build",
    ),
    "rgd": ("method", "from methods.rgd import RGD as Rgd\n", "offered by raysweep and by theirs_rgd 1.5"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_package_gives_one_message(name, tmp_path, monkeypatch):
    kind, text, message = FAULTS[name]
    package = f"theirs_{name}"
    points = f"[raysweep.{kind}s]\n{name} = {package}.code:{name.title()}\n"
    monkeypatch.syspath_prepend(install(tmp_path / "site", {"__init__.py": "", "code.py": text}, points, package))
    with pytest.raises(PluginError, match=message) as caught:
        resolve(kind, name)
    assert f"{package} 1.5" in str(caught.value)
    listed = CliRunner().invoke(main, ["ls", f"{kind}s", "--json"])
    assert listed.exit_code == 0, listed.output
    fault = next(row for row in json.loads(listed.output) if row["name"] == name)
    assert f"{package} 1.5" in fault["fault"]


def test_faults_are_reported_before_a_run_begins(tmp_path, monkeypatch):
    files = FILES | {"check.py": "raise OSError('no such library')\n"}
    monkeypatch.syspath_prepend(
        install(
            tmp_path / "site",
            {k: v.replace("oddments", "evens") for k, v in files.items()},
            "[raysweep.evaluators]\ndull = evens.check:Dull\n",
            "evens",
        )
    )
    with pytest.raises(PluginError, match=r"'dull' of the package evens 1.5 .* OSError: no such library"):
        resolve_sweep(load(None, ("audit.durability.checks=[dull]",)))


def test_a_card_with_checks_of_a_missing_package_says_so(installed, monkeypatch):
    checks = ["brightness", "loss"]
    stated = plugins.audit_code(["brightness"])
    assert compare_code(checks, stated).holds
    monkeypatch.setattr("sys.path", [p for p in sys.path if p != str(installed.parent)])
    unknown = compare_code(checks, stated)
    assert unknown.holds is None
    assert "'brightness' is not a known evaluator" in unknown.detail


def test_the_numbers_of_checks_that_are_not_here_are_not_recomputed(tmp_path):
    """The card of a model that is its own judge, so that none lies beside it."""
    settings = AuditConfig().audit.model_dump(mode="json") | {"checks": ["brightness"], "seed": 2}
    tier = Tier.model_validate(settings, context={"stored": True})
    request = AuditRequest("m", "", None, "digest", "audit", tier, "", "", "task", "digest", str(tmp_path))
    audit = Audit(request, tmp_path / "rows.parquet", tmp_path / "scores.parquet")
    write_table(audit.rows, [], ROWS)
    write_table(audit.scores, [], SCORES)
    again = Recomputer(tiny_task(), None).rows(audit)
    assert again.rows == {"brightness": []}
    assert "'brightness' is not a known evaluator" in again.unknown["brightness"]


def test_a_stored_task_without_its_package_says_what_is_missing():
    with pytest.raises(ValueError, match="'theirs' is a task of a package that is not installed"):
        StoredTask(name="theirs", anything=3).build()
