"""The meaning of settings: reductions, clips, guidance, averages, rates, stages. In float64, on tiny networks."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from tiny import Pairs, TinyClip, batch_for, tiny_model

from methods.base import Descent, Training
from methods.finetune import Finetune
from methods.graddiff import GradDiff
from methods.layers import eligible, tower
from methods.losses import squared_errors, timesteps, without_labels
from methods.neggrad import NegGrad
from methods.retrain import Retrain
from methods.rgd import RGD
from methods.rows import Draw
from methods.salun import SalUn
from methods.selective_amnesia import SelectiveAmnesia, SelectiveAmnesiaSettings
from methods.sfd import SFD, SFDSettings
from methods.sfd_two_stage import FORGETTING, SEPARATE, SHARED, SFDTwoStage
from methods.slug import SLUG, SLUGSettings

D = torch.float64
PIXELS = 16  # of the tiny networks' images
FEW = {"replay_per_class": 4, "fisher_per_class": 2, "fisher_timesteps": 3, "sampler_steps": 2, "ema": 0.0}


def build(cls, task, **settings):
    model, fields = tiny_model(task, dtype=D), cls.Hyperparameters.model_fields
    common = {k: v for k, v in {"lr": 1e-3, "steps": 4, "batch_size": 8}.items() if k in fields}
    hp = cls.Hyperparameters(**common | settings)
    return cls(model, hp, cls.prepare(model, task, 0, hp), task.goal)


def flat(params):
    return torch.cat([p.detach().reshape(-1).clone() for p in params])


def after(method, task, steps: int = 4):
    for step in range(steps):
        method.step(batch_for(method, task, step))
    return flat(method.params)


def released_loop(cls, task, sign: float, clip: float, steps: int = 4):
    """SISS's loop in plain PyTorch: errors summed over pixels, clipped to a norm, AdamW (0.95, 0.999) with 1e-6."""
    method = build(cls, task)
    model, params, norms = method.model, method.params, []
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6)
    for step in range(steps):
        (rows,) = batch_for(method, task, step).values()
        model.net.train()
        errors = squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds))
        optimizer.zero_grad()
        (sign * errors.sum() / len(rows.x)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip)))
        optimizer.step()
    return flat(params), norms


@pytest.mark.parametrize(("cls", "sign"), [(Finetune, 1.0), (NegGrad, -1.0)])
def test_released_clip_binds_the_gradient_of_a_sum(points_task, cls, sign):
    _, norms = released_loop(cls, points_task, sign, clip=1e9)
    clip = min(norms) / 4  # binds the gradients of sums, not those of means
    expected, norms = released_loop(cls, points_task, sign, clip)
    assert min(norms) > clip > max(norms) / PIXELS
    start = flat(build(cls, points_task).params)

    def away(**settings):
        return float(
            (after(build(cls, points_task, **settings), points_task) - expected).norm() / (expected - start).norm()
        )

    assert cls.Hyperparameters.model_fields["clip_norm"].default == 1.0
    assert away(clip_norm=clip) < 1e-9
    # of a mean, the same steps need 1/D of the clip and of Adam's epsilon; the same clip makes another method
    assert away(reduction="mean", clip_norm=clip / PIXELS, adam_eps=1e-8 / PIXELS) < 1e-5
    assert away(reduction="mean", clip_norm=clip) > 1e-3


def test_reduction_of_retraining(points_task):
    """The DDPM releases train with a sum clipped to 1, SISS's MNIST code with a mean clipped to 1."""
    more = {"split": "retain", "warmup": 0, "floor": 1.0, "ema": 0.0}
    method = build(Retrain, points_task, **more)
    clip = PIXELS / 4 * float(method.direction(batch_for(method, points_task))[0].norm())
    settings = {
        "sum": {"reduction": "sum", "clip_norm": clip},
        "mean": {"reduction": "mean", "clip_norm": clip},
        "equal": {"reduction": "mean", "clip_norm": clip / PIXELS, "adam_eps": 1e-8 / PIXELS},
    }
    trained = {name: after(build(Retrain, points_task, **more, **s), points_task) for name, s in settings.items()}
    moved = (trained["sum"] - flat(build(Retrain, points_task, **more).params)).norm()
    assert float((trained["equal"] - trained["sum"]).norm() / moved) < 1e-5
    assert float((trained["mean"] - trained["sum"]).norm() / moved) > 1e-3


