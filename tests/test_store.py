"""Atomic writes, schemas of the tables, tensors and models on disk, and the run directory."""

from __future__ import annotations

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model

from raysweep.auditing.log import read_log
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.models.pixel import PixelDDPM
from raysweep.rundir import RunDir
from raysweep.storage import schemas
from raysweep.storage.cache import load_tensors, save_tensors
from raysweep.storage.files import TEMPORARY, StoreError, digest_state, write_bytes, write_file, write_folder
from raysweep.storage.schemas import ROWS, read_table, write_table

ROW = {"subject": "t", "tier": "probe", "check": "c", "metric": "m", "value": 1.0, "n": 3, "status": "ok"}


def test_tables_round_trip_and_every_column_is_described(tmp_path):
    write_table(tmp_path / "a.parquet", [ROW], ROWS)
    write_table(tmp_path / "b.parquet", [ROW | {"value": None}], ROWS)
    assert [r["value"] for r in read_table(tmp_path, ROWS).to_pylist()] == [1.0, None]
    for schema in (schemas.ROWS, schemas.SCORES, schemas.TRIALS, schemas.FRONT):
        assert all(field.metadata and field.metadata[b"comment"] for field in schema)


def test_another_schema_version_is_refused(tmp_path):
    table = pa.Table.from_pylist([ROW], schema=ROWS.with_metadata({"schema_version": "99"}))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="schema version 99"):
        read_table(tmp_path, ROWS)


def test_a_torn_part_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(StoreError, match=r"a\.parquet"):
        read_table(tmp_path, ROWS)


def test_a_full_disk_leaves_the_old_file_and_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"a\.json: No space left on device"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_the_system_refuses_midway(tmp_path):
    """A real refusal, by the limit on file sizes: the same path through the code as a disk without room."""
    path = tmp_path / "a.json"
    write_bytes(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot write .*a\.json: File too large"):
            write_bytes(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def half(folder: Path):
        (folder / "a").write_text("a")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        write_folder(tmp_path / "c", half)
    assert os.listdir(tmp_path) == []
    write_folder(tmp_path / "c", lambda folder: (folder / "a").write_text("a"))
    assert (tmp_path / "c" / "a").read_text() == "a"


def test_concurrent_writers_of_one_name_do_not_interfere(tmp_path, monkeypatch):
    """On two hosts, or in two containers, processes have equal ids: what one is writing is not the other's."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, names = tmp_path / "a.json", set()

    def other_writes_meanwhile(file):
        names.update(os.listdir(tmp_path))
        write_bytes(path, b"other")
        file.write(b"mine")

    write_file(path, other_writes_meanwhile)
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.json"]
    assert all(Path(name).match(TEMPORARY) for name in names)

    def fill(text: str):
        return lambda folder: (folder / text).write_text(text)

    def other_folder_meanwhile(folder: Path):
        write_folder(tmp_path / "c", fill("other"))
        (folder / "mine").write_text("mine")

    write_folder(tmp_path / "c", other_folder_meanwhile)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "c"]


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    """As `export` and `draw` write where nothing else is cleared: a name with odd letters, and another's left alone."""
    left, young, other = (tmp_path / name for name in (".[a] b.0123.tmp", ".[a] b.4567.tmp", ".c.0123.tmp"))
    for folder in (left, young, other):
        folder.mkdir()
    for folder in (left, other):
        os.utime(folder, (0, 0))
    write_folder(tmp_path / "[a] b", lambda folder: (folder / "x").write_text("x"))
    assert (left.exists(), young.exists(), other.exists()) == (False, True, True)


def test_a_folder_stays_complete_while_many_write_it(tmp_path):
    """Sixteen writers at once: none fails, one of them wins, and its folder is complete."""
    files = [f"{k}.bin" for k in range(20)]

    def write(number: int) -> None:
        def fill(folder: Path) -> None:
            for name in files:
                (folder / name).write_text(str(number))

        write_folder(tmp_path / "c", fill)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(write, range(64)))
    assert len({(tmp_path / "c" / name).read_text() for name in files}) == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(files)
    assert os.listdir(tmp_path) == ["c"]


def test_tensors_are_read_from_safetensors_only(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3)})
    assert load_tensors(tmp_path / "t.safetensors")["a"].tolist() == [0, 1, 2]
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-8])
    torch.save({"a": torch.arange(3)}, tmp_path / "pickle.safetensors")
    for name in ("cut", "pickle"):
        with pytest.raises(StoreError, match=f"{name}.safetensors: not a readable safetensors"):
            load_tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(StoreError, match="no such file"):
        load_tensors(tmp_path / "absent.safetensors")


