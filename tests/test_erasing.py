"""ESD, Selective Amnesia, EraseDiff (both forms), the Bernoulli variant of SISS and safe sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PROMPTS, TinyText, batch_for, edm_model, text_task, tiny_model

from methods.base import Goal
from methods.bernoulli import Bernoulli
from methods.erasediff import EraseDiff, EraseDiffSettings, adaptive_weight
from methods.erasediff_siss import EraseDiffSISS, weight
from methods.esd import ESD, ESDSettings, layer_names, target
from methods.losses import squared_errors, timesteps
from methods.rows import SEEDS, Draw, Rows
from methods.selective_amnesia import SelectiveAmnesia, diagonal_fisher, ewc_penalty
from methods.siss import SISS
from methods.siss_no_is import SISSNoIS
from methods.sld import SLD, SLDSettings
from raysweep.storage.files import digest_state

D = torch.float64
SMALL = {"replay_per_class": 6, "fisher_per_class": 3, "fisher_timesteps": 5, "sampler_steps": 3, "ema": 0.0}


def build(cls, task, model=None, **more):
    model = model or tiny_model(task, dtype=D)
    fields = cls.Hyperparameters.model_fields
    hp = cls.Hyperparameters(
        **{k: v for k, v in {"lr": 1e-3, "steps": 3, "batch_size": 8}.items() if k in fields} | more
    )
    return cls(model, hp, cls.prepare(model, task, 0, hp), task.goal)


@given(st.integers(0, 1000), st.floats(0.1, 3.0))
@settings(max_examples=30, deadline=None)
def test_esd_target_is_the_same_in_the_forms_of_both_releases(seed, eta):
    c, u = torch.randn((2, 3, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=D)
    y = target(c, u, eta)
    torch.testing.assert_close(y, u - eta * (c - u))
    torch.testing.assert_close(y, c - (eta + 1) * (c - u))
    torch.testing.assert_close((y - c).square().mean(), (1 + eta) ** 2 * (c - u).square().mean())


def test_esd_starts_at_the_loss_that_its_target_implies(class_task):
    method = build(ESD, class_task, eta=1.5, sampler_steps=4)
    method.model.net.eval()
    rows = batch_for(method, class_task)["forget"]
    x_t, t = method.partial_samples(rows.seeds)
    with torch.no_grad():
        c = method.base.eps(x_t, t, torch.full_like(t, 2))
        u = method.base.eps(x_t, t, torch.full_like(t, 6))
    _, scalars = method.direction(batch_for(method, class_task))
    assert float(scalars["loss"]) == pytest.approx(2.5**2 * float((c - u).square().mean()), rel=1e-6)


@pytest.mark.parametrize("layers", ["x", "x_strict", "u", "full"])
def test_esd_changes_the_layers_of_its_setting_alone(layers):
    task, model = text_task(), TinyText.tiny(dtype=D)
    task.__dict__["goal"] = Goal("concept", concept=PROMPTS[2])
    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    method = build(ESD, task, model, layers=layers, sampler_steps=3)
    for step in range(2):
        method.step(batch_for(method, task, step))
    changed = {n for n, p in model.net.named_parameters() if not torch.equal(p, before[n])}
    cross = {n for n in before if "attn2" in n}
    assert changed
    if layers.startswith("x"):
        assert changed <= cross
        assert layers == "x" or all(".to_k." in n or ".to_v." in n for n in changed)
    elif layers == "u":
        assert not changed & cross
    assert digest_state(method.base.net.state_dict()) == digest_state(before)


def test_esd_layers_of_a_class_model(class_task):
    names = [n for n, _ in tiny_model(class_task).net.named_parameters()]
    assert layer_names(names, "x") == {"class_embedding.weight"}
    assert layer_names(names, "u") == set(names) - {"class_embedding.weight"}
    (reason,) = ESD.unsuited(ESDSettings(layers="x_strict"), tiny_model(class_task), class_task.goal)
    assert "valid: x, u, full" in reason


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_esd_networks_receive_the_noise_level_of_their_input(class_task, steps):
    """Every (x_t, t) is a point of the sampler's own run: x_t has the noise level of t."""
    method = build(ESD, class_task, sampler_steps=steps, batch_size=24)
    seeds = batch_for(method, class_task)["forget"].seeds
    x_t, t = method.partial_samples(seeds)
    run = dict(method.model.trajectory(torch.full((24,), 2), seeds, steps, 3.0))
    assert len(run) == steps
    for i in range(24):
        torch.testing.assert_close(x_t[i], run[int(t[i])][i])
    assert len(t.unique()) >= min(steps, 8)  # random points of it


