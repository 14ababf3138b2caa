"""Reconstruction curve, extraction, likelihood by the probability flow, and retained classes one by one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_evaluators import overfitted, subject
from test_external import Real
from tiny import tiny_model

from evaluators.base import without_group
from evaluators.batches import Batches
from evaluators.classifier import Classifier, confusion
from evaluators.fidelity import Fidelity
from evaluators.judge import Judge, train_judge
from evaluators.likelihood import Likelihood, bits_per_dimension, log_density
from evaluators.memorisation import Neighbours, Recall
from evaluators.per_class import PerClass
from evaluators.statistics import diversity, inception_score


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(1, 6).eval()


@pytest.fixture(scope="module")
def good_judge(class_task):
    split = class_task.splits["judge_probe"]
    return train_judge(split.x, split.groups, seed=0, steps=60)


@pytest.fixture(scope="module")
def memorised(points_task):
    """A task whose forgotten images are 18 digits that a model has memorised, and 18 of the same kind that it never saw."""
    splits = points_task.splits
    learned = dataclasses.replace(
        points_task, splits=splits | {"retain": splits["retain"].take(torch.arange(0, 36, 2))}
    )
    model = overfitted(learned, 300)
    known = splits | {"forget": learned.splits["retain"], "forget_holdout": splits["holdout"].take(torch.arange(18))}
    task = dataclasses.replace(points_task)
    object.__setattr__(task, "splits", known)  # forget and retain overlap on purpose, which a task refuses
    return task, model


class Gaussian:
    """The exact denoiser of images that are N(mean, spread^2) in every pixel."""

    def __init__(self, mean: torch.Tensor, spread: float, alphas: torch.Tensor):
        self.mean, self.spread, self.alphas = mean, spread, alphas

    def levels(self):
        return ((1 - self.alphas) / self.alphas).sqrt()

    def eps_at(self, x, s, cond):
        return s * (x - self.mean) / (self.spread**2 + s**2)


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_the_likelihood_of_a_gaussian_is_exact(points_task, spread):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn((1, 3, 3), generator=g, dtype=torch.float64) / 3
    model = Gaussian(mean, spread, tiny_model(points_task).alphas)
    x = mean + spread * torch.randn((6, 1, 3, 3), generator=g, dtype=torch.float64)
    probes = torch.randn((3, 1, 3, 3), generator=g, dtype=torch.float64).sign()
    variance = spread**2 + float(model.levels()[0]) ** 2
    exact = -0.5 * ((x - mean).flatten(1).square().sum(1) / variance + 9 * math.log(2 * math.pi * variance))
    errors = [float((log_density(model, x, None, probes, n) - exact[:, None]).abs().max()) for n in (8, 16, 32)]
    assert errors[2] < 0.05
    assert errors[0] > errors[1] > errors[2]


def test_the_noise_levels_between_steps(points_task):
    for prediction in ("epsilon", "v_prediction"):
        config = points_task.model | {"scheduler": points_task.model["scheduler"] | {"prediction_type": prediction}}
        model = type(tiny_model(points_task)).build(config, 0)
        model.net.double()
        x0, eps = points_task.splits["retain"].x[:2].double(), model.noise(torch.arange(2))
        for t in (0, 137, 999):
            times = torch.full((2,), t)
            gamma, _ = model.gamma_sigma(times)
            x_t = model.add_noise(x0, eps, times)
            with torch.no_grad():
                at_level = model.eps_at(x_t / gamma, float(model.levels()[t]), None)
                at_step = model.eps(x_t, times, None)
            torch.testing.assert_close(at_level, at_step, rtol=1e-6, atol=1e-7)


def test_remembered_images_are_likelier_and_batches_do_not_matter(memorised, judge):
    task, model = memorised
    one = subject(task, judge, model=model, likelihood_steps=10, membership_images=18)
    scores = Likelihood().scores(one)
    values = Likelihood().values(scores, one)
    assert values["excess"] > 0.3
    assert values["excess"] == pytest.approx(scores["forget_holdout"].mean() - scores["forget"].mean())
    never = subject(task, judge, likelihood_steps=10, membership_images=18)
    assert abs(Likelihood().values(Likelihood().scores(never), never)["excess"]) < 0.1
    probes = one.model.noise(one.seeds("likelihood", one.sizes["likelihood_probes"])).sign()
    in_batches = bits_per_dimension(model, task.splits["forget"], probes, 10, Batches(5))
    np.testing.assert_allclose(in_batches, scores["forget"], rtol=1e-4)


def test_the_reconstruction_curve_of_memorised_images(memorised, judge):
    task, model = memorised
    known, unknown = subject(task, judge, model=model), subject(task, judge)
    scores = Recall().scores(known)
    assert scores["forget"].shape == (known.sizes["recall_noises"], len(known.sizes["recall_t"]), 18)
    by_step = scores["forget"].mean((0, 2))
    assert by_step[0] > 0.9 > by_step[-1]
    values = Recall().values(scores, known)
    assert values["excess"] > 0.01
    assert values["excess"] > abs(Recall().values(Recall().scores(unknown), unknown)["excess"])
    curve = scores | {"forget": scores["forget_holdout"] - 1}
    assert Recall().values(curve, known)["reach"] == 0
    assert Recall().values(scores | {"forget": scores["forget_holdout"] + 1}, known)["reach"] == 0.8


def test_extraction_counts_images_not_samples(points_task, judge):
    splits = points_task.splits
    forget = splits["forget"].distinct()
    one = subject(points_task, judge)
    one.once("samples", lambda: (torch.cat([forget.x[:1].repeat(8, 1, 1, 1), torch.rand(32, 1, 4, 4) * 2 - 1]), None))
    values = Neighbours().values(Neighbours().scores(one), one)
    assert values["extracted"] == 1
    assert values["rate"] == pytest.approx(8 / 40)
    assert values["holdout_rate"] == 0
    # a copy of a forgotten image is also close to others of its kind, and does not copy those
    kin = dataclasses.replace(points_task)
    object.__setattr__(kin, "splits", splits | {"forget_holdout": dataclasses.replace(forget, x=forget.x * 0.9)})
    near = subject(kin, judge)
    near.once("samples", one.samples)
    assert Neighbours().values(Neighbours().scores(near), near)["holdout_rate"] == 0
    lean = subject(points_task, judge)
    lean.once("samples", lambda: (splits["retain"].x[:36] + 0.01, None))
    assert Neighbours().values(Neighbours().scores(lean), lean)["log_ratio"] < -1
    away = subject(points_task, judge)
    away.once("samples", lambda: (splits["holdout"].x[:36] + 0.01, None))
    assert Neighbours().values(Neighbours().scores(away), away)["log_ratio"] > 1


def test_each_retained_class(class_task, good_judge):
    real = subject(class_task, good_judge, model=Real(class_task), samples=60)
    scores = PerClass().scores(real)
    values = PerClass().values(scores, real)
    assert values["worst_accuracy"] > 0.8
    classes = np.unique(class_task.splits["retain"].groups)
    assert {n for n in values if n.startswith("kid@")} == {f"kid@{c}" for c in classes}
    near = PerClass().nearest(real)
    assert len(near) == 2
    assert class_task.forget_class not in near
    # one class comes out as noise: only its metrics change
    column = classes.tolist().index(near[0])
    hurt = {name: array.copy() for name, array in scores.items()}
    hurt["right"][:, column] = 0
    hurt["features"][:, column] = 5
    after = PerClass().values(hurt, real)
    assert after["worst_accuracy"] == after[f"accuracy@{near[0]}"] == 0
    assert after["nearest_kid"] > values["nearest_kid"] + 0.1
    assert {n for n in values if "@" in n and after[n] != values[n]} == {f"kid@{near[0]}", f"accuracy@{near[0]}"}
    assert len(without_group(scores, 0, 5)["right"]) == len(scores["right"]) - math.ceil(len(scores["right"]) / 5)


def test_where_samples_of_the_forgotten_label_go(class_task, good_judge):
    real = subject(class_task, good_judge, model=Real(class_task), class_samples=40)
    scores = Classifier().scores(real)
    values = Classifier().values(scores, real)
    shares = [values[f"goes_to@{c}"] for c in range(6)]
    assert sum(shares) == pytest.approx(1)
    assert shares[class_task.forget_class] == pytest.approx(values["recognised"])
    np.testing.assert_allclose(confusion(real).sum(0), 1)
    moved = scores | {"forget_class": np.array([0.0] * 30 + [1.0] * 10)}
    values = Classifier().values(moved, real)
    assert (values["goes_to@0"], values["goes_to@1"]) == (0.75, 0.25)
    # a judge that takes a fifth of another class for the forgotten one
    forgotten = class_task.forget_class
    table = np.eye(6)
    table[0, 0], table[forgotten, 0] = 0.8, 0.2
    wrong = subject(class_task, good_judge, model=Real(class_task))
    wrong.once("confusion", lambda: table)
    mixed = scores | {"forget_class": np.array([0.0] * 32 + [float(forgotten)] * 8)}
    values = Classifier().values(mixed, wrong)
    assert values["recognised"] == pytest.approx(0.2)
    assert values["recognised_corrected"] == pytest.approx(0, abs=1e-3)


def test_inception_score_and_diversity(class_task, good_judge):
    certain = np.tile(np.eye(5) * 1000, (4, 1))
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(np.zeros((20, 5))) == pytest.approx(1)
    assert diversity(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)
    real = class_task.splits["retain"].x
    one = subject(class_task, good_judge, full_fidelity=True)
    one.once("samples", lambda: (real[:1].expand(40, -1, -1, -1), None))
    values = Fidelity().values(Fidelity().scores(one), one)
    assert values["diversity"] == pytest.approx(0, abs=1e-9)
    assert values["inception_score"] == pytest.approx(1)