def test_models_are_diffusers_folders_and_never_pickles(tmp_path, points_task, class_task):
    from diffusers import DDIMPipeline

    for task in (points_task, class_task):
        model = tiny_model(task)
        model.save(tmp_path / task.kind)
        again = PixelDDPM.load(tmp_path / task.kind)
        assert digest_state(again.net.state_dict()) == digest_state(model.net.state_dict())
        assert again.null_label == model.null_label
        assert DDIMPipeline.from_pretrained(tmp_path / task.kind).unet.config.sample_size == 4
    weights = tmp_path / "points" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        PixelDDPM.load(tmp_path / "points")
    weights.unlink()
    torch.save(tiny_model(points_task).net.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weights are never loaded"):
        PixelDDPM.load(tmp_path / "points")
    with pytest.raises(ValueError, match="not a diffusers pipeline folder"):
        PixelDDPM.load(tmp_path)


def test_the_audit_log_survives_a_torn_line(tmp_path):
    log = tmp_path / "audits.jsonl"
    ended = [
        {"key": "a", "status": "ok", "failed": []},
        {"key": "b", "status": "failed", "failed": []},
        {"key": "d", "status": "ok", "failed": ["loss"]},
    ]
    log.write_text("".join("\n" + json.dumps(e) for e in ended) + '\n{"key": "c", "sta')
    assert list(read_log(log)) == ["a"]


def test_a_run_directory_belongs_to_one_config_and_one_process(tmp_path):
    sweep = load(None, (f"storage={tmp_path}",))
    folder = RunDir.of(sweep)
    with (
        folder.claim(sweep, {}),
        pytest.raises(ConfigError, match="another raysweep run"),
        RunDir.of(sweep).claim(sweep, {}),
    ):
        pass
    other = load(None, (f"storage={tmp_path}", "search.trials=42"))
    with pytest.raises(ConfigError, match=r"another config \(search\.trials: 36 -> 42\)"):
        RunDir.of(other).check(other)
    assert folder.sweep().digest == sweep.digest
    manifest = folder.read_manifest()
    assert {"torch", "ray", "optuna", "diffusers"} <= set(manifest["versions"])
    assert manifest["commit"]
    (tmp_path / "stuff").mkdir()
    (tmp_path / "stuff" / "x").write_text("x")
    stuff = load(None, (f"storage={tmp_path}", "name=stuff"))
    with pytest.raises(ConfigError, match="not empty"):
        RunDir.of(stuff).check(stuff)


def test_a_run_resumes_with_other_limits_and_under_a_newer_raysweep(tmp_path, monkeypatch):
    sweep = load(None, (f"storage={tmp_path}",))
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {}):
        run_id = folder.run_id
    assert run_id == f"{sweep.name}-{sweep.digest[:8]}"
    patient = load(None, (f"storage={tmp_path}", "train.budget_s=7200", "audit.timeout_s=7200", "resources.slots=1"))
    before = folder.read_manifest()["created_at"]
    with folder.claim(patient, {}):
        assert folder.sweep().resolved() == patient.resolved()  # the processes of the run read this
    assert folder.read_manifest()["created_at"] == before
    monkeypatch.setattr(type(sweep), "digest", "f" * 16)  # as settings that are added later change it
    assert folder.run_id == run_id
    with pytest.raises(ConfigError, match="made by another version"):
        folder.check(patient)


def test_a_run_does_not_resume_with_other_data(tmp_path):
    """It keeps its original task: measurements on it must not be taken for measurements on the new one."""
    sweep = load(None, (f"storage={tmp_path}",))
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {"task": "a"}):
        pass
    with folder.claim(sweep, {"task": "a"}):
        pass
    folder.check(sweep)
    text = folder.manifest.read_text()
    with pytest.raises(
        ConfigError, match="began with other data: its task has the hash a, and what the config names gives b"
    ):
        folder.check(sweep, "b")
    with pytest.raises(ConfigError, match="began with other data"), folder.claim(sweep, {"task": "b"}):
        pass
    assert folder.manifest.read_text() == text


def test_leftovers_of_killed_writes_are_removed(tmp_path):
    cache = tmp_path / "cache"
    sweep = load(None, (f"storage={tmp_path / 'runs'}", f"cache={cache}"))
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {}):
        (folder.path / "rows").mkdir()
    left = [folder.path / "rows" / ".a.parquet.7.tmp", cache / "audits" / ".old.parquet.7.tmp"]
    (cache / "audits").mkdir(parents=True)
    for path in (*left, alive := cache / "audits" / ".new.parquet.8.tmp"):
        path.write_bytes(b"PAR1")
    os.utime(left[1], (0, 0))
    (model := folder.path / "candidates" / ".000-rgd.7.tmp").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (writing := cache / "models" / ".base.9.tmp").mkdir(parents=True)  # started long ago, and still being written
    (writing / "weights").write_bytes(b"")
    os.utime(writing, (0, 0))
    kept, forgotten = (cache / "models" / f".{name}.partial.pt" for name in ("kept", "forgotten"))
    for path in (kept, forgotten):
        path.write_bytes(b"")
    os.utime(forgotten, (0, 0))
    with folder.claim(sweep, {}):
        assert all(p.exists() for p in (alive, writing, kept))  # another run may be writing them, or resume from them
        assert not any(p.exists() for p in (*left, model, forgotten))
        left[0].write_bytes(b"PAR1")
    assert not left[0].exists()


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    sweep = load(None, (f"storage={tmp_path / 'file'}",))
    with pytest.raises(ConfigError, match="file is not a folder"), RunDir.of(sweep).claim(sweep, {}):
        pass
