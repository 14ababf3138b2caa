"""Configs: defaults, overrides, and one clear message for every mistake."""

from pathlib import Path

import pytest

from raysweep.config import ConfigError, Sweep, load


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_default_is_the_embedded_sweep():
    sweep = load(None)
    assert sweep == Sweep()
    assert sweep.search.trials >= 36
    assert sweep.search.trials % len(sweep.methods) == 0
    assert sweep.oracles >= 2


def test_examples_are_valid():
    from tiny import ROOT

    for path in sorted((ROOT / "examples").glob("*.yaml")):
        assert load(path).methods


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "search: {trials: 12}\n")
    sweep = load(path, ("search.trials=18", "methods=[rgd, siss]", "task.copies=3"))
    assert (sweep.search.trials, sweep.methods, sweep.task.copies) == (18, ("rgd", "siss"), 3)
    assert load(path, ("task=digits-class",)).task.name == "digits-class"


def test_digest_ignores_where_and_how_fast():
    one = load(None)
    same = load(None, ("storage=elsewhere", "resources.slots=1", "train.executor=isolated", "train.workers=2"))
    assert one.digest == same.digest
    assert one.digest != load(None, ("search.seed=1",)).digest


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("serch: {trials: 6}\n", (), ["sweep.yaml:1", "serch", "search"]),
        ("search:\n  trails: 6\n", (), ["sweep.yaml:2", "search.trails", "'trials'"]),
        ("methods: [rgd, sis]\n", (), ["sweep.yaml:1", "'sis'", "'siss'"]),
        ("methods: [retrain]\n", (), ["oracle"]),
        ("methods: [rgd, rgd]\n", (), ["twice"]),
        ("search: {trials: many}\n", (), ["search.trials", "many"]),
        ("search: {trials: 7}\n", (), ["multiple of 6"]),
        ("search: [1\n", (), ["not valid YAML"]),
        ("- a\n", (), ["mapping"]),
        ("task: {name: digits-clas}\n", (), ["task.name", "'digits-class'"]),
        ("task: {name: digits-class, forget: 12}\n", (), ["class 12 is not in the data", "0 to 9"]),
        ("task: {name: digits-class, forget: 8}\n", (), ["override"]),
        ("task: {copeis: 2}\n", (), ["task.copeis", "'copies'"]),
        ("task: {base: nowhere}\n", (), ["nowhere", "model_index.json"]),
        ("audit: {probe: {seed: 2}}\n", (), ["overlap"]),
        ("audit: {audit: {judge: probe}}\n", (), ["judge"]),
        ("audit: {audit: {checks: [fidelty]}}\n", (), ["'fidelity'"]),
        ("audit: {probe: {groups: 50}}\n", (), ["groups"]),
        ("spaces: {salun: {lr: 1}}\n", (), ["not among the methods"]),
        ("name: ../up\n", (), ["name"]),
        ("", ("trials",), ["key=value"]),
        ("", ("search.trials=-1",), ["command line", "search.trials"]),
        ("", ("search.trials.x=1", "search.trials=2"), ["search.trials"]),
    ],
)
def test_mistakes_get_one_clear_message(tmp_path, text, overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text), overrides)
    for part in parts:
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="no such file"):
        load(Path("absent.yaml"))


def test_resolved_config_reads_back(tmp_path):
    import yaml

    sweep = load(None, ("task=digits-class", "name=x"))
    path = write(tmp_path, yaml.safe_dump(sweep.resolved()))
    assert load(path).digest == sweep.digest
