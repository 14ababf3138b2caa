"""Prepared tensors: made once per setting that matters, shared by trials, made again if they differ from the card."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_model, tiny_task

import methods.slug
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.request import AuditRequest
from raysweep.config.schema import Tier
from raysweep.context import Context, Prepared, prepared_key
from raysweep.engine.cached_jobs import preparation_defaults, prepares
from raysweep.engine.prepare import open_choices
from raysweep.registry import METHODS, resolve
from raysweep.search import spaces
from raysweep.search.spaces import Parameter, Point, Space, SpaceError
from raysweep.storage.cache import load_tensors
from raysweep.storage.files import digest_state
from raysweep.train.jobs import Job, finished
from raysweep.train.loop import Resident, run


@pytest.fixture
def folder(tmp_path):
    task = tiny_task("class")
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    tiny_model(task, seed=1).save(tmp_path / "base")
    return tmp_path


def job(folder, kind: str, name: str, out: str, **more) -> Job:
    paths = {"task": str(folder / "task"), "base": str(folder / "base"), "out": str(folder / out)}
    return Job(id=out, kind=kind, method=name, seed=3, **paths, **{"hyperparameters": {}} | more)


def test_a_hundred_edits_cost_two_gradient_passes(folder, monkeypatch):
    passes, real = [], methods.slug.gradient_pass
    monkeypatch.setattr(methods.slug, "gradient_pass", lambda *a: (passes.append(a[2]), real(*a))[1])
    resident, settings = Resident(), {"passes": 2}
    prepared = job(folder, "prepare", "slug", "p.safetensors", hyperparameters=settings)
    assert run(prepared, resident).status == "ok"
    layers = resolve("method", "slug").choices(
        "layer", load_tensors(folder / "p.safetensors"), resolve("method", "slug").Hyperparameters(candidates="all")
    )
    digests = set()
    for k in range(100):
        hp = settings | {"layer": layers[k % len(layers)], "step": 0.01 * 1.05**k}
        outcome = run(job(folder, "train", "slug", f"t{k}", hyperparameters=hp, prepared=prepared.out), resident)
        assert outcome.status == "ok", outcome.reason
        digests.add(outcome.digest)
    assert passes == ["forget", "retain"]
    assert len(digests) == 100


def test_a_file_that_differs_from_its_card_is_made_again(folder):
    prepared = job(folder, "prepare", "salun", "p.safetensors")
    assert finished(prepared) is None
    first = run(prepared, Resident())
    assert finished(prepared) == first
    path = folder / "p.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(broken)
        assert finished(prepared) is None
        assert run(prepared, Resident()).digest == first.digest
        assert path.read_bytes() == whole
    other = job(folder, "prepare", "salun", "p.safetensors", inputs={"base": "another"})
    assert finished(other) is None
    card = json.loads((folder / "p.json").read_text())
    assert card["job"]["method"] == "salun"
    assert card["outcome"]["digest"] == first.digest == digest_state(load_tensors(path))
    (folder / "p.json").write_text("{")
    assert finished(prepared) is None


def test_settings_that_matter_decide_what_is_prepared():
    space = Space(
        "selective_amnesia",
        {"replay_per_class": 4},
        (Parameter("guidance", "choice", (1.0, 2.0), {}), Parameter("lr", "log", (1e-4, 1e-3), {})),
        (Point("a", {"guidance": 2.0, "fisher_per_class": 3}), Point("b", {"lr": 1e-4})),
    )
    by = resolve("method", "selective_amnesia").prepared_by
    assert space.variants(by) == [
        {"replay_per_class": 4, "guidance": 1.0},
        {"replay_per_class": 4, "guidance": 2.0},
        {"replay_per_class": 4, "guidance": 2.0, "fisher_per_class": 3},
    ]
    ranged = Space("slug", {}, (Parameter("passes", "int", (1, 8), {}),), ())
    with pytest.raises(SpaceError, match="decides what is prepared"):
        ranged.variants(("passes",))


def test_every_shipped_space_prepares_what_its_trials_ask_for():
    for name in METHODS:
        method, space = resolve("method", name), spaces.load(name)
        if not prepares(method):
            continue
        defaults = preparation_defaults(method)
        keys = {prepared_key(defaults, v) for v in space.variants(method.prepared_by)}
        for point in space.points:
            assert prepared_key(defaults, space.fixed | point.values) in keys


def test_choices_come_from_the_prepared_model(folder):
    space = spaces.load("slug", {"passes": 2})
    assert any(p.open for p in space.parameters)
    prepared = job(folder, "prepare", "slug", "p.safetensors", hyperparameters={"passes": 2, "batch_size": 64})
    assert run(prepared, Resident()).status == "ok"
    defaults = preparation_defaults(resolve("method", "slug"))
    files = {prepared_key(defaults, {"passes": 2, "batch_size": 64}): prepared.out}
    context = Context(
        run=str(folder),
        run_id="r",
        task_digest="",
        quality="",
        validity="",
        base="",
        base_digest="",
        oracles={},
        judges={},
        prepared={"slug": Prepared(defaults, files)},
        cache="",
    )
    layer = next(p for p in open_choices(space, context).parameters if p.name == "layer")
    assert layer.values[:3] == ("deepest", "importance", "alignment")
    names = {n for n, _ in tiny_model(tiny_task("class")).net.named_parameters()}
    assert set(layer.values[3:]) <= names
    assert context.prepared_file("slug", space.fixed | {"layer": "deepest"}) == prepared.out
    assert context.prepared_file("rgd", {}) is None


def test_what_depends_on_data_and_judge_alone_is_computed_once(folder):
    calls, new_auditor = [], Auditor.__ray_metadata__.modified_class

    def kept(key: str, judge_digest: str = "j") -> np.ndarray:
        """Features that a fresh auditor computes or reads."""
        request = AuditRequest(
            subject="s",
            method="",
            model=str(folder / "base"),
            digest="m",
            tier_name="probe",
            tier=Tier(seed=1, judge="probe"),
            judge="",
            judge_digest=judge_digest,
            task=str(folder / "task"),
            task_digest="t",
            run=str(folder),
            references=str(folder / "references"),
        )
        return new_auditor().subject(request).keep(key, features)

    def features() -> np.ndarray:
        calls.append(1)
        return np.arange(6.0).reshape(2, 3)

    np.testing.assert_array_equal(kept("reference"), features())
    calls.clear()
    np.testing.assert_array_equal(kept("reference"), np.arange(6.0).reshape(2, 3))
    assert not calls
    kept("another")
    kept("reference", judge_digest="another judge")
    assert len(calls) == 2
    for path in (folder / "references").iterdir():
        path.write_bytes(b"cut")
    kept("reference")
    assert len(calls) == 3