def test_reduction_of_selective_amnesia(class_task):
    """Stable Diffusion's lam of means, in loss and Fisher, weighs as lam/D of sums."""
    summed = build(SelectiveAmnesia, class_task, lam=3.0 / PIXELS, **FEW)
    mean = build(SelectiveAmnesia, class_task, lam=3.0, reduction="mean", **FEW)
    for method in (summed, mean):
        with torch.no_grad():
            for p in method.params:
                p.add_(0.01)
    batch = batch_for(mean, class_task)
    torch.testing.assert_close(PIXELS * mean.direction(batch)[0], summed.direction(batch)[0], rtol=1e-9, atol=1e-12)


def test_salun_alpha_of_the_release_is_of_a_sum(class_task):
    """mean |..|^2 + 1e-3 sum |..|^2, as released, is the total here at alpha = 1e-3 D: 3.07 at 3x32x32, 12.29 at 3x64x64."""
    method = build(SalUn, class_task, alpha=1e-3 * PIXELS)
    batch, model = batch_for(method, class_task), method.model
    direction, scalars = method.direction(batch)
    retain = batch["retain"]
    errors = squared_errors(model, retain, timesteps(model, retain), model.noise(retain.seeds))
    summed = errors.flatten(1).sum(1).mean()
    assert method.hp.alpha * float(scalars["retain_loss"]) == pytest.approx(1e-3 * float(summed.detach()), rel=1e-9)
    only = build(SalUn, class_task, alpha=0.0).direction(batch)[0]
    (grads,) = [torch.autograd.grad(1e-3 * summed, method.params, allow_unused=True)]
    expected = only + torch.cat(
        [
            torch.zeros(p.numel(), dtype=D) if g is None else g.reshape(-1)
            for g, p in zip(grads, method.params, strict=True)
        ]
    )
    torch.testing.assert_close(direction, expected, rtol=1e-7, atol=1e-10)


def test_guidance_of_selective_amnesia_is_w_plus_one(class_task, monkeypatch):
    """The DDPM releases write (1 + w) eps_c - w eps_null with w = 2; samplers here eps_null + g (eps_c - eps_null)."""
    w = 2.0
    model, seen = tiny_model(class_task, dtype=D), {}
    x, t, cond = torch.randn((3, 1, 4, 4), dtype=D), torch.full((3,), 400), torch.tensor([0, 2, 5])

    def points(guidance):
        return torch.stack([x_t for _, x_t in model.trajectory(cond, torch.arange(3), 4, guidance)])

    guided, plain, predict = points(SelectiveAmnesiaSettings().guidance), points(1.0), model.predict

    def released(x, t, cond):
        return (1 + w) * predict(x, t, cond) - w * predict(x, t, model.unconditional(3))

    with monkeypatch.context() as patch:
        patch.setattr(model, "predict", released)
        torch.testing.assert_close(points(1.0), guided)
    assert not torch.allclose(plain, guided)
    real = model.sample

    def sample(cond, seeds, steps, guidance, eta):
        seen.update(steps=steps, guidance=guidance, eta=eta)
        return real(cond, seeds, 2, guidance, eta=eta)

    monkeypatch.setattr(model, "sample", sample)
    defaults = SelectiveAmnesiaSettings(replay_per_class=1, fisher_per_class=1, fisher_timesteps=1)
    SelectiveAmnesia.prepare(model, class_task, 0, defaults)
    assert seen == {"steps": 1000, "guidance": 1 + w, "eta": 1.0}
    # SFD's kappa of Stable Diffusion is 1 + cond_scale
    sfd, kappa = build(SFD, class_task, cond_scale=3.5), 4.5
    with torch.no_grad():
        e_c, e_null = (sfd.teacher.eps(x, t, c) for c in (cond, sfd.model.unconditional(3)))
        torch.testing.assert_close(sfd.guided(sfd.teacher, x, t, cond), e_null + kappa * (e_c - e_null))


def test_moving_average_is_the_candidate(points_task):
    method = build(Finetune, points_task, ema=0.9)
    average = flat(method.params)
    for step in range(3):
        method.step(batch_for(method, points_task, step))
        average = 0.9 * average + 0.1 * flat(method.params)
    live = flat(method.params)
    method.finish()
    torch.testing.assert_close(flat(method.params), average)
    assert not torch.allclose(live, average)
    plain = build(Finetune, points_task)
    torch.testing.assert_close(after(plain, points_task, 3), live)  # training does not see the average
    plain.finish()
    torch.testing.assert_close(flat(plain.params), live)


class Still(Descent):
    """A method whose losses are flat: only weight decay moves its weights."""

    name, source, needs, forwards_per_step = "still", "arXiv:0", frozenset(), 1

    def draws(self):
        return {}

    def direction(self, batch):
        return torch.zeros_like(flat(self.params)), {}


