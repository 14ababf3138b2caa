"""Tables of released values are complete, and every point that names a release has its values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

import search_spaces
from raysweep.cli import main
from raysweep.cli.listing import first_points, origins
from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.registry import resolve
from raysweep.search import released
from raysweep.search.released import ReleasedError, Setting
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import SpaceError
from raysweep.search.spaces import load as load_space
from raysweep.tasks.images import ImagesTask

ALL = presets.names()
TABLES = {name: released.table(name) for name in search_spaces.tables()}
CLAIM = re.compile(r"\b(papers?|released?|releases?|published|official|authors?)\b", re.IGNORECASE)


def spaces_of(name: str):
    sweep = load(presets.path_of(name), (), absent=True)
    return [load_space(m, sweep.spaces.get(m), sweep.task.kind) for m in sweep.methods]


def values(method: str, name: str) -> dict:
    """The hyperparameters of a preset's first point for a method."""
    space = next(s for s in spaces_of(name) if s.method == method)
    return resolve("method", method).Hyperparameters(**(space.fixed | space.points[0].values)).model_dump()


def at(data, key: str):
    for part in key.split("."):
        data = data[part]
    return data


def test_every_table_gives_every_hyperparameter_a_value_and_its_source():
    assert {"rgd", "siss", "sfd", "slug"} <= set(search_spaces.tables())
    for table in TABLES.values():
        for setting in table.settings.values():
            for point in setting.points():
                values = {k: v for k, v in released.converted(point).items() if k not in setting.unused}
                read = resolve("method", setting.method).Hyperparameters(**values).model_dump()
                assert all(
                    math.isclose(read[k], v) if isinstance(v, float) else read[k] == v for k, v in values.items()
                )
            assert len({s.title for s in table.settings.values()}) == len(table.settings)


def test_tables_cite_code_of_a_commit_and_of_their_own_experiment():
    for name, table in TABLES.items():
        for address in table.code.values():
            assert re.search(r" at [0-9a-f]{7}$|, version \d", address), f"{name}: {address}"
        for key, setting in table.settings.items():
            other = r"(?i)^ddpm/" if key.startswith("sd") else r"^(?:SD|sd)/"
            strange = [k for point in setting.points() for k, v in point.items() if re.search(other, v.at)]
            assert not strange, f"{name}/{key}: {strange}"


def test_no_table_merges_lists_of_mappings_that_share_a_key():
    """Which of two merged values counts differs between versions of PyYAML; a key beside `<<` counts in all of them."""
    for path in sorted((Path(search_spaces.__file__).parent / "released").glob("*.yaml")):
        todo = [yaml.compose(path.read_text(encoding="utf-8"))]
        while todo:
            node = todo.pop()
            todo += node.value if isinstance(node, yaml.SequenceNode) else []
            for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
                todo.append(value)
                if key.value == "<<" and isinstance(value, yaml.SequenceNode):
                    keys = [k.value for part in value.value for k, _ in part.value if k.value != "<<"]
                    assert len(keys) == len(set(keys)), f"{path.name}:{key.start_mark.line + 1}"


def test_a_table_that_leaves_something_to_a_default_is_refused():
    whole = search_spaces.released("sld")["settings"]["medium"]
    Setting.model_validate(whole)
    less = {k: v for k, v in whole["values"].items() if k != "beta"}
    with pytest.raises(ValidationError, match=r"beta: neither among values nor unused"):
        Setting.model_validate(whole | {"values": less, "also": []})
    with pytest.raises(ValidationError, match=r"bta: not a hyperparameter of sld; did you mean 'beta'"):
        Setting.model_validate(whole | {"values": less | {"bta": [0.4, "somewhere"]}})
    with pytest.raises(ValidationError, match="other units need a reason"):
        Setting.model_validate(whole | {"values": whole["values"] | {"beta": {"value": 1, "at": "x", "times": 2}}})
    with pytest.raises(ReleasedError, match="did you mean 'sfd/cifar10'"):
        released.setting("sfd/cifr10")


