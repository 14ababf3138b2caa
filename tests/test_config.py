"""Configs: defaults, overrides, and one clear message for every mistake."""

from pathlib import Path

import pytest

from raysweep.config.reader import load, validate
from raysweep.config.schema import ConfigError, Sweep
from raysweep.config.sections import OlderName


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


def leaves(data, prefix=""):
    """Every setting of a config as plain data, by its dotted key."""
    settings = {}
    for key, value in data.items():
        settings |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return settings


ASIDE = {  # settings of location, speed, time limits and display
    "name": "another",
    "storage": "elsewhere",
    "cache": "elsewhere",
    "preset": "rgd-cifar10-edm",
    "scale": "tiny",
    "resources.cpus_per_worker": 2,
    "resources.gpus_per_worker": 1,
    "resources.gpus_per_auditor": 2,
    "resources.slots": 1,
    "resources.auditors": 1,
    "resources.cpus": 1,
    "resources.expect": {"train": {"nodes": 3, "cpus": 192, "gpus": 8}},
    "resources.wait_s": 60,
    "train.executor": "isolated",
    "train.workers": 2,
    "train.budget_s": 7200,
    "train.checkpoint_s": 5,
    "audit.attempts": 1,
    "audit.timeout_s": 7200,
    "candidates.keep": "all",
    "profile": True,
}


def test_the_older_name_of_the_window_is_read_and_said():
    with pytest.warns(OlderName, match=r"search.batch=3 is read as search.window=6; name the window"):
        assert load(None, ("search.batch=3",)).search.window == 6
    with pytest.raises(ConfigError, match="batch: is an older name of window"):
        load(None, ("search.batch=3", "search.window=6"))
    with pytest.raises(ConfigError, match=r"search\.batch: unknown key"):
        load(None, ("search.batch=many",))


def test_digest_ignores_where_and_how_fast_and_for_how_long():
    """Each such setting may change when a run is resumed; the list is complete, and everything else makes another run."""
    one = load(None)
    assert set(leaves(one.resolved())) - set(leaves(one.decisive())) == set(ASIDE)
    for key, value in ASIDE.items():
        parent, _, last = key.rpartition(".")
        part = getattr(one, parent).model_copy(update={last: value}) if parent else value
        changed = one.model_copy(update={parent or last: part})
        assert changed != one
        assert changed.digest == one.digest, key
    for other in ("search.seed=1", "audit.top=9", "audit.audit.samples=801", "train.precision=bf16", "task.copies=5"):
        assert load(None, (other,)).digest != one.digest, other


def test_the_digest_ignores_how_pictures_are_shown(tmp_path):
    base = {
        "name": "images",
        "base": "x",
        "train": {"folder": "a"},
        "holdout": {"folder": "b"},
        "forget": {"labels": ["c"]},
    }
    clear, blurred = (validate({"task": base | {"sensitive": shown}}, "here", absent=True) for shown in (False, True))
    assert clear.task.sensitive != blurred.task.sensitive
    assert clear.digest == blurred.digest


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
        ("2024-01-01: a\n", (), ["sweep.yaml: keys must be text or numbers"]),
        ("task: &a {x: *a}\n", (), ["sweep.yaml: keys must be text or numbers, and nothing may hold itself"]),
        ("task: {name: digits-clas}\n", (), ["task.name", "'digits-class'"]),
        ("preset: rgd-sd-nudity\n", (), ["sweep.yaml: preset: ", "raysweep run NAME"]),
        ("", ("preset=rgd-sd-nudity",), ["preset: ", "raysweep run NAME"]),
        ("about: {}\n", (), ["sweep.yaml: about: ", "tiny is missing"]),
        ("task:\n", (), ["sweep.yaml:1: task: must be the name of a task"]),
        ("task: [digits-class]\n", (), ["sweep.yaml:1: task: must be the name of a task"]),
        ("task: {name: digits-class, forget: 12}\n", (), ["class 12 is not in the data", "0 to 9"]),
        ("task: {name: digits-class, forget: 8}\n", (), ["override"]),
        ("task: {copeis: 2}\n", (), ["task.copeis", "'copies'"]),
        ("task: {base: nowhere}\n", (), ["nowhere", "model_index.json"]),
        ("audit: {probe: {seed: 2}, durability: {seed: 2}}\n", (), ["probe.seed 2, durability.seed 2 overlap"]),
        ("audit: {probe: {seed: null}}\n", (), ["audit: probe.seed: must be given"]),
        (f"audit: {{audit: {{seed: {2**63}}}}}\n", (), ["audit.audit.seed", "less than"]),
        ("audit: {audit: {judge: probe}}\n", (), ["judge"]),
        ("audit: {audit: {checks: [fidelty]}}\n", (), ["'fidelity'"]),
        ("audit: {probe: {groups: 50}}\n", (), ["groups"]),
        ("train: {lora: {rnk: 4}}\n", (), ["sweep.yaml:1: train.lora.rnk: unknown key; did you mean 'rank'?"]),
        ("spaces: {salun: {lr: 1}}\n", (), ["not among the methods"]),
        ("name: ../up\n", (), ["name"]),
        ("", ("trials",), ["key=value"]),
        ("", ("search.trials=-1",), ["command line", "search.trials"]),
        ("", ("search.trials.x=1", "search.trials=2"), ["search.trials"]),
        ("methods: [rgd, siss]\n", ("methods.2=neggrad",), ["'2' is not an index into a list of 2"]),
        ("methods: [rgd, siss]\n", ("methods.first=neggrad",), ["'first' is not an index into a list of 2"]),
    ],
)
def test_mistakes_get_one_clear_message(tmp_path, text, overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, text), overrides)
    for part in parts:
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)