@pytest.mark.parametrize("decays", ["all", "matrices"])
def test_weights_that_decay(points_task, decays):
    model = tiny_model(points_task, dtype=D)
    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    method = Still(model, Training(lr=1e-2, steps=1, weight_decay=0.1, decays=decays))
    method.step({})
    for name, p in model.net.named_parameters():
        shrunk = decays == "all" or p.dim() > 1
        torch.testing.assert_close(p.detach(), before[name] * (1 - 1e-3 if shrunk else 1), rtol=1e-12, atol=0)


def test_learning_rate_warms_up_and_decays(points_task):
    def rates(**settings):
        method, seen = Still(tiny_model(points_task), Training(lr=2.0, steps=10, **settings)), []
        while method.done < 10:
            method.step({})
            seen.append(method.optimizer.param_groups[0]["lr"])
        return seen

    assert rates() == [2.0] * 10
    assert rates(warmup=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    cosine = rates(floor=0.0)
    assert cosine == pytest.approx([1 + math.cos(math.pi * k / 10) for k in range(10)])
    assert min(rates(floor=0.5)) > 1.0


@pytest.mark.parametrize("cls", [GradDiff, RGD])
def test_full_pass_is_the_gradient_of_the_mean_over_all_retained_rows(class_task, cls):
    """For any size of pieces: the released average divides a last piece of 2 rows by 64."""
    more = {"retain_pass": "full", "retain_per_group": 5, "clip_norm": None, "trunc_elem_sq": None}
    whole, pieces = (build(cls, class_task, batch_size=size, **more) for size in (25, 7))
    batch = batch_for(whole, class_task)
    rows, sizes = batch["retain"], []
    assert torch.bincount(rows.cond, minlength=6).tolist() == [5, 5, 0, 5, 5, 5]
    handle = pieces.model.net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    g, loss = pieces.retain_gradient(rows)
    handle.remove()
    assert sizes == [7, 7, 7, 4]
    expected, total = whole.retain_gradient(rows)
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(loss, total)


def test_rows_keep_the_number_of_ranks_that_share_their_batch(class_task):
    model = tiny_model(class_task)
    rows = class_task.batch({"retain": Draw(8)}, 0, 0, rank=1, world=2)["retain"]
    assert (rows.ranks, rows.total, len(rows.x)) == (2, 8, 4)
    assert class_task.all_rows("retain", 0).ranks == 1
    changed = (rows.to(torch.device("cpu"), D), rows.piece(slice(1, 3)), rows.reseeded(2))
    for other in (*changed, without_labels(model, rows, 0.5)):
        assert (other.ranks, other.total) == (2, 8)


@pytest.mark.parametrize("cls", [Finetune, NegGrad, SalUn])
def test_a_descent_draws_a_batch_of_each_split_that_it_needs(class_task, cls):
    assert build(cls, class_task).draws() == {split: Draw(8) for split in sorted(cls.needs)}


def null_share(seen, model):
    return float((torch.cat(seen) == model.null_label).double().mean())


def test_labels_are_dropped_at_their_rate(class_task, monkeypatch):
    method = build(SalUn, class_task, label_drop=0.25, batch_size=400)
    batch = batch_for(method, class_task)
    rows = batch["retain"]
    assert without_labels(method.model, rows, 0.0) is rows
    seen, real = [], method.model.predict
    monkeypatch.setattr(method.model, "predict", lambda x, t, c: (seen.append(c), real(x, t, c))[1])
    method.direction(batch)
    assert len(seen) == 3
    assert [null_share([c], method.model) for c in seen] == pytest.approx([0.25] * 3, abs=0.08)
    teacher, shown, _ = (c == method.model.null_label for c in seen)
    assert bool((teacher & ~shown).any())  # each pass drops its own
    assert bool((shown & ~teacher).any())


def test_sfd_drops_conditions_in_the_fake_scores_step_alone(class_task, monkeypatch):
    """As released for Stable Diffusion: generator and fake score alike, of kept and forgotten rows."""
    method = build(SFD, class_task, fake_drop=0.25, batch_size=200, ema=0.0)
    seen: dict[str, list] = {"generator": [], "fake": [], "teacher": []}
    for name, net in (("generator", method.model), ("fake", method.fake), ("teacher", method.teacher)):
        real = net.predict
        monkeypatch.setattr(net, "predict", lambda x, t, c, n=name, f=real: (seen[n].append(c), f(x, t, c))[1])
    method.step(batch_for(method, class_task))
    for name in ("generator", "fake"):
        dropped, kept = seen[name][:2], seen[name][2:]
        assert [null_share([c], method.model) for c in dropped] == pytest.approx([0.25] * 2, abs=0.1)
        assert null_share(kept, method.model) == 0
    assert all(torch.equal(a, b) for a, b in zip(seen["generator"][:2], seen["fake"][:2], strict=True))
    assert null_share(seen["teacher"], method.model) == 0
    bare = copy.copy(method.model)
    bare.null_label = None
    (reason,) = SFD.unsuited(SFDSettings(fake_drop=0.1), bare, class_task.goal)
    assert reason.startswith("fake_drop: ")


@pytest.mark.parametrize(("clips", "bound"), [("both", [True, True]), ("generator", [False, True])])
def test_networks_whose_gradients_are_clipped(class_task, monkeypatch, clips, bound):
    method, largest = build(SFD, class_task, clip_value=1e-4, clips=clips), [0.0, 0.0]
    for k, params in enumerate((method.fake_params, method.params)):

        def step(k=k, params=params):
            largest[k] = max(float(p.grad.abs().max()) for p in params)

        monkeypatch.setattr(method.optimizers[k], "step", step)
    method.step(batch_for(method, class_task))
    assert [x <= 1e-4 for x in largest] == bound


STAGES = {"stage1_steps": 3, "stage1_batch_size": 6, "stage1_lr": 1e-3, "stage1_lr_fake": 1e-3, "stage1_ema": 0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0.7),
        ("beta1", 0.5),
        ("clip_value", 1e-3),
        ("clips", "generator"),
        ("adam_eps", 1e-2),
        ("fake_drop", 0.5),
    ],
)
def test_stage_one_is_distilled_with_the_settings_of_stage_two(class_task, name, value):
    """It is plain distillation of all classes with those settings, and not what their defaults give."""
    small = {"clip_value": 1e-2}  # so that it binds on networks as small as these

    def distilled(**more):
        hp = SFDTwoStage.Hyperparameters(**STAGES | small | more)
        return SFDTwoStage.prepare(tiny_model(class_task, dtype=D), class_task, 0, hp)

    stage1 = distilled(**{name: value})
    assert any(not torch.equal(stage1[k], v) for k, v in distilled().items())
    stage1_settings = {"steps": 3, "batch_size": 6, "lr": 1e-3, "lr_fake": 1e-3, "ema": 0.5, "forget_batch_size": 1}
    settings = SFDSettings(forget=0, fake_forget=0, **stage1_settings | small | {name: value})
    goal = dataclasses.replace(class_task.goal, forget_class=None, override_class=None)
    plain = SFD(tiny_model(class_task, dtype=D), settings, {}, goal)
    for step in range(3):
        plain.step(class_task.batch(plain.draws(), 0, step))
    plain.finish()
    for part, params in (("generator", plain.params), ("fake", plain.fake_params)):
        for n, p in zip(plain.names, params, strict=True):
            assert torch.equal(stage1[f"{part}/{n}"], p)
    assert name in SFDTwoStage.prepared_by