@pytest.mark.parametrize("name", ALL)
def test_a_preset_says_where_every_value_of_its_points_is_from(name):
    sweep = load(presets.path_of(name), (), absent=True)
    for space in spaces_of(name):
        assert "released" in sweep.spaces[space.method]
        assert space.points, f"{space.method} tries nothing first"
        for point in space.points:
            values = origins(space, point)
            if point.stated:
                assert {k for k, v in values.items() if v["searched"] or v["from"].startswith("default of")} == set()
                differs = {
                    k
                    for k, s in point.stated.items()
                    if values[k]["value"]
                    not in (s.converted, tuple(s.converted) if isinstance(s.converted, list) else s.converted)
                }
                assert differs == set(point.because), (
                    f"{space.method}: {differs} differ from the release without a reason"
                )
                assert all(k in point.source for k in differs)
            else:
                assert not CLAIM.search(point.source), point.source
                assert not [k for k, v in values.items() if v["searched"]], f"{point.source}: values are drawn"


@pytest.mark.parametrize("name", ALL)
def test_a_preset_holds_what_its_table_states_of_base_data_and_sampler(name):
    data = load(presets.path_of(name), (), absent=True).resolved() | {"about": presets.about(name).model_dump()}
    stated = [table.presets[name] for table in TABLES.values() if name in table.presets]
    for key, value in (item for table in stated for item in table.items()):
        assert at(data, key) == (
            pytest.approx(value.converted) if isinstance(value.converted, float) else value.converted
        ), key


def test_tables_name_existing_presets():
    assert {name for table in TABLES.values() for name in table.presets} <= set(ALL)


# Values that were wrong once, copied a second time from the sources.
RIGHT = [
    ("sfd_two_stage", "sfd-cifar10", {"fake_forget": 0.01, "forget_batch_size": 128, "ema": 0.9999, "lr_fake": 3e-5, "alpha": 1.2}),
    ("sfd_two_stage", "sfd-stl10", {"fake_forget": 0.01, "forget_batch_size": 64, "ema": 0.9999, "lr_fake": 3e-5, "alpha": 1.2}),
    ("sfd", "sfd-cifar10", {"fake_forget": 0.01, "forget_batch_size": 128, "ema": 0.9999, "t_min": 38, "t_max": 712, "cond_scale": 0.0}),
    ("sfd", "sfd-sd-celebrity", {"cond_scale": 3.5, "fake_drop": 0.1, "clips": "generator", "adam_eps": 1e-6, "alpha": 1.0, "ema": 0.0}),
    ("rgd", "rgd-cifar10-edm", {"retain_pass": "full", "retain_per_group": 50, "batch_size": 64, "lam": 5.0}),
    ("rgd", "rgd-sd-nudity", {"lam": 1.6, "trunc_batch_loss": 1.1, "trunc_elem_sq": None, "batch_size": 8}),
    ("selective_amnesia", "sfd-cifar10", {"guidance": 3.0, "sampler_steps": 1000, "sampler_eta": 1.0, "surrogate": "noise", "lam": 10.0, "ema": 0.9999}),
    ("selective_amnesia", "sfd-stl10", {"guidance": 3.0, "sampler_steps": 1000, "surrogate": "noise", "batch_size": 64}),
    ("selective_amnesia", "sfd-sd-celebrity", {"lr": 1.6e-4, "sampler_steps": 50, "guidance": 7.5, "reduction": "mean", "lam": 50.0}),
    ("salun", "sfd-cifar10", {"alpha": 3.072, "label_drop": 0.1, "batch_size": 128}),
    ("salun", "sfd-stl10", {"alpha": 12.288}),
    ("salun", "rgd-sd-nudity", {"alpha": 0.1, "clip_norm": None, "steps": 100}),
    ("siss", "siss-sd-memorised", {"beta1": 0.9, "weight_decay": 1e-2, "lr": 1e-5, "steps": 35, "batch_size": 16}),
    ("siss", "siss-celebahq", {"beta1": 0.95, "weight_decay": 1e-6, "t_sampler": "uniform", "lam": 0.5}),
    ("esd", "sfd-cifar10", {"batch_size": 1, "lr": 1e-5, "steps": 1000, "sampler_steps": 50}),
    ("esd", "sfd-stl10", {"batch_size": 1}),
    ("finetune", "slug-clip-identity", {"lr": 1e-7, "batch_size": 32, "weight_decay": 0.1, "decays": "matrices", "clip_norm": None, "beta2": 0.98, "steps": 2460}),
    ("slug", "slug-clip-identity", {"norms": True, "step": 0.1, "group": "tensor", "direction": "ascent"}),
    ("slug", "slug-unlearncanvas-style", {"norms": False, "step": 0.4, "group": "block", "loss": "clip"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "right"), RIGHT, ids=lambda v: v if isinstance(v, str) else "")
def test_values_that_were_wrong_once(method, name, right):
    read = values(method, name)
    assert {k: read[k] for k in right} == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in right.items()}