@pytest.mark.parametrize("family", ["pixel-ddpm", "edm"])
@pytest.mark.parametrize("steps", [10, 50])
def test_the_level_is_that_of_the_noise_in_the_image(class_task, monkeypatch, family, steps):
    """A network that takes every image for noise leaves nothing but noise: x_t is sigma_t times that of the start."""
    model = tiny_model(class_task, dtype=D) if family == "pixel-ddpm" else edm_model()
    model.net.to(D)

    def ratio(t):
        gamma, sigma = model.gamma_sigma(t)
        return gamma / sigma

    if family == "edm":
        monkeypatch.setattr(model, "denoised", lambda x, s, cond, guidance=1.0: torch.zeros_like(x))
    else:
        monkeypatch.setattr(model, "predict", lambda x, t, cond: ratio(t) * x)  # v where x0 is 0
    method = build(ESD, class_task, model, sampler_steps=steps, batch_size=24)
    seeds = batch_for(method, class_task)["forget"].seeds
    x_t, t = method.partial_samples(seeds)
    first = torch.full((24,), int(next(model.trajectory(None, seeds, steps, 1.0))[0]))
    unit = model.noise(seeds) if family == "edm" else model.noise(seeds) / model.gamma_sigma(first)[1]
    torch.testing.assert_close(x_t, model.gamma_sigma(t)[1] * unit, rtol=1e-6, atol=1e-9)
    assert len(t.unique()) > 5


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_esd_networks_of_the_older_release_receive_a_higher_level(class_task, steps):
    method = build(ESD, class_task, sampler_steps=steps, batch_size=32, guidance=1.0, timestep="older_release")
    seeds = batch_for(method, class_task)["forget"].seeds
    x_t, t = method.partial_samples(seeds)
    run = list(method.model.trajectory(torch.full((32,), 2), seeds, steps, 1.0))
    level = torch.tensor([next(s for s, x in run if torch.equal(x[i], x_t[i])) for i in range(32)])
    assert bool((t >= level).all())
    assert int(t.max()) < len(method.model.alphas)
    if steps == 50:  # two points and the rest of a bin: its 20 timesteps are 0 to 19 above the bin's own
        above = (t - level)[t >= 60]
        offset = 20 - run[-1][0]  # where this run's lowest point lies within the lowest bin
        assert int(above.min()) >= 20 + offset
        assert int(above.max()) <= 39 + offset


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_gradient_of_the_penalty(seed):
    theta, theta0, fisher = torch.randn((3, 9), generator=torch.Generator().manual_seed(seed), dtype=D)
    fisher = fisher.square()
    theta.requires_grad_(True)
    penalty = ewc_penalty(theta, theta0, fisher)
    (g,) = torch.autograd.grad(penalty, theta)
    torch.testing.assert_close(g, 2 * fisher * (theta.detach() - theta0))
    assert float(ewc_penalty(theta0, theta0, fisher)) == 0


def test_penalty_enters_the_direction_with_its_gradient(class_task):
    with_, without = (build(SelectiveAmnesia, class_task, lam=lam, **SMALL) for lam in (3.0, 0.0))
    batch = batch_for(with_, class_task)
    for method in (with_, without):
        with torch.no_grad():
            for p in method.params:
                p.add_(0.01)
    theta = torch.cat([p.detach().reshape(-1) for p in with_.params])
    difference = with_.direction(batch)[0] - without.direction(batch)[0]
    torch.testing.assert_close(difference, 2 * 3.0 * with_.fisher * (theta - with_.theta0), rtol=1e-6, atol=1e-9)


