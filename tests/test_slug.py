"""SLUG: gradients, layer metrics, Pareto layers, the edit and the search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PROMPTS, Pairs, TinyClip, TinyText, batch_for, text_task, tiny_model

from methods.base import Goal
from methods.layers import depth, eligible, gradient_pass, group, tower
from methods.losses import forget_loss, recall, retain_loss
from methods.rows import Rows
from methods.slug import SLUG, Bracket, SLUGSettings, alignment, candidates, choose, edited, importance, pareto_layers

D = torch.float64


def clip_slug(**settings):
    task, model = Pairs(), TinyClip(dtype=D)
    task.rows = {k: (x.to(D), c) for k, (x, c) in task.rows.items()}
    hp = SLUGSettings(**settings)
    prepared = SLUG.prepare(model, task, 0, hp)
    return task, model, SLUG(model, hp, prepared, task.goal)


def rows_of(task, split):
    x, cond = task.rows[split]
    return Rows(x, cond, torch.arange(len(x)), len(x))


def test_cosine_gradient_does_not_depend_on_the_partition_and_infonce_does():
    task, model, _ = clip_slug()
    names = eligible(model)
    parts = {b: gradient_pass(model, task, "forget", forget_loss, names, b, 1, 0) for b in (1, 4, 6)}
    for name in names:
        torch.testing.assert_close(parts[1][name], parts[6][name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parts[4][name], parts[6][name], rtol=1e-9, atol=1e-12)
    contrast = [gradient_pass(model, task, "retain", retain_loss, names, b, 1, 0) for b in (5, 15)]
    assert not torch.allclose(contrast[0][names[0]], contrast[1][names[0]])


def test_passes_leave_the_model_alone_and_commute():
    task, model, _ = clip_slug()
    names, before = eligible(model), {n: p.clone() for n, p in model.net.state_dict().items()}
    first = gradient_pass(model, task, "retain", retain_loss, names, 15, 1, 0)
    gradient_pass(model, task, "forget", forget_loss, names, 16, 1, 0)
    again = gradient_pass(model, task, "retain", retain_loss, names, 15, 1, 0)
    assert all(torch.equal(first[n], again[n]) for n in names)
    assert all(torch.equal(v, before[n]) for n, v in model.net.state_dict().items())
    assert all(p.grad is None for p in model.net.parameters())
    assert model.net.training


def test_gradient_matches_finite_differences():
    task, model, _ = clip_slug()
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    g = gradient_pass(model, task, "forget", forget_loss, [name], 16, 1, 0)[name]
    p, h = dict(model.net.named_parameters())[name], 1e-6
    values = []
    model.net.eval()
    for sign in (1, -1):
        with torch.no_grad():
            p.add_(sign * h * g)
            values.append(float(forget_loss(model, rows_of(task, "forget"))))
            p.sub_(sign * h * g)
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float((g * g).sum()), rel=1e-5)


def test_empty_or_broken_gradients_are_refused():
    task, model, _ = clip_slug()
    task.rows["forget"] = (task.rows["forget"][0][:0], task.rows["forget"][1][:0])
    with pytest.raises(ValueError, match="empty"):
        SLUG.prepare(model, task, 0, SLUGSettings())
    task, model, _ = clip_slug()
    task.rows["forget"][0].fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        SLUG.prepare(model, task, 0, SLUGSettings())


def test_statistics_equal_the_full_tensors():
    task, model, method = clip_slug()
    theta = dict(model.net.named_parameters())
    retain = gradient_pass(model, task, "retain", retain_loss, eligible(model), 16, 1, 0)
    for name in eligible(model):
        f, r, w = method.prepared[f"forget/{name}"], retain[name], theta[name]
        expected = torch.stack([(w * w).sum(), (f * f).sum(), (f * r).sum(), (r * r).sum()])
        torch.testing.assert_close(method.prepared[f"statistics/{name}"], expected.detach(), rtol=1e-9, atol=1e-15)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_importance_and_alignment_are_relative_norm_and_cosine(seed, c):
    f, r, w = torch.randn((3, 5, 4), generator=torch.Generator().manual_seed(seed), dtype=D)
    assert float(importance(f, w)) == pytest.approx(float(f.norm() / w.norm()))
    torch.testing.assert_close(importance(c * f, w), c * importance(f, w))
    torch.testing.assert_close(importance(f, c * w), importance(f, w) / c)
    assert 0 <= float(alignment(f, r)) <= 1
    torch.testing.assert_close(alignment(c * f, r), alignment(f, r))
    torch.testing.assert_close(alignment(-f, r), alignment(f, r))
    torch.testing.assert_close(alignment(-f, r, signed=True), -alignment(f, r, signed=True))
    assert float(alignment(f, c * f)) == pytest.approx(1)
    orthogonal = r - (f * r).sum() / (f * f).sum() * f
    assert float(alignment(f, orthogonal)) == pytest.approx(0, abs=1e-9)


def test_tensors_without_weight_or_gradient_are_no_candidates():
    zero, one = torch.zeros(3), torch.ones(3)
    assert float(importance(one, zero)) == 0
    assert float(alignment(one, zero)) == 0
    prepared = {
        "statistics/a": torch.tensor([1.0, 0.0, 0.0, 1.0]),  # no forget gradient
        "statistics/b": torch.tensor([0.0, 1.0, 0.0, 1.0]),  # no weight
        "statistics/c": torch.tensor([1.0, 1.0, 0.0, 0.0]),  # no retain gradient
    }
    assert candidates(prepared, SLUGSettings()) == ["c"]


def test_eligible_tensors_of_each_tower():
    model = TinyClip()
    names = eligible(model)
    assert {tower(n) for n in names} == {"vision", "language"}
    assert tower("visual.proj") == tower("visual_projection.weight") == tower("vision_model.x") == "vision"
    assert tower("text_projection") == tower("text_model.x") == "language"
    excluded = ("bias", "logit_scale", "position", "embedding", "ln_")
    assert not any(part in n for n in names for part in excluded)
    text = TinyText.tiny()
    assert {tower(n) for n in eligible(text)} == {"unet", "language"}


def brute(scores, cosines):
    return [n for n in scores if not any(scores[m] > scores[n] and cosines[m] < cosines[n] for m in scores)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14), st.randoms())
@settings(max_examples=200, deadline=None)
def test_pareto_layers_are_those_that_none_beats_in_both(points, random):
    scores = {f"l{i}": float(a) for i, (a, _) in enumerate(points)}
    cosines = {f"l{i}": float(b) for i, (_, b) in enumerate(points)}
    front = pareto_layers(scores, cosines)
    assert front == brute(scores, cosines)
    assert front
    for name in set(scores) - set(front):
        assert any(scores[m] > scores[name] and cosines[m] < cosines[name] for m in front)
    assert {n for n in scores if scores[n] == max(scores.values())} <= set(front)
    assert {n for n in scores if cosines[n] == min(cosines.values())} <= set(front)
    shuffled = list(scores)
    random.shuffle(shuffled)
    assert set(pareto_layers({n: scores[n] for n in shuffled}, {n: cosines[n] for n in shuffled})) == set(front)
    grown = pareto_layers({n: scores[n] ** 3 for n in scores}, {n: 2.0 ** cosines[n] for n in cosines})
    assert grown == front


def test_rules_choose_a_tensor_and_groups_complete_its_block():
    prepared = {
        "statistics/visual.transformer.resblocks.0.attn.out_proj.weight": torch.tensor([1.0, 9.0, 3.0, 4.0]),
        "statistics/visual.transformer.resblocks.2.mlp.c_fc.weight": torch.tensor([1.0, 1.0, 0.1, 4.0]),
    }
    first, second = (k.removeprefix("statistics/") for k in prepared)
    assert choose(prepared, SLUGSettings(layer="importance")) == first
    assert choose(prepared, SLUGSettings(layer="alignment")) == second
    assert choose(prepared, SLUGSettings(layer="deepest")) == second
    assert choose({k: v for k, v in prepared.items() if "0" in k}, SLUGSettings(layer="deepest")) == first
    names = [
        "a.0.to_q.weight",
        "a.0.to_k.weight",
        "a.0.to_v.weight",
        "a.0.fc1.weight",
        "a.0.fc2.weight",
        "a.1.out.weight",
    ]
    assert set(group(names[1], names, "block")) == set(names[:3])
    assert group(names[1], names, "block")[0] == names[1]
    assert set(group(names[3], names, "block")) == set(names[3:5])
    assert group(names[5], names, "block") == [names[5]]
    assert group(names[1], names, "tensor") == [names[1]]
    assert depth("up_blocks.0.x.1.weight") > depth("mid_block.attentions.0.w") > depth("down_blocks.1.resnets.0.w")


def test_one_tensor_moves_by_the_step_asked_for():
    _, model, method = clip_slug(layer="importance", step=0.2)
    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    method.step({})
    (name,) = method.chosen
    after = dict(model.net.named_parameters())
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    change, d = (after[name] - before[name]).detach(), method.prepared[f"forget/{name}"]
    assert float(change.norm() / before[name].norm()) == pytest.approx(0.2)
    assert float(alignment(change, d, signed=True)) == pytest.approx(1.0)
    once = after[name].detach().clone()
    method.apply(0.2)
    assert torch.equal(after[name], once)
    method.apply(0.0)
    assert torch.equal(after[name], before[name])
    assert after[name].requires_grad
    assert after[name].dtype == D


def test_ascent_lowers_the_similarity_and_descent_raises_it():
    for direction, sign in (("ascent", -1), ("descent", 1)):
        task, model, method = clip_slug(layer="importance", step=1e-4, direction=direction)
        rows, retained = rows_of(task, "forget"), rows_of(task, "retain")
        model.net.eval()
        with torch.no_grad():
            similarity, loss = 1 - float(forget_loss(model, rows)), float(retain_loss(model, retained))
            method.step({})
            assert sign * (1 - float(forget_loss(model, rows)) - similarity) > 0
        whole = gradient_pass(model, task, "retain", retain_loss, method.chosen, 99, 1, 0)[method.chosen[0]]
        change = method.theta[method.chosen[0]].detach() - method.before[method.chosen[0]]
        expected = float((whole * change).sum())
        assert float(retain_loss(model, retained).detach()) - loss == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_several_concepts_add_up_in_any_order():
    g = torch.Generator().manual_seed(0)
    theta = {n: torch.randn((3, 2), generator=g, dtype=D) for n in "abc"}
    edits = [(n, 0.1 * k, torch.randn((3, 2), generator=g, dtype=D)) for k, n in enumerate("abab", 1)]
    one, other = edited(theta, edits), edited(theta, edits[::-1])
    for n in "ab":
        torch.testing.assert_close(one[n], other[n], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one[n], theta[n] + sum(lam * d for m, lam, d in edits if m == n))
    assert one["c"] is theta["c"]


def test_unknown_layer_gets_near_matches(points_task):
    (reason,) = SLUG.unsuited(
        SLUGSettings(layer="down_blocks.0.resnets.0.conv1.wieght"), tiny_model(points_task), Goal("points")
    )
    assert "down_blocks.0.resnets.0.conv1.weight" in reason
    assert not SLUG.unsuited(SLUGSettings(layer="deepest"), tiny_model(points_task), Goal("points"))


def search(first: float, outcomes, target=0.0):
    bracket, sizes = Bracket(first), []
    for value in outcomes:
        sizes.append(bracket.size)
        bracket.tell(value <= target)
    return bracket, sizes


@pytest.mark.parametrize(
    ("first", "outcomes", "final"),
    [
        (0.1 * 0.80443600785, (0.6, 0, 0, 0.2, 0, 0.2, 0, 0.1, 0.1, 0), 0.107781855739),
        (0.000905457767, (0, 0, 1, 0.56, 0.06, 0, 0.06, 0, 0, 0), 0.000412054023),
    ],
)
def test_search_repeats_the_published_traces(first, outcomes, final):
    bracket, sizes = search(first, outcomes)
    assert len(sizes) == 10
    assert bracket.size == pytest.approx(final, rel=1e-6) or sizes[-1] == pytest.approx(final, rel=1e-6)


@given(st.floats(1e-3, 5.0), st.integers(3, 12))
@settings(max_examples=100, deadline=None)
def test_search_brackets_a_monotone_threshold(threshold, evaluations):
    bracket, widths, first_success = Bracket(0.1), [], None
    for k in range(1, evaluations + 1):
        low, high, size = bracket.low, bracket.high, bracket.size
        forgot = size >= threshold
        bracket.tell(forgot)
        assert bracket.low >= low
        assert high is None or bracket.high <= high
        if high is None:
            assert forgot or bracket.size == 2 * size
        else:
            assert bracket.high - bracket.low == pytest.approx((high - low) / 2)
        if forgot and first_success is None:
            first_success = k
        if bracket.high is not None:
            widths.append(bracket.high - bracket.low)
    if first_success is None:
        assert bracket.high is None
        assert bracket.size == pytest.approx(0.1 * 2**evaluations)
        return
    assert bracket.low < threshold <= bracket.high
    cell = 0.1 * 2 ** max(0, first_success - 2)
    assert widths[-1] == pytest.approx(cell / 2 ** (evaluations - first_success))
    assert not bracket.noisy


def test_search_flags_a_noisy_outcome():
    bracket, _ = search(0.1, (1, 0, 1, 0, 1, 1))
    assert not bracket.noisy
    bracket = Bracket(0.1)
    bracket.tell(False)
    bracket.size = 0.05  # evaluated again below a failure, and it forgets
    bracket.tell(True)
    assert bracket.noisy


def test_search_inside_the_method_keeps_the_smallest_step_that_forgot(class_task):
    model = tiny_model(class_task, dtype=D)
    hp = SLUGSettings(layer="importance", bisection=6, target=0.5, batch_size=8)
    method = SLUG(model, hp, SLUG.prepare(model, class_task, 0, hp), class_task.goal)
    seen = [method.step(batch_for(method, class_task)) for _ in range(method.steps)]
    outcome = method.finish()
    forgot = [float(s["step"]) for s in seen if float(s["forget_accuracy"]) <= 0.5]
    assert outcome["bracketed"] == float(bool(forgot))
    if forgot:
        assert outcome["step"] == min(forgot)
        assert outcome["distance"] == pytest.approx(outcome["step"] * float(method.before[method.chosen[0]].norm()))


def test_recall_is_an_accuracy(class_task, points_task):
    for task in (class_task, points_task):
        model = tiny_model(task, dtype=D)
        rows = {s: task.all_rows(s, 0).to(torch.device("cpu"), D) for s in ("forget", "retain")}
        assert 0 <= recall(model, rows["forget"], rows["retain"], task.goal) <= 1
    task, model, _ = clip_slug()
    assert 0 <= recall(model, rows_of(task, "forget"), rows_of(task, "retain"), task.goal) <= 1


def test_text_conditional_model_offers_encoder_and_network_tensors():
    task, model = text_task(), TinyText.tiny(dtype=D)
    task.__dict__["goal"] = Goal("concept", concept=PROMPTS[2])
    hp = SLUGSettings(candidates="all", passes=1)
    prepared = SLUG.prepare(model, task, 0, hp)
    offered = SLUG.choices("layer", prepared, hp)
    assert any(n.startswith("text_encoder") for n in offered)
    assert any(n.startswith("unet") for n in offered)