def test_further_points_and_recipes_that_were_wrong_once():
    space = next(s for s in spaces_of("rgd-sd-nudity") if s.method == "rgd")
    assert {(p.values["lam"], p.values["trunc_batch_loss"]) for p in space.points} == {(1.6, 1.1), (1.5, 1.5)}
    script = next(s for s in spaces_of("siss-celebahq") if s.method == "siss").points[1].values
    assert (script["tau"], script["rho"], script["t_sampler"], script["t_low"]) == (500, None, "fixed", 999)
    recipe = load(presets.path_of("siss-mnist-tshirt"), (), absent=True).task.recipe
    assert (recipe["beta1"], recipe["beta2"]) == (0.95, 0.999)
    task = load(presets.path_of("sfd-cifar10"), (), absent=True).task
    assert (task.steps, task.guidance, task.eta) == (1000, 3.0, 1.0)
    assert presets.about("sfd-cifar10").network["unet"]["dropout"] == 0.1
    digits = {p.source: p for p in load_space("sfd").points}
    assert next(p for source, p in digits.items() if "SFD" in source).values["fake_forget"] == 0.01


def test_embedded_points_claim_only_what_they_carry():
    for name in search_spaces.names():
        space = load_space(name)
        for point in space.points:
            values = origins(space, point)
            assert not [k for k, v in values.items() if v["searched"]], f"{name}: {point.source}: values are drawn"
            assert point.stated or not CLAIM.search(point.source), f"{name}: {point.source}"
            if point.stated:
                assert not [k for k, v in values.items() if v["from"].startswith("default of")], point.source


def test_a_space_that_names_a_release_takes_nothing_from_the_embedded_one():
    bare = load_space("sfd", {"released": None})
    assert (bare.fixed, bare.parameters, bare.points) == ({}, (), ())
    space = load_space("sfd", {"released": "sfd/cifar10", "lr": {"log": [1e-6, 1e-4]}, "batch_size": 64})
    assert [p.name for p in space.parameters] == ["lr"]
    assert space.fixed | {"lr": 1e-5} == released.converted(released.setting("sfd/cifar10").values) | {"batch_size": 64}
    assert space.points[0].source.endswith("but batch_size 64 (128)")
    assert space.points[0].values["lr"] == 1e-5


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"released": "sfd/cifr10"}, r"spaces\.sfd\.released: 'sfd/cifr10' is not a released setting; did you mean"),
        ({"released": "siss/mnist"}, "is a setting of siss, not of sfd"),
        ({"released": "sfd/cifar10", "lr": {"log": [1e-4, 1e-3]}}, "lr = 1e-05 is outside of the space"),
        ({"released": "sfd/cifar10", "because": {"lrr": "why"}}, "because: lrr is not a value that is set here"),
        ({"because": {"lr": "why"}}, "says why values differ from a released setting"),
        ({"released": ["sfd/cifar10"]}, "must be the name of a released setting, or null, not"),
        ({"released": None, "enqueue": [{"released": "nothing"}]}, "enqueue: 'nothing' is not a released setting"),
    ],
)
def test_mistakes_in_the_release_of_a_space(space, message):
    with pytest.raises(SpaceError, match=message):
        load_space("sfd", space)


