"""SSD: importances, selection and dampening, against their definitions in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_table import D, build
from tiny import Pairs, TinyClip, tiny_model, tiny_task

from methods.losses import timesteps
from methods.ssd import SSD, SSDSettings, dampening, reference


@st.composite
def importances(draw):
    """D_f and D_r of equal shape, some of them zero, and the share s."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 30))
    forget, retain = (torch.tensor(10.0 ** rng.uniform(-12, 2, n) * (rng.uniform(size=n) > 0.2)) for _ in range(2))
    return forget, retain, draw(st.floats(0.01, 0.99))


@given(importances(), st.floats(0, 100), st.floats(0, 10))
@settings(max_examples=60, deadline=None)
def test_weights_are_dampened_by_the_definition(case, alpha, lam):
    forget, retain, share = case
    selected, beta = dampening(forget, retain, alpha, lam)
    for f, r, chosen, factor in zip(*(v.tolist() for v in (forget, retain, selected, beta)), strict=True):
        assert chosen == (f > alpha * r)
        if chosen:
            assert factor == pytest.approx(min(lam * r / f, 1), rel=1e-12)
            assert 0 <= factor <= 1
            assert alpha == 0 or factor <= lam / alpha
    assert not bool((dampening(forget, retain, 2 * alpha, lam)[0] & ~selected).any())
    whole = reference(forget, retain, share)
    torch.testing.assert_close(whole, share * forget + (1 - share) * retain)
    assert torch.equal(reference(forget, retain, 0.0), retain)
    assert not dampening(forget, whole, 1.001 / share, lam)[0].any()


@given(importances(), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_both_references_select_the_same_weights_at_corresponding_alphas(case, alpha):
    forget, retain, share = case
    by_retain = dampening(forget, retain, alpha, 1.0)[0]
    by_all = dampening(forget, reference(forget, retain, share), alpha / (1 - share + share * alpha), 1.0)[0]
    tie = torch.isclose(forget, alpha * retain, rtol=1e-9, atol=0)
    assert torch.equal(by_retain[~tie], by_all[~tie])


def diffusion_importances(model, task, split, batch_size, passes) -> dict[str, torch.Tensor]:
    """The definition: each batch's mean loss, differentiated and squared."""
    squares: list[tuple] = []
    for k in range(passes):
        rows = task.all_rows(split, k).to(torch.device("cpu"), D)
        for i in range(0, len(rows.x), batch_size):
            part = rows.piece(slice(i, i + batch_size))
            t, eps = timesteps(model, part), model.noise(part.seeds)
            output = model.predict(model.add_noise(part.x, eps, t), t, part.cond)
            loss = (output - model.target(part.x, eps, t)).square().mean()
            squares.append(squared(loss, model))
    return mean_of(squares, model)


def pair_importances(model, task, split, batch_size, cosine) -> dict[str, torch.Tensor]:
    squares = []
    x, cond = task.rows[split]
    for i in range(0, len(x), batch_size):
        v = model.encode_image(x[i : i + batch_size].to(D))
        c = model.encode_text(cond[i : i + batch_size])
        if cosine:
            loss = torch.stack([1 - a @ b / a.norm() / b.norm() for a, b in zip(v, c, strict=True)]).mean()
        else:
            logits = model.logit_scale * F.normalize(v, dim=1) @ F.normalize(c, dim=1).T
            loss = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
        squares.append(squared(loss, model))
    return mean_of(squares, model)


def squared(loss: torch.Tensor, model) -> tuple[torch.Tensor, ...]:
    params = list(model.net.parameters())
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g.square() for p, g in zip(params, gradients, strict=True))


def mean_of(squares, model) -> dict[str, torch.Tensor]:
    means = (torch.stack(parts).mean(0) for parts in zip(*squares, strict=True))
    return dict(zip((n for n, _ in model.net.named_parameters()), means, strict=True))


def assert_prepared(prepared, **expected) -> None:
    for split, squares in expected.items():
        for name, value in squares.items():
            if name == "logit_scale":
                assert f"{split}/{name}" not in prepared
            else:
                torch.testing.assert_close(prepared[f"{split}/{name}"], value, rtol=1e-9, atol=1e-18)


def test_importances_of_a_diffusion_model_are_mean_squares_of_its_batches():
    task = tiny_task("class")  # 6 rows to forget, 30 to retain
    model = tiny_model(task, dtype=D)
    prepared = SSD.prepare(model, task, 0, SSDSettings(batch_size=4, passes=8))
    model.net.eval()
    forget, retain = (diffusion_importances(model, task, s, 4, n) for s, n in (("forget", 8), ("retain", 2)))
    assert_prepared(prepared, forget=forget, retain=retain)
    assert prepared["share"].tolist() == [6 / 36]


