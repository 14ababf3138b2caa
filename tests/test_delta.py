"""Deltas: they hold only changed tensors, apply and revert bit for bit, and refuse another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import clip_model, edm_model, latent_task, tiny_config, tiny_model, tiny_task

from raysweep.config.schema import ConfigError
from raysweep.export import delta
from raysweep.models import delta as models_delta
from raysweep.models import families
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM


def build(kind: str):
    if kind == "latent":
        return LatentText.build(latent_task().model, 0)
    return {"pixel": lambda: tiny_model(tiny_task()), "edm": edm_model, "clip": clip_model}[kind]()


@pytest.fixture(params=["pixel", "latent", "edm", "clip"])
def pair(request, tmp_path) -> tuple[Path, Path, str]:
    """(base, candidate, the tensor that differs)."""
    model = build(request.param)
    model.save(tmp_path / "base")
    name, weight = next((n, p) for n, p in model.net.named_parameters() if p.dim() > 1 and p.requires_grad)
    with torch.no_grad():
        weight.mul_(1.1).add_(1e-3)
    model.save(tmp_path / "candidate")
    return tmp_path / "base", tmp_path / "candidate", name


def test_a_delta_is_applied_and_reverted_bit_for_bit(pair, tmp_path):
    base, candidate, name = pair
    header = delta.write(tmp_path / "d.safetensors", base, candidate)
    assert header["tensors"] == 1
    assert set(models_delta.read(tmp_path / "d.safetensors")[1]) == {f"before/{name}", f"after/{name}"}
    digest = delta.apply(tmp_path / "d.safetensors", base, tmp_path / "applied")
    assert digest == families.load(candidate).digest == families.load(tmp_path / "applied").digest
    delta.apply(tmp_path / "d.safetensors", tmp_path / "applied", tmp_path / "back", revert=True)
    assert families.load(tmp_path / "back").digest == families.load(base).digest


def test_a_delta_carries_the_candidates_sampler(tmp_path):
    model = tiny_model(tiny_task())
    model.save(tmp_path / "base")
    model.use_sampler("one_step", t=700)
    model.save(tmp_path / "candidate")
    delta.write(tmp_path / "d.safetensors", tmp_path / "base", tmp_path / "candidate")
    delta.apply(tmp_path / "d.safetensors", tmp_path / "base", tmp_path / "applied")
    assert families.load(tmp_path / "applied").sampler == model.sampler


def test_a_delta_refuses_other_models_and_broken_files(pair, tmp_path):
    base, candidate, _ = pair
    path = tmp_path / "d.safetensors"
    delta.write(path, base, candidate)
    with pytest.raises(ConfigError, match="but the delta goes from"):
        delta.apply(path, candidate, tmp_path / "out")
    PixelDDPM.build(tiny_config(3), 0).save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"cannot be a delta over .*: it has another architecture"):
        delta.write(tmp_path / "no", base, tmp_path / "other")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        delta.apply(path, base, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such file"):
        delta.apply(tmp_path / "absent", base, tmp_path / "out")
    weights = next(base.rglob("*.safetensors"))
    with pytest.raises(ConfigError, match="not a delta"):
        delta.apply(weights, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
