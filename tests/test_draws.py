"""What an audit draws: unpredictable, spread over the valid range, recorded before anything is measured, and reproducible."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import tiny_model, tiny_task

import raysweep
from raysweep.auditing.measure import measure, subject_of
from raysweep.config import draws
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Tier
from raysweep.engine.attempt import attempt
from raysweep.rundir import RunDir

DRAWN = (
    "injection_steps",
    "injection_t",
    "likelihood_steps",
    "loss_t",
    "membership_stride",
    "membership_t",
    "recall_t",
    "sampling_steps",
)
AUDIT = Tier(judge="audit")
SEEDS = range(300)


def in_force(seed: int, schedule: int = 1000, steps: int = 10, **settings) -> Tier:
    return AUDIT.model_copy(update={"seed": seed} | settings).in_force(schedule, steps)


@pytest.mark.parametrize("schedule", [20, 100, 1000, 4000])
def test_every_seed_covers_the_range_and_no_timestep_is_certain(schedule):
    tiers = [in_force(seed, schedule) for seed in SEEDS]
    for tier in tiers:
        for k, t in enumerate(tier.loss_t):
            assert k * schedule <= t * len(tier.loss_t) + len(tier.loss_t) - 1
            assert t * len(tier.loss_t) < (k + 1) * schedule
        for name in ("membership_t", "recall_t"):
            values = getattr(tier, name)
            assert list(values) == sorted(set(values))
            assert all(0 < t < schedule for t in values)
        assert 0.5 * schedule - 1 < tier.injection_t < 0.7 * schedule
        assert tier.injection_steps <= tier.injection_t
        assert 1 <= tier.membership_stride <= max(1, round(0.013 * schedule))
        assert 6 <= tier.sampling_steps <= 15
    if schedule < 1000:
        return
    assert all(len(tier.membership_t) == len(tier.recall_t) == 5 for tier in tiers)
    for name in ("loss_t", "membership_t", "recall_t"):
        _, counts = np.unique([getattr(tier, name) for tier in tiers], return_counts=True)
        assert counts.max() < 0.25 * len(SEEDS), name
    assert {tier.sampling_steps for tier in tiers} == set(range(6, 16))
    assert {round(tier.membership_stride * 1000 / schedule) for tier in tiers} == set(range(7, 14))
    assert len({tier.injection_t for tier in tiers}) > 100


def test_the_seed_alone_decides_and_given_values_stay():
    assert in_force(7) == in_force(7)
    assert in_force(7).in_force(1000, 10) == in_force(7)
    assert all(
        getattr(in_force(7), name) != getattr(in_force(8), name) for name in ("loss_t", "recall_t", "injection_t")
    )
    given = {"injection_t": 10, "loss_t": (3,), "membership_t": (20, 50), "sampling_steps": 7}
    tier = in_force(7, **given)
    assert {name: getattr(tier, name) for name in given} == given
    assert tier.recall_t == in_force(7).recall_t
    assert tier.injection_steps <= 10
    assert in_force(7, sampling_steps=0).sampling_steps == 10
    with pytest.raises(ValueError, match="no seed"):
        AUDIT.in_force(1000, 10)


@pytest.mark.parametrize(("steps", "schedule", "low", "high"), [(1, 1000, 1, 1), (2, 1000, 2, 3), (50, 50, 30, 50)])
def test_the_number_of_sampling_steps_suits_the_sampler(steps, schedule, low, high):
    """A generator of one step keeps it, and DDIM has no more steps than its schedule."""
    numbers = {in_force(seed, schedule, steps).sampling_steps for seed in SEEDS}
    assert (min(numbers), max(numbers)) == (low, high)


def test_models_without_a_schedule_or_a_sampler_draw_nothing():
    tier = AUDIT.model_copy(update={"seed": 7}).in_force(None, None)
    assert all(getattr(tier, name) is None for name in DRAWN)


def test_fresh_seeds_differ_and_fit_into_tables():
    seeds = {draws.fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**63


def test_the_probe_draws_no_number_of_steps_and_the_same_timesteps_in_every_search():
    probe = load(None).audit.probe
    tier = probe.in_force(1000, 10)
    assert (tier.seed, tier.sampling_steps, tier.injection_t, tier.injection_steps) == (1, 10, 600, 12)
    assert tier == probe.in_force(1000, 10)


@pytest.fixture
def sweep(tmp_path):
    return load(None, (f"storage={tmp_path}", f"cache={tmp_path / 'cache'}", "name=drawn", "audit.audit.recall_t=[30]"))


def test_an_attempt_records_what_it_draws_and_the_next_keeps_it(sweep):
    folder, task = RunDir.of(sweep), tiny_task()
    with attempt(folder, sweep, task) as first:
        recorded = folder.read_manifest()["drawn"][""]
        assert recorded["audit"]["seed"] == first.audit.audit.seed
        assert set(recorded["durability"]) == {"seed", *DRAWN}
        assert set(recorded["audit"]) == {"seed", *DRAWN} - {"recall_t"}  # which the config gives
    with attempt(folder, sweep, task) as again:
        assert again == first
    assert first.audit.probe == sweep.audit.probe
    seeds = {first.audit.audit.seed, first.audit.durability.seed, first.audit.round(2)[1].seed}
    assert len(seeds) == 3
    other = sweep.model_copy(update={"name": "other"})
    with attempt(RunDir.of(other), other, task) as fresh:
        assert fresh.audit.audit.seed != first.audit.audit.seed
        assert other.digest == sweep.digest == folder.read_manifest()["config_digest"]


def test_the_recipe_in_force_reproduces_the_draw_and_resumes_the_run(sweep, tmp_path):
    folder, task = RunDir.of(sweep), tiny_task()
    with attempt(folder, sweep, task) as first:
        pass
    assert folder.in_force() == first
    (tmp_path / "recipe.yaml").write_text(folder.in_force().recipe())
    recipe = load(tmp_path / "recipe.yaml")
    assert recipe == first
    copy = recipe.model_copy(update={"name": "copy"})
    with attempt(RunDir.of(copy), copy, task) as second:
        assert second.audit == first.audit
    with attempt(folder, recipe, task) as resumed:
        assert resumed == first
    with attempt(folder, sweep, task) as resumed:  # still by the config that it began with
        assert resumed == first
    forged = load(tmp_path / "recipe.yaml", ("audit.audit.seed=5",))
    with pytest.raises(ConfigError, match="belongs to a run of another config"), attempt(folder, forged, task):
        pass


def test_each_model_that_is_audited_alone_has_its_own_draw(sweep):
    folder, task = RunDir.of(sweep), tiny_task()
    with attempt(folder, sweep, task, subject="a@1") as one:
        pass
    with attempt(folder, sweep, task, subject="b@2") as other:
        pass
    with attempt(folder, sweep, task, subject="a@1") as again:
        pass
    assert one == again
    assert one.audit.audit.seed != other.audit.audit.seed
    assert set(folder.read_manifest()["drawn"]) == {"a@1", "b@2"}


def test_measuring_in_process_says_what_it_drew_and_repeats_it(tmp_path):
    task = tiny_task()
    sizes = {"samples": 20, "groups": 5, "loss_noises": 5, "noises": 5}
    checks = ["denoising", "reconstruction"]
    one, other = (raysweep.measure(tiny_model(task), task, checks, cache=tmp_path, **sizes) for _ in range(2))
    assert one["value"] != other["value"]
    settings = json.loads(one.schema.metadata[b"settings"])
    again = raysweep.measure(tiny_model(task), task, checks, cache=tmp_path, **sizes, seed=settings["seed"])
    assert again.equals(one)
    assert json.loads(again.schema.metadata[b"settings"]) == settings


def test_evaluators_use_what_is_in_force():
    task = tiny_task()
    tier = Tier(judge="audit", seed=11, checks=("denoising", "recall"), groups=5, loss_noises=5, recall_noises=2)
    asked, grids = [], set()

    class Watched(type(tiny_model(task))):
        def reconstruct(self, x0, seeds, t, *args, **kwargs):
            asked.append(t)
            return super().reconstruct(x0, seeds, t, *args, **kwargs)

        def predict(self, x_t, t, cond):
            grids.update(t.tolist())
            return super().predict(x_t, t, cond)

    model = tiny_model(task)
    model.__class__ = Watched
    measure(subject_of(model, task, None, tier), tier)
    now = tier.in_force(1000, 4)
    assert sorted(set(asked)) == list(now.recall_t)
    assert set(now.loss_t) <= grids
