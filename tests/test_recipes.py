"""The resolved config of a run directory or a report reads back as the same sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import raysweep.miniature
from raysweep.cli import main
from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Sweep

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


def again(sweep: Sweep, folder: Path, overrides: tuple[str, ...] = (), absent: bool = False) -> Sweep:
    """The sweep that its own recipe reads as."""
    path = folder / f"{sweep.name}.yaml"
    path.write_text(sweep.recipe(), encoding="utf-8")
    return load(path, overrides, absent)


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda p: p.stem if p else "default")
def test_a_recipe_is_the_sweep_again(path, tmp_path):
    sweep = load(path, ("search.seed=3", "name=mine"))
    copy = again(sweep, tmp_path)
    assert copy == sweep
    assert copy.digest == sweep.digest
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "mine.yaml"), f"storage={tmp_path}"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", presets.names())
def test_a_presets_recipe_is_the_sweep_again(name, tmp_path, monkeypatch):
    """At both scales; miniatures are empty folders here, because only the config is read."""

    def make(parts, cache=None):
        for part in (*parts, *(f"{p}/clip" for p in parts)):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
        return tmp_path

    monkeypatch.setattr(raysweep.miniature, "make", make)
    monkeypatch.chdir(tmp_path)
    for scale in ("paper", "tiny"):
        sweep = load(presets.path_of(name), (f"scale={scale}", "search.seed=3"), absent=True)
        copy = again(sweep, tmp_path, absent=True)
        assert (copy.scale, copy.preset) == (scale, name)
        assert copy == sweep
        assert copy.digest == sweep.digest
    if name == "siss-mnist-tshirt":
        result = CliRunner().invoke(main, ["run", f"{name}.yaml", "--dry-run"])
        assert result.exit_code == 0, result.output
        assert presets.about(name).title in result.output
    with pytest.raises(ConfigError, match=f"raysweep run {name} scale=tiny"):
        load(tmp_path / f"{name}.yaml", ("scale=tiny",), absent=True)


def test_the_recipe_of_a_users_preset_is_planned_as_any_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load(load(None).recipe()) | {"preset": "mine", "scale": "paper"}
    data["spaces"] = {method: {"released": None} for method in data["methods"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    sweep = load(tmp_path / "mine.yaml")
    assert presets.about_of(tmp_path / "mine.yaml", sweep.preset) is None