def test_no_method_of_a_preset_inherits_the_embedded_space():
    with pytest.raises(ConfigError, match=r"spaces\.finetune\.released: missing"):
        load(
            presets.path_of("sfd-cifar10"),
            ("methods=[sfd, finetune]", "search.trials=4", "spaces={sfd: {released: null}}"),
            True,
        )
    more = load(presets.path_of("sfd-cifar10"), ("methods=[sfd]", "spaces={sfd: {released: null}}"), True)
    assert more.spaces == {"sfd": {"released": None}}


def test_points_are_listed_resolved_beside_their_sources():
    listed = json.loads(CliRunner().invoke(main, ["ls", "spaces", "sfd-cifar10", "--json"]).stdout)
    assert listed == json.loads(json.dumps(first_points("sfd-cifar10")))
    point = next(p for p in listed if p["name"] == "salun")
    assert set(point["values"]) == set(resolve("method", "salun").Hyperparameters.model_fields)
    assert point["values"]["alpha"]["value"] == pytest.approx(3.072)
    assert "0.001 there; DDPM/README.md" in point["values"]["alpha"]["from"]
    text = CliRunner().invoke(main, ["ls", "spaces", "sfd-cifar10"]).output
    assert re.search(
        r"^ +fake_forget +0\.01 +DDPM/configs/\*_sfd\*\.yml, distill\.sg_forget_coef *$", text, re.MULTILINE
    )
    assert re.search(r"^ +lr_fake +3e-05 +the rate of all other configs of DDPM; released: 1e-05", text, re.MULTILINE)
    assert (
        "Selective Amnesia's released config, CIFAR-10; but"
        in CliRunner().invoke(main, ["ls", "spaces", "selective_amnesia"]).output
    )
    wrong = CliRunner().invoke(main, ["ls", "spaces", "sfd-cifar"])
    assert wrong.exit_code == 2
    assert "not a preset, a config or a method; valid: rgd-cifar10-edm" in wrong.output
    assert CliRunner().invoke(main, ["ls", "runs", "sfd-cifar10"]).exit_code == 2


def test_a_task_sets_the_noise_of_the_sampler():
    plain = {"base": "x/y", "train": {"folder": "a"}, "holdout": {"folder": "b"}, "forget": {"keys": ["k"]}}
    assert ImagesTask.model_validate(plain).sampling == {"steps": 50, "guidance": 1.0}
    noisy = ImagesTask.model_validate(plain | {"eta": 1.0, "steps": 1000, "guidance": 3.0})
    assert noisy.sampling == {"steps": 1000, "guidance": 3.0, "eta": 1.0}


def test_the_search_tries_the_points_as_they_are_and_keeps_the_rest_as_released(tmp_path):
    space = next(s for s in spaces_of("siss-celebahq") if s.method == "siss")
    search = ParetoSearch(tmp_path / "study.journal", "s", [space], 6, 6, 0)
    configs = [search.suggest(f"t{k}") for k in range(6)]
    assert all(isinstance(c, dict) for c in configs)
    assert [c["source"] for c in configs[:3]] == [p.source for p in space.points] + [""]
    read = [resolve("method", "siss").Hyperparameters(**c["hyperparameters"]) for c in configs]
    assert (read[0].rho, read[0].tau, read[0].t_sampler) == (0.1, None, "uniform")
    assert (read[1].rho, read[1].tau, read[1].t_sampler, read[1].t_low) == (None, 500, "fixed", 999)
    for hp in read[2:]:
        assert (hp.tau, hp.t_sampler, hp.weight_decay, hp.batch_size) == (None, "uniform", 1e-6, 64)
        assert 0.02 <= hp.rho <= 0.5
    assert "siss.rho" not in search.study.planned[configs[1]["place"]].params  # it does not exist beside tau