def test_fisher_is_the_mean_of_squared_sums_over_timesteps(class_task):
    model = tiny_model(class_task, dtype=D)
    x = class_task.splits["train"].x[:2].to(D)
    rows = Rows(x, torch.tensor([0, 1]), torch.tensor([5, 6]), 2)
    fisher = diagonal_fisher(model, rows, 3)
    assert all(bool((f >= 0).all()) for f in fisher.values())
    singles = [
        diagonal_fisher(model, Rows(x[i : i + 1], rows.cond[i : i + 1], rows.seeds[i : i + 1], 1), 3) for i in (0, 1)
    ]
    for name, f in fisher.items():
        torch.testing.assert_close(f, (singles[0][name] + singles[1][name]) / 2)
    one = diagonal_fisher(model, Rows(x[:1], rows.cond[:1], rows.seeds[:1], 1), 1)
    t, row = torch.tensor([500]), Rows(x[:1], rows.cond[:1], rows.seeds[:1], 1)
    model.net.eval()
    loss = squared_errors(model, row, t, model.noise(row.seeds)).sum() * 1000
    for (name, _), g in zip(
        model.net.named_parameters(),
        torch.autograd.grad(loss, list(model.net.parameters()), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one[name], torch.zeros_like(one[name]) if g is None else g.square())


def test_replay_holds_no_forgotten_label_and_is_generated(class_task):
    method = build(SelectiveAmnesia, class_task, **SMALL)
    rows = class_task.batch({"replay": Draw(200, split=SEEDS)}, 0, 0)["replay"]
    replay = method.generated(rows, method.kept)
    assert 2 not in replay.cond
    assert set(replay.cond.tolist()) == {0, 1, 3, 4, 5}
    surrogate = method.surrogate_rows(batch_for(method, class_task)["forget"])
    assert set(surrogate.cond.tolist()) == {2}
    assert float(surrogate.x.min()) < -0.5
    assert float(surrogate.x.abs().max()) <= 1
    other = build(SelectiveAmnesia, class_task, surrogate="override", **SMALL)
    shown = other.surrogate_rows(batch_for(other, class_task)["forget"])
    members = other.x[other.cond == 4]
    assert all(any(torch.equal(x, m) for m in members) for x in shown.x)


def test_erasediff_restores_the_weights_after_looking_ahead(points_task, class_task):
    for task in (points_task, class_task):
        method = build(EraseDiff, task, inner_steps=3, lr=1e-2, inner_moments="own")
        before = [p.detach().clone() for p in method.params]
        reached = method.look_ahead(batch_for(method, task))
        assert all(torch.equal(p, b) for p, b in zip(method.params, before, strict=True))
        assert float(reached) > 0
        assert not method.optimizer.state  # its own moments stay as they were
    shared = build(EraseDiff, points_task, inner_steps=2, inner_moments="shared")
    shared.look_ahead(batch_for(shared, points_task))
    assert shared.optimizer.state


@pytest.mark.parametrize("moments", ["own", "shared"])
def test_erasediff_looks_ahead_at_the_rate_of_its_outer_step(points_task, moments):
    """Adam's first step moves a weight by the rate at most: at the start of a warm-up of 1,000 steps a thousandth of lr."""
    method = build(EraseDiff, points_task, lr=1e-2, warmup=1000, inner_steps=2, inner_moments=moments)
    start, moved, real = [p.detach().clone() for p in method.params], [], method.forget_loss

    def forget_loss(rows):
        moved.append(max(float((p - s).detach().abs().max()) for p, s in zip(method.params, start, strict=True)))
        return real(rows)

    method.forget_loss = forget_loss
    method.look_ahead(batch_for(method, points_task))
    assert moved == [0.0, pytest.approx(1e-5, rel=0.05)]


def test_erasediff_passes_over_the_forget_set(class_task):
    """A look-ahead of ceil(n / batch) fresh inner steps sees every forgotten row once; the next one continues from there."""
    method = build(EraseDiff, class_task, inner_steps=2, inner_every=3, batch_size=3)
    forget = class_task.splits["forget"].x
    assert len(forget) == 6
    drawn = []
    for step in range(5):
        assert {n for n in method.draws() if n.startswith("inner")} == (
            {"inner0", "inner1"} if step % 3 == 0 else set()
        )
        batch = batch_for(method, class_task, step)
        if step % 3 == 0:
            rows = torch.cat([batch["inner0"].x, batch["inner1"].x])
            seeds = torch.cat([batch["inner0"].seeds, batch["inner1"].seeds])
            drawn.append(seeds)
            which = [next(k for k in range(6) if torch.allclose(x, forget[k].to(x))) for x in rows]
            assert sorted(which) == list(range(6))
        scalars = method.step(batch)
        assert float(scalars["gap"]) == pytest.approx(float(scalars["forget_loss"] - method.reached))
    assert len(torch.cat(drawn).unique()) == 12


def test_erasediff_released_run():
    """4 epochs of 2 rounds of 36 batches; 2 passes over 5,000 images in batches of 128 for each round."""
    hp = EraseDiffSettings()
    assert hp.steps == 4 * 2 * hp.inner_every
    assert hp.inner_every == next(k for k in range(100) if k * hp.batch_size > 4500)
    assert hp.inner_steps == 2 * -(-5000 // hp.batch_size)
    assert (hp.clip_norm, hp.ema, hp.inner_moments) == (1.0, 0.99, "shared")


def test_erasediff_adds_the_weighed_forget_gradient(class_task):
    fixed = build(EraseDiff, class_task, weight=0.7, inner_steps=1)
    batch = batch_for(fixed, class_task)
    only_retain = build(EraseDiff, class_task, weight=0.0, inner_steps=1)
    unit = build(EraseDiff, class_task, weight=1.0, inner_steps=1)
    g, g_r, g_1 = (m.direction(batch)[0] for m in (fixed, only_retain, unit))
    torch.testing.assert_close(g, g_r + 0.7 * (g_1 - g_r), rtol=1e-6, atol=1e-9)
    cosines = torch.linspace(-1, 1, 21, dtype=D)
    lam = adaptive_weight(cosines, 0.1)
    assert bool(((lam >= 0) & (lam <= 1.1)).all())
    assert not lam[cosines >= 0.1].any()
    with pytest.raises(ValueError, match="eta has no effect"):
        EraseDiffSettings(mode="fixed", eta=0.1)
    assert EraseDiff.unsuited(EraseDiffSettings(target="relabel"), tiny_model(class_task), Goal("points"))


@given(st.integers(0, 10_000), st.floats(1e-3, 2.0))
@settings(max_examples=100, deadline=None)
def test_one_level_erasediff_always_descends_the_noise_term(seed, eta):
    x, a = torch.randn((2, 7), generator=torch.Generator().manual_seed(seed), dtype=D)
    dot, a_sq = x @ a, a @ a
    c = weight(dot, a_sq, eta)
    g = x + c * a
    assert float(g @ a) == pytest.approx(max(eta * float(a_sq), float(dot)), rel=1e-9)
    assert (float(c) == 0) == (float(dot) >= eta * float(a_sq))
    assert float(weight(dot, torch.zeros_like(a_sq), eta)) == 0


def test_noise_target_follows_its_distribution_and_is_drawn_anew(points_task):
    method = build(EraseDiffSISS, points_task, batch_size=400)
    rows = [batch_for(method, points_task, step)["forget"] for step in (0, 1)]
    first, second = (method.noise_target(r) for r in rows)
    assert bool(((first >= 0) & (first < 1)).all())
    assert float(first.mean()) == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(first, second)
    normal = build(EraseDiffSISS, points_task, batch_size=400, target="normal").noise_target(rows[0])
    assert float(normal.mean()) == pytest.approx(0, abs=0.05)


def test_bernoulli_uses_each_row_in_one_term(points_task):
    method = build(Bernoulli, points_task, lam=0.3, batch_size=16)
    batch, calls = batch_for(method, points_task), []
    handle = method.model.net.register_forward_hook(lambda *_: calls.append(1))
    _, scalars = method.direction(batch)
    handle.remove()
    assert len(calls) == 1
    model, retain, forget = method.model, batch["retain"], batch["forget"]
    rows_a = model.uniform(retain.seeds, 2)[:, 1] < 0.3
    eps = model.noise(retain.seeds)
    with torch.no_grad():
        t = timesteps(model, retain)
        losses = [squared_errors(model, r, t, eps).flatten(1).sum(1) for r in (retain, forget)]
    assert float(scalars["loss_x"]) == pytest.approx(float(losses[0][~rows_a].sum()) / 0.7 / 16)
    assert float(scalars["loss_a"]) == pytest.approx(float(losses[1][rows_a].sum()) / 16)


def test_saturated_siss_is_bernoulli(points_task):
    """At the lowest timestep two images hardly overlap: weights are 0 or 1/lam, and both methods take the same step."""
    more = {"t_sampler": "fixed", "t_low": 0, "lam": 0.5, "batch_size": 16, "clip_norm": None}
    siss, bernoulli = build(SISS, points_task, **more), build(Bernoulli, points_task, **more)
    batch = batch_for(siss, points_task)
    g, scalars = siss.direction(batch)
    assert float(scalars["activity"]) < 1e-6
    torch.testing.assert_close(g, bernoulli.direction(batch)[0], rtol=1e-5, atol=1e-7)


def test_naive_deletion_is_a_difference_of_losses_over_the_whole_and_the_forget_set(points_task):
    """N/(N-K) L_X - K/(N-K) L_A is the loss of X without A, with its gradient, on a finite set."""
    model = tiny_model(points_task, dtype=D)
    x = points_task.splits["train"].x.to(D)
    k = len(points_task.splits["forget"])
    seeds = torch.arange(len(x))
    model.net.eval()

    def loss(part: slice) -> torch.Tensor:
        rows = Rows(x[part], None, seeds[part], len(x[part]))
        return squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds)).flatten(1).sum(1).mean()

    n, p = len(x), next(iter(model.net.parameters()))
    whole, kept, forgotten = loss(slice(0, n)), loss(slice(0, n - k)), loss(slice(n - k, n))
    split = n / (n - k) * whole - k / (n - k) * forgotten
    torch.testing.assert_close(split, kept)
    torch.testing.assert_close(torch.autograd.grad(split, p)[0], torch.autograd.grad(kept, p)[0])


