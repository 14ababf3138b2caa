"""Names, layers and imports: every table entry exists, and imports go one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import yaml
from tiny import ROOT

import search_spaces
from evaluators.base import Evaluator
from evaluators.durability import Durability
from methods.base import Method
from raysweep.config.presets import path_of
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.cached_jobs import prepares
from raysweep.engine.checks import check_training
from raysweep.models import families
from raysweep.registry import EVALUATORS, FAMILIES, METHODS, TASKS, UnknownName, attacks, names, resolve
from raysweep.storage.code_digests import code_digest, training_code
from raysweep.train.unlearning import refusals


def test_tables_match_the_files():
    helpers = {"__init__", "base", "gradients", "layers", "losses", "pairing", "partial", "relabelling", "rows"}
    assert set(METHODS) == {p.stem for p in (ROOT / "methods").glob("*.py")} - helpers
    assert set(METHODS) == set(search_spaces.names())
    helpers = {
        "__init__",
        "attacks",
        "base",
        "batches",
        "external",
        "judge",
        "metrics",
        "oracles",
        "rank",
        "statistics",
        "tampering",
    }
    homes = {check.target.partition(":")[0].removeprefix("evaluators.") for check in EVALUATORS.values()}
    assert homes == {p.stem for p in (ROOT / "evaluators").glob("*.py")} - helpers
    assert set(attacks()) == {n for n in EVALUATORS if issubclass(resolve("evaluator", n), Durability)}
    assert set(attacks()) == set(list(EVALUATORS)[-len(attacks()) :])


@pytest.mark.parametrize(("kind", "table", "base"), [("method", METHODS, Method), ("evaluator", EVALUATORS, Evaluator)])
def test_every_name_resolves_to_what_it_says(kind, table, base):
    assert (order := [n for n in table if n not in attacks()]) == sorted(order)
    for name in table:
        found = resolve(kind, name)
        assert issubclass(found, base)
        assert found.name == name
        assert found.__doc__
    assert all(hasattr(resolve("task", name), "build") for name in TASKS)


# Private names of libraries that raysweep uses: file -> name -> the tests that fail if it is removed.
PRIVATE = {
    "methods/gradients.py": {"torch._foreach_lerp_": "test_sfd.py: the moving average against its formula"},
    "raysweep/planning/footprint.py": {
        "_cdata": "test_footprint.py: what stays alive for the backward pass, counted by hand",
        "torch._subclasses.fake_tensor import FakeTensorMode": "test_footprint.py",
    },
    "raysweep/models/text_to_image.py": {
        "p._version": "test_latent.py: prompts are embedded again once weights change"
    },
    "raysweep/models/snapshot.py": {"torch._utils._rebuild_tensor_v2": "test_song.py: names in other packages' files"},
    "raysweep/models/vision_language.py": {
        "vlm._no_split_modules": "test_vlm.py: language models over several devices"
    },
    "raysweep/train/worker.py": {"os._exit": "public in spite of its name"},
    "raysweep/dispatch/holder.py": {"os._exit": "public in spite of its name"},
    "raysweep/engine/cluster.py": {
        "ray._private.state.state.get_draining_nodes": "test_cluster.py: a drained node; nothing public of Ray says which they are"
    },
    "raysweep/search/study.py": {
        "self.planned[place]._trial_id": "test_searcher.py: a study's public methods copy all of its trials at each call",
        "self.study._study_id": "test_searcher.py",
    },
    "raysweep/search/view.py": {"study._storage": "test_searcher.py", "trial._trial_id": "test_searcher.py"},
}


def test_private_names_of_libraries_are_few_and_each_is_in_one_file():
    """An upgrade may change them without notice; each has a test that would notice."""
    leaning: dict[str, set[str]] = {}
    for package in ("raysweep", "methods", "evaluators", "search_spaces"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = []
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
                    parts = [node.attr]
                elif isinstance(node, ast.ImportFrom):
                    parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                elif isinstance(node, ast.Import):
                    parts = [part for alias in node.names for part in alias.name.split(".")]
                if any(part.startswith("_") and not part.startswith("__") for part in parts):
                    leaning.setdefault(path.relative_to(ROOT).as_posix(), set()).add(ast.unparse(node))
    odd = {
        file: sorted(uses)
        for file, uses in leaning.items()
        if not all(any(use.endswith(name) or name.startswith(use) for name in PRIVATE.get(file, ())) for use in uses)
    }
    assert odd == {}
    assert set(PRIVATE) == set(leaning), "no longer used"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_handle_that_says_so(name):
    cls = families.handle(name)
    assert cls.family == name
    assert all(callable(getattr(cls, method)) for method in ("load", "save", "with_net", "fresh"))
    assert callable(getattr(cls, "build", None)) == ("retraining" in FAMILIES[name].abilities)
    assert callable(getattr(cls, "answers", None)) == ("answers" in FAMILIES[name].abilities)
    assert callable(getattr(cls, "attended", None)) == ("cross-attention to prompts" in FAMILIES[name].abilities)
    assert callable(getattr(cls, "encode_image", None)) == (FAMILIES[name].model_kind == "contrastive")


def test_quick_settings_are_some_that_preparing_reads():
    for name in METHODS:
        method = resolve("method", name)
        assert set(method.quick) <= set(method.prepared_by)
        assert bool(method.quick) <= prepares(method)


def test_a_wrong_name_gets_a_suggestion():
    with pytest.raises(UnknownName, match=r"'salum' is not a known method; did you mean 'salun'\?"):
        resolve("method", "salum")


def test_other_packages_add_methods_by_entry_point(tmp_path):
    info = tmp_path / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raysweep.methods]\nextra = extra_method:Extra\n")
    (tmp_path / "extra_method.py").write_text(
        "from methods.finetune import Finetune\nclass Extra(Finetune):\n    name = 'extra'\n"
        "    space = {'space': {'lr': {'log': [1e-4, 1e-3]}}, 'fixed': {'steps': 3}}\n"
    )
    code = (
        "from raysweep.cli.listing import listing; from raysweep.search import spaces\n"
        "row = next(r for r in listing('methods', None) if r['name'] == 'extra'); assert row['external'], row\n"
        "assert spaces.load('extra').parameters[0].name == 'lr'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(f"{tmp_path}:{ROOT}"), timeout=120)


def test_a_method_for_other_models_is_refused_with_every_reason(class_task):
    class TextOnly(Method):
        name = "text_only"
        model_kinds = frozenset({"contrastive"})
        kinds = frozenset({"concept"})
        needs = frozenset({"forget", "prompts"})

    reasons = refusals(TextOnly, class_task)
    assert reasons == [
        "it works on contrastive models, and the task's is pixel-ddpm, a diffusion model",
        "it forgets concept, and the task is of kind 'class'",
        "it needs the prompts set",
    ]


def test_oracles_of_models_that_cannot_be_retrained_must_be_given(class_task):
    task = replace(class_task, family="vlm")
    with pytest.raises(ConfigError, match=r"oracle_models: .* offers retraining, and vlm models do not; name folders"):
        check_training(load(None, ()), task, None)


def test_every_pattern_of_a_code_digest_matches_files():
    """A file that is moved without its pattern would drop out of cache keys, and stale artifacts would be used."""
    with pytest.raises(FileNotFoundError, match=r"raysweep/moved/\*\.py"):
        code_digest("evaluators/*.py", "raysweep/moved/*.py")
    calls = [
        node
        for path in (ROOT / "raysweep").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "code_digest"
    ]
    patterns = {
        ast.literal_eval(argument) for call in calls for argument in call.args if isinstance(argument, ast.Constant)
    }
    assert "evaluators/*.py" in patterns
    for pattern in patterns:
        code_digest(pattern)


def test_other_methods_do_not_make_artifacts_stale(monkeypatch, tmp_path):
    """The code that a method's artifacts depend on is its own, what it imports, the handles and the task."""
    before = {m: training_code(f"methods.{m}") for m in METHODS}
    assert len(set(before.values())) == len(METHODS)
    real, rgd = find_spec, tmp_path / "rgd.py"
    rgd.write_text((ROOT / "methods" / "rgd.py").read_text() + "# changed\n")

    def changed(name):
        spec = real(name)
        if name == "methods.rgd":
            spec.origin = str(rgd)
        return spec

    monkeypatch.setattr("raysweep.storage.code_digests.find_spec", changed)
    training_code.cache_clear()
    after = {m: training_code(f"methods.{m}") for m in METHODS}
    training_code.cache_clear()
    assert {m for m in METHODS if after[m] != before[m]} == {"rgd", "rg"}