def test_settings_of_the_two_stages_are_all_accounted_for():
    assert sorted((*SHARED, *SEPARATE, *FORGETTING)) == sorted(SFDSettings.model_fields)
    assert set(SFDTwoStage.prepared_by) == set(SHARED) | {f"stage1_{name}" for name in SEPARATE}


def test_norms_compete_only_if_asked_for():
    model, pairs = TinyClip(), Pairs()
    without, with_ = eligible(model), eligible(model, norms=True)
    gains = set(with_) - set(without)
    assert set(without) <= set(with_)
    words = ("bias", "logit_scale", "position", "embedding")  # that the open_clip path leaves out, and nothing else
    assert with_ == [n for n, _ in model.net.named_parameters() if not any(word in n for word in words)]
    assert all(dict(model.net.named_parameters())[n].dim() == 1 for n in gains)
    assert all(".ln_" in f".{n}" and n.endswith("weight") for n in gains)
    assert {"visual.ln_pre.weight", "visual.ln_post.weight", "ln_final.weight"} <= gains
    assert {tower(n) for n in gains} == {"vision", "language"}
    assert tower("ln_final.weight") == "language"
    for norms in (False, True):
        prepared = SLUG.prepare(model, pairs, 0, SLUGSettings(norms=norms))
        offered = {n.removeprefix("forget/") for n in prepared if n.startswith("forget/")}
        assert offered == set(with_ if norms else without)
    assert "norms" in SLUG.prepared_by