def test_two_passes_where_both_terms_have_their_own_image(points_task):
    for cls, passes in ((SISSNoIS, 2), (EraseDiffSISS, 2)):
        method, calls = build(cls, points_task), []
        handle = method.model.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method.direction(batch_for(method, points_task))
        handle.remove()
        assert len(calls) == passes


def test_safe_sampling_changes_samples_and_no_weight(class_task):
    model = tiny_model(class_task)
    before, digest = digest_state(model.net.state_dict()), model.digest
    cond, seeds = torch.tensor([2, 0, 6]), torch.arange(3)
    plain = model.sample(cond, seeds, 4, 1.5)
    hp = SLDSettings(mu="at_least_one", scale=1.0, warmup=0.0)
    method = SLD(model, hp, {}, class_task.goal)
    assert method.steps == 0
    assert method.finish()["distance"] == 0
    assert digest_state(model.net.state_dict()) == before
    assert model.digest != digest
    safe = model.sample(cond, seeds, 4, 1.5)
    assert not torch.equal(safe[0], plain[0])
    assert torch.isfinite(safe).all()
    # under the concept itself the at-most-one rule sees no difference and does nothing
    model.use_sampler("safe", concept=2, **SLDSettings(warmup=0.0).model_dump())
    torch.testing.assert_close(model.sample(cond, seeds, 4, 1.5)[0], plain[0])
