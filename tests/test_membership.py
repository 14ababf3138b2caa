"""Membership inference: formulas and costs of the attacks, calibration without the forget set, gaps, power."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from test_evaluators import overfitted, subject
from tiny import tiny_model

from evaluators import attacks
from evaluators.base import Inapplicable
from evaluators.batches import Batches
from evaluators.judge import Judge
from evaluators.membership import PIA, PIAN, RMIA, CLiD, LiRA, Loss, Quantile, SecMI, SimA, calibrate
from evaluators.oracles import compare_auc
from evaluators.statistics import delong, paired_gap

GRID = (20, 100, 300)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge(1, 6).eval()


@pytest.fixture(scope="module")
def few(points_task):
    """A task with few retained images, which a model can memorise, and a large holdout."""
    splits = points_task.splits
    more = torch.cat([splits["judge_probe"].x, splits["judge_audit"].x, splits["holdout"].x])
    holdout = dataclasses.replace(splits["holdout"], x=more, groups=torch.zeros(len(more), dtype=torch.long))
    retain = splits["retain"].take(torch.arange(0, 36, 2))
    return dataclasses.replace(points_task, splits=splits | {"retain": retain, "holdout": holdout})


@pytest.fixture(scope="module")
def learned(few):
    return overfitted(few, 400)


def passes(model, work) -> int:
    """Number of images that pass through the network during `work`."""
    seen = []
    handle = model.net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    work()
    handle.remove()
    return sum(seen)


def test_costs(points_task):
    model, x = tiny_model(points_task), points_task.splits["retain"].x[:3]
    noises = model.noise(torch.arange(4))
    assert passes(model, lambda: attacks.loss(model, x, None, GRID, noises)) == 3 * 4 * len(GRID)
    assert passes(model, lambda: attacks.pia(model, x, None, GRID)) == 3 * (len(GRID) + 1)
    assert passes(model, lambda: attacks.sima(model, x, None, GRID)) == 3 * len(GRID)
    assert passes(model, lambda: attacks.secmi(model, x, None, GRID)) == 3 * (300 // 10 + 1 + len(GRID))


def test_formulas_by_hand(points_task):
    model, x = tiny_model(points_task), points_task.splits["retain"].x[:2]
    t = torch.full((2,), 100)
    alpha = model.alphas[100].float()
    with torch.no_grad():
        eps0 = model.eps(x, torch.zeros(2, dtype=torch.long), None)
        at = model.eps(alpha.sqrt() * x + (1 - alpha).sqrt() * eps0, t, None)
        clean = model.eps(x, t, None)
        noise = model.noise(torch.arange(1))
        drawn = model.eps(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, None)
    expected = -(eps0 - at).double().abs().pow(4).flatten(1).sum(1)
    np.testing.assert_allclose(attacks.pia(model, x, None, (100,))[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(
        attacks.sima(model, x, None, (100,))[:, 0], -clean.double().pow(4).flatten(1).sum(1), rtol=1e-5
    )
    expected = -(noise - drawn).double().square().flatten(1).mean(1)
    np.testing.assert_allclose(attacks.loss(model, x, None, (100,), noise)[:, 0], expected, rtol=1e-5)


def test_a_network_that_always_predicts_the_same_noise_is_inverted_without_error(points_task):
    """With constant eps the DDIM path is a straight line, so a step up and back returns; so does proximal initialisation."""
    model, x = tiny_model(points_task), points_task.splits["retain"].x[:4]
    constant = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    model.eps = lambda x_t, t, cond: constant.expand_as(x_t)
    assert np.abs(attacks.secmi(model, x, None, GRID)).max() < 1e-8
    assert np.abs(attacks.pia(model, x, None, GRID)).max() < 1e-20


@pytest.mark.parametrize("attack", [Loss, SecMI, PIA, PIAN, SimA])
def test_scores_do_not_depend_on_the_batch(points_task, judge, attack):
    images = points_task.splits["retain"]
    whole = attack().score(subject(points_task, judge), images)
    one_by_one = subject(points_task, judge)
    one_by_one.batches = Batches(1)
    alone = attack().score(one_by_one, images.take(torch.tensor([7])))
    np.testing.assert_allclose(alone[0], whole[7], rtol=1e-4)


@pytest.mark.parametrize("attack", [Loss, SecMI, PIA, PIAN, SimA, CLiD])
def test_attacks_use_the_batches_of_the_subject(class_task, judge, attack):
    sizes = []

    class Recorded(Batches):
        def map(self, function, count):
            sizes.append(self.size)
            return super().map(function, count)

    small = subject(class_task, judge)
    small.batches = Recorded(3)
    attack().scores(small)
    assert set(sizes) == {3}


def test_only_the_loss_draws_noise(points_task, judge):
    one, other = subject(points_task, judge), subject(points_task, judge)
    other.seeds = lambda stream, n: torch.arange(n) + 99
    images = points_task.splits["retain"]
    for attack, draws in ((Loss, True), (SecMI, False), (PIA, False), (PIAN, False), (SimA, False)):
        assert np.array_equal(attack().score(one, images), attack().score(other, images)) != draws


@pytest.mark.parametrize(("attack", "least"), [(Loss, 0.9), (SimA, 0.9), (PIAN, 0.8), (SecMI, 0.65), (PIA, 0.65)])
def test_an_overfitted_model_is_flagged_and_a_fresh_one_is_not(few, judge, learned, attack, least):
    def auc(model):
        s = subject(few, judge, model, membership_t=(50, 100, 200), membership_images=200)
        return attack().values(attack().scores(s), s)["retain_auc"]

    assert auc(learned) > least
    assert abs(auc(tiny_model(few)) - 0.5) < 0.3  # nine images against some sixty: an error of 0.1


def test_shuffled_labels_give_chance(few, judge, learned):
    raw = Loss().raw(subject(few, judge, learned, membership_images=200))
    mixed = np.concatenate([raw["retain"], raw["holdout"]])[:, 0]
    rng = np.random.default_rng(0)
    aucs = []
    for _ in range(200):
        rng.shuffle(mixed)
        aucs.append(delong(mixed[:9], mixed[9:])[0])
    assert abs(np.mean(aucs) - 0.5) < 0.03


def test_the_sign_of_an_inverted_attack_is_calibrated(few, judge, learned):
    class Inverted(Loss):
        name = "inverted"

        def score(self, subject, images):
            return -super().score(subject, images)

    s = subject(few, judge, learned, membership_images=200)
    straight, inverted = (attack.values(attack.scores(s), s) for attack in (Loss(), Inverted()))
    assert inverted == pytest.approx(straight)
    assert Inverted().scores(s)["calibration"][0, 1] == -Loss().scores(s)["calibration"][0, 1]


def test_calibration_never_sees_the_forget_set(few, judge, learned):
    others = dataclasses.replace(few.splits["forget"], x=torch.rand(4, 1, 4, 4))
    train = dataclasses.replace(few.splits["train"], x=torch.cat([few.splits["retain"].x, others.x]))
    swapped = dataclasses.replace(few, splits=few.splits | {"forget": others, "train": train})
    a, b = (Loss().scores(subject(task, judge, learned))["calibration"] for task in (few, swapped))
    np.testing.assert_array_equal(a, b)


def test_the_base_calibrates_for_all(few, judge, learned):
    base, candidate = subject(few, judge, learned), subject(few, judge, tiny_model(few, seed=5))
    candidate.peers = {"base": base}
    raw = Loss().raw(base)
    expected = calibrate(raw["retain_calibration"], raw["holdout_calibration"])
    np.testing.assert_array_equal(Loss().scores(candidate)["calibration"][0], expected)


def test_a_sign_is_flipped_only_by_evidence():
    rng = np.random.default_rng(0)
    members, others = rng.normal(size=(60, 6)), rng.normal(size=(60, 6))
    assert calibrate(members, others)[1] == 1
    signs = [calibrate(rng.normal(size=(40, 6)), rng.normal(size=(40, 6)))[1] for _ in range(200)]
    assert signs.count(-1) <= 12  # at most 5 % one-sided over all columns together
    members[:, 2] -= 2
    assert calibrate(members, others) == (2, -1)
    members[:, 4] += 4
    assert calibrate(members, others) == (4, 1)


def test_a_model_compared_with_itself_has_no_gap(class_task, judge):
    s, oracle = subject(class_task, judge), subject(class_task, judge)
    s.peers = {"base": s, "oracle-0": oracle}
    metrics = {m.name: m for m in Loss().rows(Loss().scores(s), s, {})}
    assert (metrics["gap"].value, metrics["gap"].lo) == (0.0, None)
    assert "nothing that was measured varies" in metrics["gap"].reason
    assert metrics["equivalence_p"].value == 0.0
    del s.peers["oracle-0"]
    metrics = {m.name: m for m in Loss().rows(Loss().scores(s), s, {})}
    assert (metrics["gap"].value, metrics["gap"].status) == (None, "skipped")
    assert "no oracle" in metrics["gap"].reason


def test_no_rate_without_enough_non_members(class_task, judge):
    s = subject(class_task, judge)
    rows = {m.name: m for m in Loss().rows(Loss().scores(s), s, {})}
    assert rows["tpr_at_1"].value is None
    assert "needs 1,000 non-members" in rows["tpr_at_1"].reason
    assert "needs 10,000" in rows["tpr_at_01"].reason


def test_the_gap_of_equal_models_is_zero_and_the_spread_of_the_oracles_is_in_its_error():
    rng = np.random.default_rng(0)
    pos, neg = rng.normal(0.5, 1, 200), rng.normal(0, 1, 200)
    same_pos, same_neg = np.stack([pos] * 3, 1), np.stack([neg] * 3, 1)
    assert paired_gap(pos, neg, same_pos, same_neg) == pytest.approx((0.0, 0.0), abs=1e-12)
    same = compare_auc(pos, neg, same_pos, same_neg)
    assert (same.difference, same.se) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert compare_auc(pos, neg, same_pos + np.array([0.0, 0.4, -0.4]), same_neg).se > 0.05


def test_likelihood_ratios():
    rng = np.random.default_rng(2)
    images = rng.normal(size=200)
    out = images[:, None] + 0.5 * rng.normal(size=(200, 8))
    member = images[:, None] + 1.5 + 0.5 * rng.normal(size=(200, 8))
    seen, unseen = images + 1.5 + 0.5 * rng.normal(size=200), images + 0.5 * rng.normal(size=200)
    plain = delong(seen, unseen)[0]
    for score in (
        lambda s: attacks.lira_offline(s, out),
        lambda s: attacks.lira_online(s, member, out),
        lambda s: attacks.rmia(s, out.mean(1), unseen, out.mean(1)),
    ):
        assert delong(score(seen), score(unseen))[0] > plain + 0.1
    spreads = [np.sqrt(models.var(1, ddof=1).mean()) for models in (member, out)]
    by_hand = stats.norm(member.mean(1), spreads[0]).logpdf(seen) - stats.norm(out.mean(1), spreads[1]).logpdf(seen)
    np.testing.assert_allclose(attacks.lira_online(seen, member, out), by_hand)
    with pytest.raises(ValueError, match="at least two"):
        attacks.lira_offline(seen, out[:, :1])


def test_rmia_by_hand():
    scores, reference = np.array([2.0, 0.0]), np.array([0.0, 0.0])
    population, other = np.array([1.0, -1.0, 3.0]), np.zeros(3)
    np.testing.assert_allclose(attacks.rmia(scores, reference, population, other), [2 / 3, 1 / 3])


def test_attacks_with_oracles_state_how_many_they_need(points_task, class_task, judge):
    s = subject(points_task, judge)
    with pytest.raises(Inapplicable, match="needs 2 oracles besides the model itself; there are 0"):
        LiRA().scores(s)
    for task, main in ((points_task, "rank"), (class_task, "auc")):
        s = subject(task, judge)
        s.peers = {f"oracle-{k}": subject(task, judge, tiny_model(task, seed=k)) for k in range(3)} | {"base": s}
        for attack in (LiRA(), RMIA()):
            values = {m.name: m.value for m in attack.rows(attack.scores(s), s, {})}
            assert 0 <= values[main] <= 1
            assert abs(values["gap"]) <= 1
            assert "retain_auc" not in values


def test_both_populations_of_likelihood_ratios_have_one_scale(points_task, judge):
    """With a scale of its own a single image's ratio would hang on the chance distance between a few oracles."""
    s = subject(points_task, judge)
    s.peers = {f"oracle-{k}": subject(points_task, judge, tiny_model(points_task, seed=k + 1)) for k in range(3)}
    step, sign = LiRA().calibration(s)
    raw, oracles = Loss().raw(s), [Loss().raw(o) for o in s.oracles()]
    scores, ratios = LiRA().scores(s), []
    for name in ("forget", "forget_holdout"):
        out = np.stack([o[name][:, step] for o in oracles], 1)
        ratios.append(sign * (raw[name][:, step] - out.mean(1)) / scores[name][:, 0])
    np.testing.assert_allclose(np.concatenate(ratios), ratios[0][0])