@pytest.mark.parametrize("loss", ["same", "cosine"])
def test_importances_of_a_contrastive_model_are_mean_squares_of_its_batches(loss):
    task, model = Pairs(), TinyClip(dtype=D)
    prepared = SSD.prepare(model, task, 0, SSDSettings(batch_size=4, forget_loss=loss, passes=5))
    model.net.eval()
    forget = pair_importances(model, task, "forget", 4, loss == "cosine")
    assert_prepared(prepared, forget=forget, retain=pair_importances(model, task, "retain", 4, False))


@pytest.mark.parametrize("which", ["all", "retain"])
def test_selected_weights_shrink_and_no_other_weight_changes(which):
    method, _ = build("ssd", alpha=1.5, lam=2.0, reference=which)
    before = {n: p.detach().clone() for n, p in method.model.net.named_parameters()}
    share = float(method.step({})["selected"])
    s = float(method.prepared["share"]) if which == "all" else 0.0
    count = total = 0
    for name, p in method.model.net.named_parameters():
        forget, retain = (method.prepared[f"{split}/{name}"] for split in ("forget", "retain"))
        whole = s * forget + (1 - s) * retain
        chosen = forget > 1.5 * whole
        assert torch.equal(p[~chosen], before[name][~chosen])
        torch.testing.assert_close(p[chosen], before[name][chosen] * (2 * whole / forget)[chosen].clamp(max=1))
        count, total = count + int(chosen.sum()), total + p.numel()
    assert 0 < share == count / total < 1
    once = {n: p.clone() for n, p in method.model.net.state_dict().items()}
    method.step({})
    assert all(torch.equal(p, once[n]) for n, p in method.model.net.state_dict().items())


def test_nothing_changes_where_alpha_is_large_or_the_sets_are_equal():
    method, _ = build("ssd", tiny_task("class"), alpha=6.001, reference="all")  # a sixth of the rows must be forgotten
    assert float(method.step({})["selected"]) == 0
    assert method.finish()["distance"] == 0
    task, model = Pairs(), TinyClip(dtype=D)
    task.rows["retain"] = task.rows["forget"]
    for alpha, selects in ((1.0, False), (0.999, True)):
        hp = SSDSettings(alpha=alpha, lam=0.5)
        alike = SSD(model, hp, SSD.prepare(model, task, 0, hp), task.goal)
        assert (float(alike.step({})["selected"]) > 0) == selects
        assert (alike.finish()["distance"] > 0) == selects


def test_lam_of_zero_sets_the_selected_weights_to_zero():
    method, _ = build("ssd", alpha=2.0, lam=0.0, reference="retain")
    method.step({})
    for name, p, start in zip(method.names, method.params, method.start, strict=True):
        chosen = method.prepared[f"forget/{name}"] > 2 * method.prepared[f"retain/{name}"]
        assert not p[chosen].any()
        assert torch.equal(p[~chosen], start[~chosen])


def test_the_temperature_stays():
    model = TinyClip(dtype=D)
    method, _ = build("ssd", Pairs(), model=model, alpha=0.0, lam=0.0, forget_loss="same")
    before = model.net.logit_scale.detach().clone()
    method.step({})
    assert torch.equal(model.net.logit_scale, before)
    assert not model.net.visual.conv1.weight.any()


def test_settings_that_cannot_work_are_named():
    task, pairs = tiny_task("class"), Pairs()
    assert SSD.unsuited(SSDSettings(batch_size=1), tiny_model(task), task.goal) == []
    (reason,) = SSD.unsuited(SSDSettings(forget_loss="cosine"), tiny_model(task), task.goal)
    assert reason == "forget_loss: cosine compares images with captions, and this model does not; use same"
    assert SSD.unsuited(SSDSettings(forget_loss="cosine"), TinyClip(), pairs.goal) == []
    (reason,) = SSD.unsuited(SSDSettings(batch_size=1), TinyClip(), pairs.goal)
    assert reason == "batch_size: a contrastive loss compares the rows of a batch; use at least 2"


def test_sets_without_a_gradient_are_refused():
    task, model = Pairs(), TinyClip(dtype=D)
    task.rows["forget"] = tuple(
        part[:1] for part in task.rows["forget"]
    )  # one pair alone has nothing to be compared with
    with pytest.raises(ValueError, match="the gradient on the forget set vanishes in every weight"):
        SSD.prepare(model, task, 0, SSDSettings())
    task.rows["forget"] = tuple(part[:0] for part in task.rows["forget"])
    with pytest.raises(ValueError, match="the gradient on the forget set is empty"):
        SSD.prepare(model, task, 0, SSDSettings())
    task = tiny_task("class")
    forget = task.splits["forget"]
    task.splits["forget"] = replace(forget, x=torch.full_like(forget.x, float("nan")))
    with pytest.raises(ValueError, match="the gradient on the forget set is not finite"):
        SSD.prepare(tiny_model(task), task, 0, SSDSettings(passes=1))
