"""The command line: its surface is frozen, errors are one message and exit code 2, nothing is half-written."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from raysweep.cli import main
from raysweep.config.reader import load

SURFACE = {
    "audit": ["MODEL_DIR", "CONFIG", "OVERRIDES", "--base", "--oracle", "--json"],
    "convert": ["SNAPSHOT", "OUT_DIR"],
    "draw": ["MODEL_DIR", "OUT_DIR", "--prompt", "--for", "--count", "--seed", "--steps", "--guidance", "--sort"],
    "doctor": ["--json"],
    "export": ["RUN", "TRIAL", "OUT", "--delta"],
    "init": ["NAME", "MODEL", "TRAIN", "HOLDOUT", "--task"],
    "ls": ["KIND", "NAME", "--json"],
    "patch": ["DELTA_FILE", "MODEL_DIR", "OUT_DIR", "--revert"],
    "report": ["RUNS", "--compare", "--out"],
    "run": ["CONFIG", "OVERRIDES", "--dry-run"],
    "shadows": ["RUN", "TRIAL", "--models", "--json"],
    "show": ["SUBJECTS", "--json"],
    "remake": ["RUN", "TRIAL"],
    "sign": ["CARD", "--key"],
    "status": ["RUN", "--json"],
    "verify": ["CARD", "--task", "--signature-key", "--json"],
    "validate": ["CONFIG", "OVERRIDES", "--json"],
}

ONE = ["validate", "task=digits-class", "search.trials=2"]


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))


def test_the_surface_is_frozen():
    surface = {}
    for name, command in main.commands.items():
        surface[name] = [p.opts[0] if p.param_type_name == "option" else p.name.upper() for p in command.params]
        assert command.help
        assert len(command.help.splitlines()) <= 15
    assert surface == SURFACE


def test_every_command_helps():
    for name in SURFACE:
        result = call(name, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "absent.yaml"], ["absent.yaml", "no such file"]),
        (["run", "search.trails=6"], ["command line", "search.trails", "'trials'"]),
        (["validate", "methods=[salum]"], ["'salun'"]),
        (["validate", "methods=[salun]", "search.trials=2"], ["salun cannot serve", "class"]),
        (["validate", "task.copies=0"], ["forget set is empty"]),
        (["validate", "task=digits-class", "task.forget=11"], ["class 11 is not in the data"]),
        (["validate", "spaces={rgd: {lamda: {log: [1, 2]}}}"], ["lamda", "'lam'"]),
        (["validate", "spaces={rgd: {lam: {log: [2, 1]}}}"], ["inverted"]),
        (["validate", "spaces={rgd: {lam: -1}}"], ["spaces.rgd", "lam", "greater than or equal to 0"]),
        (["validate", "spaces={siss: {lam: 1.5}}"], ["spaces.siss", "lam", "less than or equal to 1"]),
        ([*ONE, "methods=[sfd]", "spaces={sfd: {alpha: 0}}"], ["spaces.sfd", "alpha", "greater than 0"]),
        ([*ONE, "methods=[salun]", "spaces={salun: {fraction: 0}}"], ["spaces.salun", "fraction", "greater than 0"]),
        ([*ONE, "methods=[sfd]", "task.override=3"], ["override", "must differ from the forgotten class 3"]),
        (
            [*ONE, "methods=[slug]", "spaces={slug: {layer: mid_block.resnets.0.conv1.wight}}"],
            ["spaces.slug", "layer", "mid_block.resnets.0.conv1.weight"],
        ),
        ([*ONE, "methods=[esd]", "spaces={esd: {layers: x_strict}}"], ["spaces.esd", "x_strict", "valid: x, u, full"]),
        (
            [*ONE, "methods=[rgd]", "spaces={rgd: {retain_groups: [3]}}"],
            ["retain_groups", "[3]", "not among the retained"],
        ),
        (
            ["validate", "methods=[erasediff]", "search.trials=2", "spaces={erasediff: {target: relabel}}"],
            ["target", "needs classes", "valid here"],
        ),
        (
            [*ONE, "methods=[selective_amnesia]", "spaces={selective_amnesia: {guidance: {uniform: [1, 2]}}}"],
            ["guidance", "decides what is prepared", "fixed or a choice"],
        ),
        (["validate", "methods=[slug]", "search.trials=2"], ["slug cannot serve", "class or concept", "'points'"]),
        (["validate", "resources.slots=500"], ["do not fit"]),
        (["validate", "audit.probe.checks=[fidelity]"], ["missing", "objective"]),
        (["validate", "task.base=nowhere"], ["nowhere"]),
        (["run", "--dry-run", "audit.probe.seed=2", "audit.durability.seed=2"], ["overlap"]),
        (["status", "absent"], ["not a run directory"]),
        (["report", "absent"], ["not a run directory"]),
        (["show", "absent", "000"], ["not a run directory"]),
        (["export", "absent", "000", "out"], ["not a run directory"]),
        (["audit", "absent"], ["absent", "not a diffusers"]),
        (["init", "../x"], ["letters"]),
        (["ls", "nonsense"], ["nonsense"]),
    ],
)
def test_mistakes_exit_2_with_one_message_and_leave_nothing(arguments, parts, tmp_path):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.output
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_validate_prints_the_config_it_read():
    result = call("validate", "name=abc")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("ok: abc")
    data = json.loads(call("validate", "--json").output)
    assert data["config"]["search"]["trials"] == 36


def test_validate_reads_a_base_model(tmp_path, points_task):
    from tiny import tiny_model

    tiny_model(points_task).save(tmp_path / "base")
    result = call("validate", f"task.base={tmp_path / 'base'}")
    assert result.exit_code == 2
    assert "makes images of shape (1, 4, 4)" in result.output
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    result = call("validate", f"task.base={tmp_path / 'base'}")
    assert result.exit_code == 2
    assert "cannot be read" in result.output


def test_an_oracle_of_another_architecture_is_refused(tmp_path):
    from raysweep.models.pixel import PixelDDPM

    task = load(None).task.build()
    PixelDDPM.build(task.model, 1).save(tmp_path / "oracle")
    wide = task.model | {"unet": task.model["unet"] | {"block_out_channels": (24, 48)}}
    PixelDDPM.build(wide, 1).save(tmp_path / "wide")
    assert call("validate", f"oracle_models=[{tmp_path / 'oracle'}]").exit_code == 0
    result = call("validate", f"oracle_models=[{tmp_path / 'oracle'}, {tmp_path / 'wide'}]")
    assert result.exit_code == 2
    assert "wide is of another architecture than the base: conv_in.weight is (24, 1, 3, 3)" in result.output


def test_init_writes_a_config_that_validates_and_explains(tmp_path):
    assert call("init", "mine").exit_code == 0
    assert Path("mine.yaml").read_text().count("#") > 30
    assert call("validate", "mine.yaml").exit_code == 0
    assert call("init", "mine").exit_code == 2


def test_every_kind_is_listed():
    for kind in ("methods", "evaluators", "spaces", "tasks", "runs"):
        rows = json.loads(call("ls", kind, "--json").output)
        assert (len(rows) > 1) == (kind != "runs")
    text = call("ls", "methods").output
    assert "arXiv:2412.07808" in text
    assert re.search(r"^ +name +forgets +images ", text, re.MULTILINE)
    methods = {row["name"]: row for row in json.loads(call("ls", "methods", "--json").output)}
    assert methods["esd"]["images"] == []
    assert methods["finetune"] | {"passes": 3, "images": ["retain"], "external": False} == methods["finetune"]
    searched = {row["name"]: row["searched"] for row in json.loads(call("ls", "spaces", "--json").output)}
    assert searched["finetune"]["lr"]["kind"] == "log"


def test_doctor_reports_every_check():
    result = call("doctor", "--json")
    levels = {finding["name"]: finding["level"] for finding in json.loads(result.output)}
    checked = {"python", "packages", "torch", "memory", "disk", "/dev/shm", "port 8265", "install", "ray token"}
    assert checked <= set(levels)
    assert result.exit_code == (1 if "fail" in levels.values() else 0)


def test_dry_run_starts_nothing_and_names_what_is_not_tested(tmp_path):
    small = ("samples=60", "noises=20", "membership_images=20", "recall_images=4")
    result = call("run", "--dry-run", "search.trials=6", *(f"audit.audit.{setting}" for setting in small))
    assert result.exit_code == 0, result.output
    for part in (
        "nothing was started",
        "untested",
        "about",
        "1 each of",
        "one step",
        "of 6 trials are ahead of results",
    ):
        assert part in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("incomplete", "code"), [([], 0), (["012-rgd: membership"], 3)])
def test_a_missing_check_is_printed_and_exits_3(monkeypatch, tmp_path, incomplete, code):
    import numpy as np
    from finished import trial

    from raysweep.engine.run import Result
    from raysweep.results.front import Front
    from raysweep.rundir import RunDir

    front = Front([], [], np.zeros((0, 0)), 0.5, 0.4, 0.6, 0.5)
    result = Result(RunDir(tmp_path / "x"), front, [trial("000-rgd", "FAIL")], incomplete)
    monkeypatch.setattr("raysweep.engine.run.run_sweep", lambda *_: result)
    answer = call("run")
    assert answer.exit_code == code
    assert ("check missing: 012-rgd: membership" in answer.output) == bool(incomplete)


def test_a_failed_audit_gives_its_reason_where_only_json_is_printed(monkeypatch):
    from raysweep.engine.cluster import RunFailed

    def fail(*_):
        raise RunFailed("no oracle could be trained")

    monkeypatch.setattr("raysweep.engine.audit_model.audit_model", fail)
    result = call("audit", "model", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: no oracle could be trained\n"


def test_a_cluster_that_does_not_answer_is_reported_at_once(monkeypatch):
    with socket.socket() as silent:  # bound, so nothing else can listen on its port
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        result = call("run", "--dry-run")
    assert result.exit_code == 2
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there" in result.output


def test_a_ray_that_does_not_start_fails_the_run_in_one_sentence(tmp_path, monkeypatch):
    def time_out(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", time_out)
    result = call("run")
    assert result.exit_code == 1
    assert "Ray did not start on this machine, which may be too busy: The current node timed out" in result.output
    assert json.loads((tmp_path / "runs" / "digits-picture" / "manifest.json").read_text())["state"] == "failed"

    def refuse(**_):
        raise PermissionError(13, "Permission denied", "/closed/ray")

    monkeypatch.setattr("ray.init", refuse)
    output = call("run").output
    assert "Ray did not start on this machine (temporary files in " in output
    assert "Permission denied: '/closed/ray'" in output
    assert "too busy" not in output
