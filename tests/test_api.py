"""The Python API: the examples of its page run unchanged, and its functions equal workers and auditors, without Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small import SMALL, environment
from tiny import ROOT, tiny_model, tiny_task

import raysweep
from raysweep.config.schema import ConfigError
from raysweep.registry import UnknownName
from raysweep.storage.seeds import derive_seed
from raysweep.train.jobs import Job
from raysweep.train.loop import Resident, run

SIZES = {"samples": 20, "groups": 5, "loss_images": 3, "timesteps": 2, "injection_t": 10, "recall_t": (5,)}


@pytest.fixture
def task():
    return tiny_task()


def test_importing_loads_nothing_heavy():
    """So importing takes a few hundredths of a second."""
    code = (
        "import sys, raysweep\n"
        "assert not {'torch', 'ray', 'optuna', 'numpy', 'pyarrow', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert set(dir(raysweep)) == set(raysweep.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unlearning_and_measuring_work_without_ray_and_optuna(tmp_path):
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "optuna"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(ROOT / "tests")!r})
import raysweep
from tiny import tiny_model, tiny_task

task = tiny_task()
model = raysweep.unlearn(tiny_model(task), task, "neggrad", steps=1)
table = raysweep.measure(model, task, ["loss"], membership_t=(5, 9), **{SIZES!r})
assert "ok" in table["status"].to_pylist()
assert not {{"ray", "optuna"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("method", "settings"), [("rgd", {"lam": 5, "steps": 3}), ("salun", {"steps": 2})])
def test_unlearn_gives_the_weights_of_a_train_worker(tmp_path, method, settings):
    task = tiny_task("class")
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    base = tiny_model(task, seed=1)
    base.save(tmp_path / "base")
    before = base.digest
    common = {
        "method": method,
        "hyperparameters": settings,
        "task": str(tmp_path / "task"),
        "base": str(tmp_path / "base"),
    }
    prepared = None
    if method == "salun":
        prepared = str(tmp_path / "prepared.safetensors")
        seed = derive_seed("prepare", method)
        preparation = run(Job(id="p", kind="prepare", seed=seed, out=prepared, **common), Resident())
        assert preparation.status == "ok", preparation.reason
    job = Job(id="t", kind="train", seed=7, out=str(tmp_path / "out"), prepared=prepared, **common)
    outcome = run(job, Resident())
    assert outcome.status == "ok", outcome.reason
    steps: list[int] = []
    state = torch.random.get_rng_state()
    model = raysweep.unlearn(base, task, method, seed=7, progress=lambda done, *_: steps.append(done), **settings)
    assert model.digest == outcome.digest != before
    assert base.digest == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert steps[-1] == settings["steps"]
    assert raysweep.unlearn(base, task, method, seed=8, **settings).digest != outcome.digest


def test_retraining_starts_from_new_weights(tmp_path):
    """As the oracles of a sweep, whatever the given model has learned."""
    task = tiny_task("class")
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    for model in (tiny_model(task, seed=1), tiny_model(task, seed=2)):
        assert raysweep.unlearn(model, task, "retrain", seed=7).digest == oracle_digest(tmp_path, task)


def test_retraining_starts_from_the_weights_that_a_task_names(tmp_path):
    tiny_model(tiny_task("class"), seed=3).save(tmp_path / "start")
    task = replace(tiny_task("class"), base=str(tmp_path / "start"), trained=False, recipe={"steps": 2})
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    assert raysweep.unlearn(tiny_model(task, seed=1), task, "retrain", seed=7).digest == oracle_digest(tmp_path, task)


def oracle_digest(folder, task):
    """Hash of the oracle that a train worker makes for the task in folder/task."""
    job = Job(
        id="o",
        kind="train",
        method="retrain",
        hyperparameters=task.recipe,
        seed=7,
        task=str(folder / "task"),
        base=None,
        out=str(folder / "out"),
    )
    outcome = run(job, Resident())
    assert outcome.status == "ok", outcome.reason
    return outcome.digest


def test_the_number_of_threads_changes_nothing(task):
    base, threads = tiny_model(task, seed=1), torch.get_num_threads()
    digests = set()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            digests.add(raysweep.unlearn(base, task, "rgd", lam=5, steps=3, seed=1).digest)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_a_model_with_a_sampler_of_raysweeps_has_no_pipeline(tmp_path):
    from raysweep.results.run import StoredModel

    task = tiny_task("class")
    model = raysweep.unlearn(tiny_model(task, seed=1), task, "sld")
    model.save(tmp_path / "sld")
    with pytest.raises(ValueError, match="is sampled by raysweep's sampler"):
        StoredModel("sld", tmp_path / "sld", "").pipeline()


def test_a_process_that_is_connected_to_ray_keeps_its_connection(monkeypatch, tmp_path):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: pytest.fail("closed the caller's connection"))
    with pytest.raises(ConfigError, match="connected to Ray already"):
        raysweep.run(None, {"storage": tmp_path / "runs", "cache": tmp_path / "cache"})
    assert raysweep.open_run(tmp_path / "runs" / "digits-picture").state == "failed"


def test_a_model_without_a_pipeline_of_diffusers_says_so(tmp_path):
    from raysweep.results.run import StoredModel

    (tmp_path / "model_index.json").write_text('{"_class_name": "EDMPipeline"}')
    with pytest.raises(ValueError, match="diffusers has no pipeline for it"):
        StoredModel("base", tmp_path, "").pipeline()


def test_impossible_requests_are_refused_in_one_sentence(task):
    model = tiny_model(task)
    with pytest.raises(UnknownName, match="'rgdd' is not a known method; did you mean 'rgd'"):
        raysweep.unlearn(model, task, "rgdd")
    with pytest.raises(ValueError, match="lamm: not a hyperparameter of rgd; did you mean 'lam'"):
        raysweep.unlearn(model, task, "rgd", lamm=5)
    with pytest.raises(ValueError, match="lam: Input should be greater than or equal to 0"):
        raysweep.unlearn(model, task, "rgd", lam=-1)
    with pytest.raises(ValueError, match="sfd_two_stage cannot serve the task"):
        raysweep.unlearn(model, task, "sfd_two_stage")
    with pytest.raises(ConfigError, match="'los' is not an evaluator; did you mean 'loss'"):
        raysweep.measure(model, task, ["los"])
    with pytest.raises(ConfigError, match="samples: Input should be greater than or equal to 20"):
        raysweep.measure(model, task, ["loss"], samples=2)
    with pytest.raises(ConfigError, match="absent: not a run directory"):
        raysweep.open_run("absent")
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        raysweep.load_task("absent.yaml")
    with pytest.raises(ConfigError, match="is not plain data"):
        raysweep.load_task(None, {"task.seed": object()})
    with pytest.raises(ValueError, match="absent: "):
        raysweep.load_model("absent")
    with pytest.raises(ValueError, match="valid: trials, front, rows, scores, metrics"):
        raysweep.columns("absent")
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = raysweep.absent


def test_settings_of_a_sweep_change_by_dotted_keys(tmp_path):
    from raysweep.config.reader import changed, load

    sweep = changed(load(None), {"search.trials": 12, "storage": tmp_path})
    assert (sweep.search.trials, sweep.storage) == (12, tmp_path)
    with pytest.raises(ConfigError, match=r"search\.trial"):
        changed(sweep, {"search.trial": 12})


def test_every_name_is_documented_and_every_column_described():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in raysweep.__all__:
        assert getattr(raysweep, name).__doc__
        assert f"raysweep.{name}(" in page or name == "Run"
    for table in ("trials", "front", "rows", "scores", "metrics"):
        assert all(raysweep.columns(table).values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_examples_of_the_page_run_as_they_stand(tmp_path, cache):
    """In a separate process, on a small sweep; the last one, an audit, starts Ray a second time."""
    (tmp_path / "sweep.yaml").write_text(SMALL.replace("rounds: 2", "rounds: 1"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL)
    assert "raysweep.audit(" in blocks[-1]
    (tmp_path / "page.py").write_text("\n".join([*blocks, CHECKS]))
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment(cache), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    card = json.loads(next((tmp_path / "runs").glob("*/cards/*/card.json")).read_text())
    assert card["subject"].startswith("unlearned@")


CHECKS = """
from pathlib import Path

assert run.state in ("done", "incomplete") and run.report.is_file()
assert len(trials) == 2 and set(trials.columns) == set(raysweep.columns("trials"))
assert {"base", "oracle-0", "destroyed"} <= set(front["trial"])
assert set(metrics["tier"]) == {"audit"} and {"", "base", "oracle"} == set(metrics["paired_with"])
assert set(losses.to_pandas()["subject"]) == {"base"} and len(losses)
assert all(name.startswith("loss.") for name in losses["score"].to_pylist())
assert pipeline.unet is not None
assert unlearned.digest == raysweep.load_model("unlearned").digest != base.digest
assert "ok" in table["status"].to_pylist()
assert raysweep.open_run("api").path == run.path
assert run.task.digest == task.digest
"""
