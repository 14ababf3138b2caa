"""Paths: relative ones, home folders, links, unwritable folders, long temporary folders, moved run directories."""

from __future__ import annotations

import errno
import json
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from outside import sscd_file
from PIL import Image
from tiny import tiny_config, tiny_task

from raysweep.cli import main
from raysweep.config.reader import load, validate
from raysweep.config.schema import ConfigError
from raysweep.context import Context
from raysweep.engine.checks import resolve_sweep
from raysweep.models.folders import is_hub_id
from raysweep.models.pixel import PixelDDPM
from raysweep.rundir import RunDir
from raysweep.storage import places
from raysweep.storage.cache import cache_folder
from raysweep.storage.files import StoreError
from raysweep.storage.places import PlaceError, absolute, check_writable, out_of_space, ray_folder

TIER = {"samples": 20, "class_samples": 10, "noises": 10, "loss_noises": 10, "groups": 5}


def pictures(folder: Path, first: int) -> None:
    folder.mkdir()
    for k in range(first, first + 24):
        noise = torch.randint(0, 256, (4, 4), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{k:03}.png")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a base, an oracle, images and a config that names them relative to itself; the working directory."""
    for name, seed in (("base", 0), ("oracle", 1)):
        PixelDDPM.build(tiny_config(), seed).save(tmp_path / name)
    pictures(tmp_path / "train", 0)
    pictures(tmp_path / "held", 100)
    sscd_file(tmp_path / "weights.pt")
    config = {
        "name": "here",
        "methods": ["neggrad"],
        "search": {"trials": 1},
        "oracle_models": ["oracle"],
        "cache": "cache",
        "task": {
            "name": "images",
            "base": "base",
            "train": {"folder": "train", "label": None},
            "forget": {"keys": ["000.png"]},
            "holdout": {"folder": "held", "label": None},
        },
        "audit": {"probe": TIER, "audit": TIER | {"weights": {"sscd": "weights.pt"}}, "durability": TIER},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSWEEP_CACHE", raising=False)
    return tmp_path


def every_path(data: object) -> list[str]:
    """All strings of a config that name something of the project."""
    if isinstance(data, dict):
        return [p for value in data.values() for p in every_path(value)]
    if isinstance(data, list):
        return [p for value in data for p in every_path(value)]
    known = ("base", "oracle", "train", "held", "weights.pt", "cache")
    return [data] if isinstance(data, str) and "/" in data and data.rsplit("/", 1)[-1] in known else []


def test_relative_paths_mean_the_same_in_every_process(project, monkeypatch):
    sweep = load(Path("c.yaml"))
    task, _ = resolve_sweep(sweep)
    monkeypatch.chdir("/")  # as a worker's
    stored = validate(sweep.resolved(), "stored", stored=True)
    assert stored == sweep
    paths = every_path(sweep.resolved())
    assert sorted(paths) == [str(project / n) for n in ("base", "cache", "held", "oracle", "train", "weights.pt")]
    assert task.base == str(project / "base")
    assert resolve_sweep(stored)[0].digest == task.digest


def test_sources_prompts_and_caches_are_also_absolute(project, monkeypatch):
    prompts = {"file": "p.csv"}
    task = {
        "name": "images",
        "kind": "concept",
        "base": "base",
        "forget": {"labels": ["a"]},
        "search_prompts": prompts,
        "train": {"mix": [{"parquet": "p"}, {"shards": "d/{0..1}.tar"}, {"torchvision": "MNIST", "root": "r"}]},
        "holdout": {"parquet": "s3://bucket/p"},
        "audit_prompts": {"mix": [prompts]},
        "clip": "openai/clip",
    }
    settings = validate({"task": task}, "here").task
    assert [str(s) for s in settings.train.mix][:2] == [str(project / "p"), str(project / "d/{0..1}.tar")]
    assert settings.train.mix[2].root == project / "r"
    assert (settings.holdout.parquet, settings.clip) == ("s3://bucket/p", "openai/clip")
    assert settings.search_prompts.file == settings.audit_prompts.mix[0].file == project / "p.csv"
    monkeypatch.setenv("RAYSWEEP_CACHE", "kept")
    assert cache_folder(None) == project / "kept"
    monkeypatch.setenv("HOME", str(project))
    assert absolute("~/kept") == project / "kept"
    assert validate({"storage": "~/runs"}, "here").storage == project / "runs"


def test_links_stay_links(project):
    (project / "link").symlink_to("base")
    (project / "other").symlink_to("oracle")
    sweep = load(Path("c.yaml"), ("task.base=link", "oracle_models=[other]"))
    assert sweep.task.base == str(project / "link")
    resolve_sweep(sweep)


def test_a_missing_home_folder_is_reported(monkeypatch):
    with pytest.raises(ConfigError, match=r"storage: ~nobody-here/x: there is no home folder"):
        validate({"storage": "~nobody-here/x"}, "here")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    result = CliRunner().invoke(main, ["ls", "methods"])
    assert (result.exit_code, result.output.splitlines()) == (
        2,
        ["error: this user has no home folder: set HOME to a folder that can be written, for example HOME=/tmp"],
    )


def test_folders_that_cannot_be_written_are_reported_before_anything_starts(project, monkeypatch):
    (project / "file").write_text("")
    for key in ("storage", "cache"):
        with pytest.raises(ConfigError, match=f"{key}: s3:/+bucket/runs: is a URI, and a folder is needed; mount that"):
            validate({key: "s3://bucket/runs"}, "here")
        sweep = load(Path("c.yaml"), (f"{key}={project / 'file' / 'x'}",))
        with pytest.raises(ConfigError, match=rf"file is not a folder; choose another {key}"):
            RunDir.of(sweep).check(sweep)
    closed = project / "closed"
    closed.mkdir()
    monkeypatch.setattr(places.os, "access", lambda path, mode: Path(path) != closed)  # root may write anywhere
    with pytest.raises(PlaceError, match=r"closed/a: cannot be made, because .*closed cannot be written; do this"):
        check_writable(closed / "a", "do this")
    with pytest.raises(PlaceError, match=r"closed: cannot be written; do this"):
        check_writable(closed, "do this")
    monkeypatch.setenv("RAY_TMPDIR", str(closed))
    monkeypatch.setattr(places, "SOCKET_BYTES", 500)
    with pytest.raises(PlaceError, match=r"Ray's temporary files: .*set RAY_TMPDIR"):
        ray_folder()
    assert not (closed / "a").exists()
    assert stat.S_ISDIR(closed.stat().st_mode)


def test_temporary_folders_too_long_for_sockets_are_refused(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 50)
    with pytest.raises(PlaceError, match=r"TMPDIR=/tmp/x+: is too long for Ray, .* RAY_TMPDIR=/tmp"):
        ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert ray_folder() == Path("/tmp")


def test_timesteps_beyond_the_models_schedule_are_refused(project):
    short = tiny_config() | {"scheduler": tiny_config()["scheduler"] | {"num_train_timesteps": 100}}
    PixelDDPM.build(short, 0).save(project / "base")
    with pytest.raises(ConfigError, match=r"audit.probe.injection_t: 600 is no step .*; valid: 0 to 99"):
        resolve_sweep(load(Path("c.yaml")))
    few = {"injection_t": 60, "membership_t": [20], "recall_t": [50]}
    fitting = tuple(f"audit.{tier}.{k}={v}" for tier in ("probe", "audit", "durability") for k, v in few.items())
    PixelDDPM.build(short, 1).save(project / "oracle")
    resolve_sweep(load(Path("c.yaml"), fitting))
    with pytest.raises(ConfigError, match=r"task.steps: 101 is more than the 100 steps"):
        resolve_sweep(load(Path("c.yaml"), (*fitting, "task.steps=101")))


def test_external_networks_are_checked_before_anything_starts(project):
    (project / "weights.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"^audit.audit.weights.sscd: .*weights.pt: cannot be read as SSCD"):
        resolve_sweep(load(Path("c.yaml")))


def test_oracles_are_checked_before_anything_starts(project):
    with pytest.raises(ConfigError, match=f"^oracle_models: {project / 'none'}: not a diffusers pipeline folder"):
        resolve_sweep(load(Path("c.yaml"), ("oracle_models=[none]",)))


@pytest.mark.parametrize(("classes", "fits"), [(6, False), (7, True)])
def test_a_model_needs_a_null_class_besides_the_tasks_classes(tmp_path, classes, fits):
    from raysweep.engine.model_checks import check_model

    config = tiny_config()
    config["unet"]["num_class_embeds"] = classes
    PixelDDPM.build(config | {"null_label": classes - 1}, 0).save(tmp_path / "m")
    task = tiny_task("class")
    if fits:
        assert check_model(str(tmp_path / "m"), task)
        return
    with pytest.raises(
        ConfigError, match=r"knows 6 class indices .*, of which 5 stands for no class, and the task has 6"
    ):
        check_model(str(tmp_path / "m"), task)


def test_a_moved_run_directory_is_read_from_its_new_path(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    context = Context(
        run=str(old),
        run_id="r",
        task_digest="t",
        quality="q",
        validity="v",
        base="b",
        base_digest="d",
        oracles={},
        judges={},
        prepared={},
        cache="c",
    )
    context.save()
    old.rename(new)
    assert Context.load(str(new)).folder.path == new
    assert json.loads(RunDir(new).context.read_text())["run"] == str(old)


def test_notes_about_folders_are_shown_once_and_plainly(capsys):
    from raysweep.cli.common import quiet_libraries
    from raysweep.models.weights import ReadOtherwise, warn

    before = warnings.showwarning
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("always")
        warn("m: read as half")
        warn("m: read as half")
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
    assert warnings.showwarning is before
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "warning: m: read as half"
    assert "RuntimeWarning: something else" in shown[1]
    assert issubclass(ReadOtherwise, UserWarning)


@pytest.mark.parametrize("name", ["é" * 300, "a" * 5000, "x/" * 3000, "a\0b", "b" * 300 + "/model"])
def test_names_that_cannot_be_paths_are_refused(name):
    assert not is_hub_id(name)
    with pytest.raises(PlaceError, match="cannot be a path"):
        absolute(name)


class Remote(Exception):
    """As Ray's errors, which carry the error of another process."""

    def __init__(self, cause: Exception):
        super().__init__("a task failed")
        self.cause = cause


def test_a_full_disk_is_recognised_behind_other_errors(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    stored = StoreError("cannot write /data/run/a.json: No space left on device")
    stored.__cause__ = full
    advice = "; free some space there, and run the same command again to resume: nothing that had ended is lost"
    assert out_of_space(Remote(stored)) == f"cannot write /data/run/a.json: No space left on device{advice}"
    assert (
        out_of_space(OSError(errno.EDQUOT, "Disk quota exceeded", "/home/b")) == f"/home/b: Disk quota exceeded{advice}"
    )
    outer = RuntimeError("the search ended")
    outer.__context__ = full
    assert out_of_space(outer) == f"a file of the run: No space left on device{advice}"
    for other in (None, RuntimeError("x"), StoreError("cannot read /a"), OSError(errno.EACCES, "Permission denied")):
        assert out_of_space(other) == ""
