"""Evaluators on tiny models: sanity checks, determinism, and checks that fail visibly."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny import clip_model, clip_task, tiny_model

from evaluators.base import Subject, correlation, without_group
from evaluators.batches import Batches
from evaluators.fidelity import Fidelity
from evaluators.inpainting import known_part
from evaluators.judge import Judge, train_judge
from evaluators.statistics import frechet, precision_recall
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models.noise import row_seeds
from raysweep.registry import EVALUATORS, resolve
from raysweep.storage.seeds import derive_seed

# those with networks from users: test_external.py
CHECKS = tuple(name for name in EVALUATORS if EVALUATORS[name].weights is None)
TIER = Tier(
    seed=1,
    judge="probe",
    checks=CHECKS,
    groups=5,
    samples=40,
    class_samples=20,
    noises=8,
    loss_noises=6,
    loss_images=6,
    timesteps=4,
    membership_images=20,
    membership_t=(50, 150),
    membership_noises=2,
    relearn_steps=(1, 2),
    inversion_steps=2,
    sampling_steps=0,
    injection_t=600,
    injection_steps=4,
    membership_stride=10,
    recall_t=(100, 250, 400, 600, 800),
    recall_noises=4,
    likelihood_steps=4,
    likelihood_probes=2,
    strips=3,
)


QUICK = TIER.model_copy(
    update={"checks": ("classifier", "denoising", "fidelity", "generation", "loss", "reconstruction", "recall")}
)


@pytest.fixture(scope="module")
def judge(points_task):
    split = points_task.splits["judge_probe"]
    return train_judge(split.x, split.groups, seed=0, steps=60)


def subject(task, judge, model=None, **sizes):
    def seeds(stream: str, count: int) -> torch.Tensor:
        return row_seeds(derive_seed(stream), 0, count)

    tier = TIER.in_force(1000, task.sampling["steps"])
    return Subject(model or tiny_model(task), task, judge, tier.sizes() | sizes, seeds)


def assert_honest(result) -> None:
    """Each interval holds its value and has a width, or the reason says why not; rows state what replicates are made of."""
    for row in result.rows:
        where = f"{row.check}.{row.name}: {row}"
        if row.status != "ok":
            assert (row.value, row.lo, row.hi) == (None, None, None), where
            assert row.reason, where
            continue
        assert np.isfinite(row.value), where
        assert row.n > 0, where
        if row.interval == "none":
            assert (row.se, row.lo, row.hi) == (None, None, None), where
            assert row.reason, where
        else:
            assert row.lo - 1e-9 <= row.value <= row.hi + 1e-9, where
            assert row.hi - row.lo > 1e-9 or row.reason, where
        key = f"{row.check}.{row.name}"
        if key in result.values:
            assert row.value == pytest.approx(result.values[key], abs=1e-12), where


def with_oracles(task, judge, tier, count=2):
    """A tiny model as the base of its task, next to oracles that are other tiny models."""
    one = subject_of(tiny_model(task), task, judge, tier)
    others = {f"oracle-{k}": subject_of(tiny_model(task, seed=k + 1), task, judge, tier) for k in range(count)}
    one.peers = {"base": one} | others
    return one


def test_every_check_gives_rows_values_and_replicates(points_task, class_task, judge):
    for task in (points_task, class_task):
        one = with_oracles(task, judge, TIER)
        # `quantile` trains networks, takes as long as everything else together, and uses no conditions
        tier = TIER.model_copy(update={"checks": tuple(n for n in CHECKS if n != "quantile" or task.kind == "points")})
        result = measure(one, tier)
        checks = {(r.check, r.status) for r in result.rows}
        for name in tier.checks:
            # the model has no sampler to remove; the detector is an extra
            applies = task.kind in resolve("evaluator", name).kinds and name not in ("sampler_removal", "nudenet")
            assert (name, "ok" if applies else "skipped") in checks
        assert all(len(r) == TIER.groups for r in result.replicates.values())
        assert_honest(result)
        for metric in (*task.views, task.quality, "classifier.validity"):
            assert metric in result.values
        assert any(name.startswith("strip.") for name in result.scores)


def degenerate(judge):
    """A judge that takes every image for class 0."""
    constant = copy.deepcopy(judge)
    with torch.no_grad():
        constant.head.bias += 50 * torch.nn.functional.one_hot(torch.tensor(0), 6)
    return constant


ABOUT_A_CLASS = ("classifier", "per_class", "quantisation", "weight_noise", "latent_noise", "neighbours", "fidelity")
ABOUT_IMAGES = (
    "loss",
    "pia",
    "sima",
    "lira",
    "rmia",
    "reconstruction",
    "recall",
    "denoising",
    "quantisation",
    "likelihood",
)


@pytest.mark.parametrize("oracles", [0, 1, 2])
def test_intervals_are_honest_where_nothing_varies(class_task, judge, oracles):
    """Shares of 0 and 1 everywhere: an interval from the spread of samples would have no width."""
    tier = TIER.model_copy(update={"checks": ABOUT_A_CLASS})
    result = measure(with_oracles(class_task, degenerate(judge), tier, oracles), tier)
    assert_honest(result)
    rows = {f"{r.check}.{r.name}": r for r in result.rows}
    worst = rows["per_class.worst_accuracy"]
    assert worst.value == 0
    assert 0.2 < worst.hi < 0.8  # of 8 samples per class
    assert rows["classifier.recognised_corrected"].lo is None


@pytest.mark.parametrize("images", [1, 2, 3, 12])
def test_intervals_are_honest_for_few_forgotten_images(points_task, judge, images):
    holdout = points_task.splits["forget_holdout"]
    few = dataclasses.replace(points_task, splits=points_task.splits | {"forget": holdout.take(torch.arange(images))})
    for groups in (2, 5):
        tier = TIER.model_copy(update={"checks": ABOUT_IMAGES, "groups": groups})
        result = measure(with_oracles(few, judge, tier), tier)
        assert not [r for r in result.rows if r.status == "failed"]
        assert_honest(result)


def test_intervals_of_contrastive_models_are_honest(judge):
    task = clip_task()
    tier = TIER.model_copy(update={"checks": ("contrast", "quantisation", "weight_noise")})
    result = measure(subject_of(clip_model(), task, None, tier), tier)
    assert any(r.status == "ok" for r in result.rows)
    assert_honest(result)


def test_measuring_repeats_exactly(points_task, judge):
    one, two = (measure(subject_of(tiny_model(points_task), points_task, judge, QUICK), QUICK) for _ in range(2))
    assert one.values == two.values
    assert one.replicates == two.replicates


def test_a_check_that_raises_becomes_a_failed_row(points_task, judge, monkeypatch):
    def broken(self, scores, subject):
        raise RuntimeError("no weights")

    monkeypatch.setattr("evaluators.denoising.Denoising.values", broken)
    result = measure(subject_of(tiny_model(points_task), points_task, judge, QUICK), QUICK)
    failed = [r for r in result.rows if r.status == "failed"]
    assert {r.name for r in failed} == {"forget_loss", "forget_log_loss", "retain_loss", "unlabelled_log_loss"}
    assert all("no weights" in r.reason and r.value is None for r in failed)
    assert any(r.check == "fidelity" and r.status == "ok" for r in result.rows)


def test_the_loss_without_the_label_ignores_what_the_label_does(class_task, points_task, judge):
    tier = QUICK.model_copy(update={"checks": ("denoising",)})
    model, other = tiny_model(class_task), tiny_model(class_task)
    with torch.no_grad():
        other.net.class_embedding.weight[class_task.forget_class] += 5.0
    before, after = (measure(subject_of(m, class_task, judge, tier), tier).values for m in (model, other))
    assert after["denoising.forget_log_loss"] != before["denoising.forget_log_loss"]
    assert after["denoising.unlabelled_log_loss"] == before["denoising.unlabelled_log_loss"]
    with torch.no_grad():
        other.net.class_embedding.weight[model.null_label] += 5.0
    changed = measure(subject_of(other, class_task, judge, tier), tier).values
    assert changed["denoising.unlabelled_log_loss"] != before["denoising.unlabelled_log_loss"]
    picture = measure(subject_of(tiny_model(points_task), points_task, judge, tier), tier).values
    assert "denoising.unlabelled_log_loss" not in picture  # an image without a label has one loss


def test_a_model_that_gives_nan_cannot_pass(points_task, judge):
    model = tiny_model(points_task)
    with torch.no_grad():
        next(model.net.parameters()).fill_(float("nan"))
    result = measure(subject_of(model, points_task, judge, QUICK), QUICK)
    assert {r.status for r in result.rows if r.check in ("reconstruction", "denoising", "fidelity")} == {"failed"}


def test_an_image_depends_on_its_seed_alone(points_task, class_task):
    for task in (points_task, class_task):
        model = tiny_model(task)
        seeds = row_seeds(9, 0, 12)
        cond = None if task.kind == "points" else torch.arange(12) % 6
        whole = model.sample(cond, seeds, steps=4, guidance=1.5 if cond is not None else 1.0)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        shuffled = model.sample(
            None if cond is None else cond[order], seeds[order], 4, 1.5 if cond is not None else 1.0, batch=5
        )
        torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=0)


def test_images_are_bit_identical_for_any_batch_composition(points_task, class_task, judge):
    """For any number of images requested at once, in any order, and for requests split in parts."""
    for task in (points_task, class_task):
        one = subject(task, judge)
        seeds = row_seeds(9, 0, 120)
        cond = None if task.kind == "points" else torch.arange(120) % 6
        whole = one.generate(cond, seeds)
        order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
        labels = None if cond is None else cond[order]
        assert torch.equal(one.generate(labels, seeds[order]), whole[order])
        for low, high in ((0, 1), (3, 50), (7, 118)):
            part = one.generate(None if cond is None else cond[low:high], seeds[low:high])
            assert torch.equal(part, whole[low:high])
        x0 = task.splits["retain"].x[torch.arange(60) % 30]
        rebuilt = one.reconstruct(x0, seeds[:60], 400, 3, None if cond is None else cond[:60])
        some = one.reconstruct(x0[5:9], seeds[5:9], 400, 3, None if cond is None else cond[5:9])
        assert torch.equal(some, rebuilt[5:9])
        known = known_part(60, (4, 4), 1 / 2)
        completed = one.complete(x0, known, None if cond is None else cond[:60], seeds[:60])
        some = one.complete(x0[5:9], known[5:9], None if cond is None else cond[5:9], seeds[5:9])
        assert torch.equal(some, completed[5:9])


def test_half_precision_is_for_sampling_only(class_task, judge):
    one, half = (subject(class_task, judge, precision=p) for p in ("fp32", "bf16"))
    cond, seeds = torch.arange(60) % 6, row_seeds(9, 0, 60)
    whole, drawn = one.generate(cond, seeds), half.generate(cond, seeds)
    assert drawn.dtype == torch.float32
    assert not torch.equal(drawn, whole)
    assert float(correlation(drawn, whole).min()) > 0.98
    assert torch.equal(half.generate(cond[3:50], seeds[3:50]), drawn[3:50])
    x0 = class_task.splits["retain"].x[:8]
    rebuilt = [s.reconstruct(x0, seeds[:8], 400, 3, cond[:8]) for s in (one, half)]
    assert not torch.equal(*rebuilt)
    tiers = [QUICK.model_copy(update={"checks": ("denoising", "loss"), "precision": p}) for p in ("fp32", "bf16")]
    fp32, bf16 = (measure(subject_of(tiny_model(class_task), class_task, judge, t), t) for t in tiers)
    assert fp32.values == bf16.values
    assert tiers[0].digest != tiers[1].digest


def test_sampling_agrees_with_diffusers(points_task):
    from diffusers import DDIMPipeline

    model = tiny_model(points_task)
    seeds = row_seeds(1, 0, 3)
    noise = model.noise(seeds)
    pipeline = DDIMPipeline(model.net, model.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps(4)
    x = noise
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(model.net(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(model.sample(None, seeds, steps=4), x.clamp(-1, 1), atol=1e-6, rtol=0)


def test_reconstruction_starts_from_the_noised_image(points_task):
    model = tiny_model(points_task)
    x0 = points_task.splits["retain"].x[:4]
    near = model.reconstruct(x0, row_seeds(2, 0, 4), t=2, steps=1)
    assert float(correlation(near, x0).min()) > 0.9


def test_correlation():
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(correlation(x, 2 * x + 1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(correlation(x, -x), -torch.ones(3, dtype=torch.float64))


def test_features_depend_on_the_judge_and_a_set_has_no_distance_to_itself(points_task, judge):
    one = subject(points_task, judge)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = subject(points_task, Judge(1, 6).eval())
    assert frechet(one.features(), one.reference_features()) != pytest.approx(
        frechet(other.features(), other.reference_features())
    )
    real = one.reference_features()
    assert frechet(real, real) == pytest.approx(0, abs=1e-4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(one.features(), real) == precision_recall(real, one.features())[::-1]


def test_distance_grows_with_noise(points_task, judge):
    reference = Batches().evaluate(judge.features, points_task.splits["retain"].x)
    clean, g = points_task.splits["holdout"].x, torch.Generator().manual_seed(0)
    values = [
        frechet(Batches().evaluate(judge.features, clean + s * torch.randn(clean.shape, generator=g)), reference)
        for s in (0, 0.5, 1.5)
    ]
    assert values == sorted(values)


def test_leaving_groups_out(points_task, judge):
    scores = {"a": np.arange(12), "few": np.arange(3)}
    parts = [without_group(scores, g, 5) for g in range(5)]
    assert sum(len(p["a"]) for p in parts) == 4 * 12
    assert all(len(p["few"]) == 3 for p in parts)
    one = subject(points_task, judge)
    assert Fidelity().values({"features": one.features()}, one)["frechet"] > 0


def overfitted(task, steps=250):
    from methods.retrain import Retrain, RetrainSettings

    model = tiny_model(task)
    method = Retrain(model, RetrainSettings(steps=steps, split="retain", batch_size=36, lr=5e-3, ema=0.9))
    for step in range(steps):
        method.step(task.batch(method.draws(), 0, step))
    method.finish()
    return model


def test_judges_are_reproducible_and_accurate(points_task, judge):
    split = points_task.splits["judge_probe"]
    other = train_judge(split.x, split.groups, seed=0, steps=60)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), other.state_dict().values(), strict=True))
    held = points_task.splits["holdout"]
    assert (Batches().evaluate(judge, held.x).argmax(1) == held.groups.numpy()).mean() > 0.9