FOLDER = {"folder": "images"}
FILE = {"file": "prompts.csv"}
GRID = {"template": "a {what}", "slots": {"what": ["cat", "dog"]}, "label": "what"}


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"train": {"foldr": "x"}}, ["task.train: needs exactly one of the keys folder, parquet, shards, torchvision, mix"]),
        ({"train": "x"}, ["task.train: needs exactly one of the keys folder"]),
        ({"train": FOLDER | {"shards": "x"}}, ["task.train: needs exactly one of the keys folder"]),
        ({"train": FOLDER | {"labeled": "x"}}, ["task.train.labeled: unknown key; did you mean 'labelled'?"]),
        ({"train": FOLDER | {"repeat": 0}}, ["task.train.repeat: Input should be greater than or equal to 1 (got 0)"]),
        ({"train": {"mix": [FOLDER, {"mix": [FOLDER]}]}}, ["task.train.mix.1: needs exactly one of the keys folder"]),
        ({"train": {"mix": [FOLDER, FOLDER | {"a": 1}]}}, ["task.train.mix.1.a: unknown key"]),
        ({"search_prompts": FILE | {"colunm": "x"}}, ["task.search_prompts.colunm: unknown key"]),
        (
            {"search_prompts": {"fil": "x"}, "audit_prompts": {"mix": [GRID, {"template": "a {b}"}]}},
            ["task.search_prompts: needs exactly one of the keys file, template, mix",
             "task.audit_prompts.mix.1.slots: Field required", "task.audit_prompts.mix.1.label: Field required"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_a_source_or_in_prompts_is_explained_for_its_own_kind(tmp_path, settings, messages):
    import yaml

    task = {
        "name": "images",
        "kind": "concept",
        "base": str(tmp_path),
        "train": FOLDER,
        "holdout": FOLDER,
        "forget": {"labels": ["cat"]},
        "search_prompts": FILE,
        "audit_prompts": GRID,
    }
    with pytest.raises(ConfigError) as error:
        load(write(tmp_path, yaml.safe_dump({"task": task | settings})))
    messages_read = [line.split(": ", 1)[1] for line in str(error.value).splitlines()]
    assert len(messages_read) == len(messages)
    assert all(line.startswith(message) for line, message in zip(messages_read, messages, strict=True)), messages_read


def test_an_override_changes_one_use_of_an_alias(tmp_path):
    path = write(tmp_path, "methods: [rgd, siss]\nspaces:\n  rgd: &both {batch_size: 8}\n  siss: *both\n")
    assert load(path, ("spaces.rgd.batch_size=4",)).spaces["siss"]["batch_size"] == 8


def test_an_override_can_set_an_item_of_a_list(tmp_path):
    sweep = load(write(tmp_path, "methods: [rgd, siss]\n"), ("methods.1=neggrad",))
    assert sweep.methods == ("rgd", "neggrad")


def test_missing_file():
    with pytest.raises(ConfigError, match="no such file"):
        load(Path("absent.yaml"))


def test_resolved_config_reads_back(tmp_path):
    import yaml

    sweep = load(None, ("task=digits-class", "name=x"))
    path = write(tmp_path, yaml.safe_dump(sweep.resolved()))
    assert load(path).digest == sweep.digest


@pytest.mark.parametrize(
    ("most", "needed", "factor"),
    [(4, None, None), (4, 2.2, 3), (4, 1.0, 2), (4, 4.0, 4), (4, 4.1, None), (1, 1.0, None)],
)
def test_attacks_are_repeated_only_where_that_decides_within_the_budget(most, needed, factor):
    audit = load(None, (f"audit.attack_draws={most}", "audit.durability.seed=5")).audit
    assert audit.repeat(needed) == factor
    if factor:
        _, tier = audit.more_draws(factor)
        assert (tier.noises, tier.class_samples) == (
            factor * audit.durability.noises,
            factor * audit.durability.class_samples,
        )
        assert tier.seed != audit.durability.seed
