"""Every example from config to report, with real Ray, on as little training as possible. `pytest -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import recipe_of, start
from tiny import ROOT

from raysweep.config.reader import load
from raysweep.models import families, stored
from raysweep.rundir import RunDir

LITTLE = {
    "class": ("task.base_steps=60", "search.trials=20"),
    "clip": ("task.base_steps=40", "search.trials=6"),
    "text-to-image": (
        "search.trials=7",
        "audit.audit.samples=100",
        "audit.audit.class_samples=60",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "examples").glob("*.yaml")))
def test_an_example_runs_to_its_report(tmp_path: Path, name: str):
    common = ("oracles=1", "audit.top=2", "audit.rounds=1", "audit.finalists=1", "name=example")
    example = str(ROOT / "examples" / f"{name}.yaml")
    process = start(tmp_path, tmp_path / "cache", "run", example, *common, *LITTLE[name])
    code = process.wait(1400)
    out = (tmp_path / "out.log").read_text()
    assert code in (0, 3), out
    run = tmp_path / "runs" / "example"
    front = json.loads((run / "front.json").read_text())
    assert front["points"]
    assert load(recipe_of(run, tmp_path)).digest == RunDir(run).in_force().digest
    kept = [p.parent for p in (run / "candidates").glob("*/raysweep.json") if stored.is_kept(p.parent)]
    assert kept
    for candidate in kept:
        card = json.loads((candidate / "raysweep.json").read_text())
        assert families.load(candidate).digest == card["outcome"]["digest"]
