"""The GPU benchmark: every section at a toy size, its time limit, and its message without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from tiny import ROOT

from raysweep.planning import footprint


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def test_every_section_runs_at_a_toy_size(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # compiling takes longer than all sections
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {path.stem for path in tmp_path.iterdir()} == {*gpu.SECTIONS, "gpu"}
    assert not result["left_out"]
    assert {e["section"].split()[0].strip(",") for e in result["entries"]} == {*gpu.SETTINGS, "sampling", "transformer"}
    for entry in result["entries"]:
        errors = [entry[who]["error"] for who in ("plain", "ours") if "error" in entry[who]]
        assert not errors, entry["section"]
        assert entry["images_per_s"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| finetune |") == 1
    assert json.loads(printed.splitlines()[len(gpu.SECTIONS) + 1]) == result

    def fail(bench):
        raise AssertionError("a section that is done ran again")

    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(gpu.SECTIONS, fail))
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["entries"] == result["entries"]


def test_sections_skipped_for_lack_of_time_are_named(gpu, tmp_path, capsys):
    assert gpu.main(["--toy", "--out", str(tmp_path), "--only", "finetune", "--seconds", "-1"]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == ["finetune at batch 2"]
    assert "left out for lack of time: finetune at batch 2" in capsys.readouterr().out
    assert not json.loads((tmp_path / "finetune.json").read_text())["whole"]


def test_without_a_gpu_it_prints_one_sentence(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_what_mixed_precision_keeps():
    """Less than a pass in single precision, besides a copy of the weights; the global autocast state is restored."""
    config = {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    size = footprint.of({"unet": config})
    assert size.casts == pytest.approx(2 * size.parameters, rel=0.1)  # one copy of two bytes per weight
    assert 0.5 * size.activations < size.mixed < size.activations
    assert not torch.is_autocast_enabled("cuda")