def test_methods_and_evaluators_work_without_the_engine():
    modules = [f"methods.{m}" for m in METHODS] + sorted(
        {check.target.partition(":")[0] for check in EVALUATORS.values()}
    )
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n" + (
        "bad = {'ray', 'optuna', 'raysweep', 'search_spaces'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(str(ROOT)), timeout=120)


def test_helper_processes_of_a_run_stay_light():
    """Ray imports these in every trial and helper process; torch there would cost seconds and memory each."""
    code = "import sys, raysweep.engine.trial, raysweep.train.executors, raysweep.auditing.manager\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(str(ROOT)), timeout=120)


def test_the_config_of_a_run_is_read_without_the_libraries_of_training(tmp_path):
    """Every trial's process does so: torch would cost each of them seconds and most of a gigabyte."""
    sweep = load(path_of("siss-mnist-tshirt"), (), absent=True)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sweep.resolved()))
    code = (
        "import sys; from pathlib import Path; from raysweep.rundir import RunDir\n"
        f"sweep = RunDir(Path({str(tmp_path)!r})).sweep(); assert sweep.task.name == 'images'\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(str(ROOT)), timeout=120)


def test_status_needs_neither_ray_nor_torch(tmp_path):
    sweep = load(None, ())
    (tmp_path / "manifest.json").write_text(
        json.dumps({"name": "a", "config_digest": sweep.digest, "state": "running"})
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sweep.resolved()))
    (tmp_path / "audits.jsonl").write_text('{"key": "probe-1", "status": "ok", "failed": {}}\n')
    code = (
        "import sys; from click.testing import CliRunner; from raysweep.cli import main\n"
        f"result = CliRunner().invoke(main, ['status', {str(tmp_path)!r}])\n"
        "assert 'audits 1' in result.output, result.output\n"
        "bad = {'ray', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(str(ROOT)), timeout=120)


def test_processes_load_no_libraries_that_they_do_not_need():
    """A worker that trains a pixel model, and the driver of its sweep, would wait seconds for each of them."""
    code = (
        "import sys, raysweep.engine.trial  # of which each trial has a process\n"
        "bad = {'optuna', 'torch', 'scipy'} & set(sys.modules); assert not bad, bad\n"
        "import raysweep.engine.run, raysweep.train.loop, raysweep.auditing.auditor, raysweep.auditing.measure\n"
        "from raysweep.models import families; families.handle('pixel-ddpm')\n"
        "bad = {'open_clip', 'timm', 'transformers.models.llava'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(str(ROOT)), timeout=120)


def test_import_contracts():
    done = subprocess.run(
        ["lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=_env(str(ROOT))
    )
    assert done.returncode == 0, done.stdout


def test_names_are_listed():
    assert names("method") == sorted(METHODS)


def _env(path: str) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": path, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
