"""Oracles must be models of their own: neither each other, nor the base, nor the audited model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_model, tiny_task

import raysweep
from raysweep.cli import main
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.models.pixel import PixelDDPM


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Models of the embedded task: base, one, two; half is `one` in half precision, noisy is `one` on another noise schedule."""
    root = tmp_path_factory.mktemp("models")
    config = load(None).task.build().model
    for seed, name in enumerate(("base", "one", "two")):
        PixelDDPM.build(config, seed).save(root / name)
    half = PixelDDPM.build(config, 1)
    half.net.half()
    half.save(root / "half")
    PixelDDPM.build(config, 1).save(root / "noisy")
    path = root / "noisy" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "linspace"}))
    return root


def call(folders: Path, tmp_path: Path, *arguments: str, oracles: tuple[str, ...] = (), base: str = "base"):
    paths = ", ".join(str(folders / name) for name in oracles)
    places = (f"storage={tmp_path / 'runs'}", f"cache={tmp_path / 'cache'}", f"task.base={folders / base}")
    return CliRunner().invoke(main, [*arguments, *places, f"oracle_models=[{paths}]"])


@pytest.mark.parametrize(
    ("oracles", "message"),
    [
        (("one", "one"), "{one} and {one} are the same model (hash "),
        (("one", "half"), "{half} and {one} are the same model (the same weights, with other settings or in another"),
        (("noisy", "two", "one"), "{one} and {noisy} are the same model (the same weights, with other settings or"),
        (("one", "base"), "{base} is the base {base} (hash "),
    ],
)
def test_validate_and_run_refuse_oracles_that_are_no_models_of_their_own(folders, tmp_path, oracles, message):
    expected = "error: oracle_models: " + message.format(**{p.name: p for p in folders.iterdir()})
    for verb in ("validate", "run"):
        result = call(folders, tmp_path, verb, oracles=oracles)
        assert (result.exit_code, expected in result.output) == (2, True), result.output
        assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_an_audit_refuses_the_audited_model_among_its_oracles(folders, tmp_path):
    for model in ("one", "half", "noisy"):
        result = call(folders, tmp_path, "audit", str(folders / model), oracles=("two", "one"))
        assert result.exit_code == 2, result.output
        assert f"error: oracle_models: {folders / 'one'} is the audited model {folders / model} (" in result.output
    assert not (tmp_path / "runs").exists()


def test_one_oracle_alone_is_accepted_with_a_warning(folders, tmp_path):
    warning = "warning: oracle_models: one oracle alone does not show how far oracles differ"
    assert warning in call(folders, tmp_path, "validate", oracles=("one",)).output
    few = call(folders, tmp_path, "validate", oracles=("one", "two")).output
    assert "warning: oracle_models: 2 oracles hardly show how far oracles differ" in few
    assert load(None, ("oracles=1",)).warnings[-1].startswith("oracles: one oracle alone")
    assert load(None, ("oracles=3",)).warnings == []


def test_measure_refuses_them_too():
    task = tiny_task()
    base, one, two = (tiny_model(task, seed) for seed in range(3))
    judged = {"base": base, "judge": torch.nn.Identity()}
    half = replace_weights(one, torch.float16)
    for model, oracles, message in (
        (two, [one, half], "oracle 1 and oracle 0 are the same model"),
        (two, [one, base], "oracle 1 is the base"),
        (one, [one], "oracle 0 is the audited model"),
    ):
        with pytest.raises(ConfigError, match=f"^oracles: {message}"):
            raysweep.measure(model, task, ["loss"], oracles=oracles, **judged)


def replace_weights(model: PixelDDPM, dtype: torch.dtype) -> PixelDDPM:
    other = model.fresh(0)
    other.net.load_state_dict(model.net.state_dict())
    other.net.to(dtype)
    return other