def test_quantiles_remove_what_the_image_explains():
    g = torch.Generator().manual_seed(0)
    population, images = torch.rand(300, 1, 4, 4, generator=g), torch.rand(200, 1, 4, 4, generator=g)

    def brightness(x):
        return 8 * x.mean((1, 2, 3)).double().numpy()

    rng = np.random.default_rng(0)
    member = np.arange(200) < 100
    scores = brightness(images) + 0.3 * rng.normal(size=200) + 0.4 * member
    expected = attacks.expected_quantile(population, brightness(population) + 0.3 * rng.normal(size=300))
    margin = scores - expected(images)
    assert delong(margin[member], margin[~member])[0] > delong(scores[member], scores[~member])[0] + 0.05


def test_quantile_runs_on_a_model(points_task, judge):
    s = subject(points_task, judge)
    values = {m.name: m.value for m in Quantile().rows(Quantile().scores(s), s, {})}
    assert 0 <= values["rank"] <= 1
    assert values["auc"] is None


def test_clid_compares_with_the_reduced_condition(class_task, judge):
    s = subject(class_task, judge)
    images, noises = class_task.splits["retain"], s.model.noise(torch.arange(3))
    null = s.model.reduced(images.cond)
    score, gap = attacks.clid(s.model, images.x, images.cond, null, GRID, noises)
    np.testing.assert_allclose(gap, score - attacks.loss(s.model, images.x, null[0], GRID, noises))
    s = subject(class_task, judge, membership_images=1000)  # more than there are
    values = CLiD().values(CLiD().scores(s), s)
    assert 0 <= values["auc"] <= 1
    np.testing.assert_allclose(
        attacks.robust_mix(score[:, 0], gap[:, 0], 0.0, (score[:, 0], gap[:, 0])).argsort(), score[:, 0].argsort()
    )


def test_batches_halve_until_they_fit():
    batches, tried = Batches(8), []

    def work(rows):
        tried.append(rows.stop - rows.start)
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("no memory")
        return list(range(rows.start, rows.stop))

    assert [i for part in batches.map(work, 7) for i in part] == list(range(7))
    assert (batches.size, batches.halved) == (2, 2)
    assert tried == [7, 4, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        Batches(2).map(lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")), 2)
