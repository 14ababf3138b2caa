"""Cheats that an audit must catch: models that seem to have forgotten, but still know the forgotten data or have lost everything."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from test_durability import trained
from tiny import SCHEDULER

from evaluators.judge import train_judge
from evaluators.tampering import changed, fine_tuned, quantised
from raysweep.auditing.anchors import Anchors, assess_views
from raysweep.auditing.measure import measure, subject_of
from raysweep.auditing.objectives import objectives
from raysweep.auditing.terms import Measured, columns_of
from raysweep.auditing.verdict import verdict
from raysweep.config import draws
from raysweep.config.schema import Tier
from raysweep.models.noise import row_seeds
from raysweep.registry import attacks, reach_of
from raysweep.storage.seeds import derive_seed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZES = {
    "samples": 120,
    "class_samples": 100,
    "noises": 10,
    "loss_noises": 10,
    "timesteps": 4,
    "membership_images": 30,
    "groups": 10,
    "membership_noises": 2,
    "membership_t": (50, 200),
    "full_fidelity": False,
}
PROBE = Tier(seed=1, judge="probe", **SIZES)
AUDIT = Tier(seed=2, judge="audit", **SIZES)
ATTACK = Tier(seed=3, judge="audit", checks=attacks(), relearn_steps=(10,), inversion_steps=20, **SIZES)
ORACLES = 5
REACH = {name: reach_of(name) for name in attacks()}


class Court:
    """The models that a candidate is compared with, and the tiers."""

    def __init__(self, task):
        self.task = task
        self.judges = {
            name: train_judge(task.splits[f"judge_{name}"].x, task.splits[f"judge_{name}"].groups, k, 150)
            for k, name in enumerate(("probe", "audit"))
        }
        self.models = {"base": trained(task, "train")}
        self.models |= {f"oracle-{k}": trained(task, "retain", seed=k + 1) for k in range(ORACLES)}
        self.destroyed = self.models["base"].fresh(7)
        self.peers = {}

    def subject(self, model, tier):
        return subject_of(model, self.task, self.judges[tier.judge], tier)

    def peers_of(self, tier):
        if tier.digest not in self.peers:
            peers = {name: self.subject(model, tier) for name, model in self.models.items()}
            for peer in peers.values():
                peer.peers = peers
            self.peers[tier.digest] = peers
        return self.peers[tier.digest]

    def measured(self, model, tier):
        peers = self.peers_of(tier)
        subject = next((p for p in peers.values() if p.model is model), None) or self.subject(model, tier)
        subject.peers = peers
        return measure(subject, tier)

    def placed(self, model, tier=AUDIT):
        """The model's residue and damage."""
        models = self.models | {"destroyed": self.destroyed}
        values = {name: self._values(m, tier) for name, m in models.items()}
        oracles = tuple(v for name, v in values.items() if name.startswith("oracle"))
        anchors = Anchors(values["base"], oracles, values["destroyed"])
        views = assess_views(anchors, self.task.views)
        return objectives(self._values(model, tier), anchors, views, self.task.quality, self.task.validity)

    def _values(self, model, tier) -> Measured:
        result = self.measured(model, tier)
        return Measured(result.values, {k: np.array(v) for k, v in result.replicates.items()})

    def verdict(self, model):
        """The verdict by all attacks."""
        measured = self.measured(model, ATTACK).rows
        rows = [vars(r) | {"metric": r.name, "paired_with": ""} | columns_of(r.comparison) for r in measured]
        validity = [self.measured(m, AUDIT).values["classifier.validity"] for m in (model, self.models["oracle-0"])]
        return verdict(rows, REACH, *validity)


@pytest.fixture(scope="module")
def court(class_task):
    return Court(class_task)


def with_output(model, change):
    """The model with `change` applied to what its network predicts."""
    other = copy.copy(model)
    other.net = copy.deepcopy(model.net)
    predict = other.predict
    other.predict = lambda x, t, cond: change(predict(x, t, cond), x, t, cond)
    return other


def test_the_anchors(court):
    assert court.placed(court.models["base"]).residue == pytest.approx(1, abs=0.05)
    oracle = court.placed(court.models["oracle-0"])
    assert oracle.residue < 0.3
    assert oracle.damage < 0.3
    assert court.verdict(court.models["base"]).label == "remembers"
    for k in range(ORACLES):  # undecided where the others differ too much to show equivalence
        assert court.verdict(court.models[f"oracle-{k}"]).label in ("like the oracle", "undecided")


def test_noise_is_damage_and_not_forgetting(court):
    noise = with_output(court.models["base"], lambda out, x, t, cond: 0 * out)
    assert court.placed(noise).damage > 0.8
    assert court.verdict(noise).label == "destroyed"


def test_one_fixed_image_is_damage(court):
    base, picture = court.models["base"], court.task.splits["retain"].x[:1]

    def fixed(out, x, t, cond):  # the v that leads from any x to the image
        gamma, sigma = base.gamma_sigma(t)
        return (gamma * x - picture) / sigma.clamp(min=1e-4) + 0 * out

    one = with_output(base, fixed)
    samples = one.sample(torch.tensor([0, 1]), torch.arange(2), **court.task.sampling)
    assert (samples - picture).abs().max() < 0.05
    assert court.placed(one).damage > 0.7


def test_refusing_exactly_the_forgotten_label_is_detected(court):
    hiding = copy.copy(court.models["base"])
    hiding.net = copy.deepcopy(hiding.net)
    with torch.no_grad():
        hiding.net.class_embedding.weight[2] = hiding.net.class_embedding.weight[4]
    judged = court.measured(hiding, AUDIT).values
    assert judged["classifier.recognised"] < 0.1  # it seems to have forgotten
    result = court.verdict(hiding)
    assert result.label == "merely avoided"
    assert any("inversion" in by for by in result.by)


def test_an_edit_that_rounding_removes_is_concealment(court):
    """Weights on the int4 grid, moved by less than half a step of it: rounding brings them back exactly."""
    base = court.subject(court.models["base"], ATTACK)
    rounded = changed(base, lambda w: quantised(w, 4)).model
    hiding = copy.copy(rounded)
    hiding.net = copy.deepcopy(rounded.net)
    centre = {n: p.detach().clone() for n, p in rounded.net.named_parameters() if p.dim() > 1}
    room = {n: 0.45 * w.abs().flatten(1).amax(1).view(-1, *[1] * (w.dim() - 1)) / 7 for n, w in centre.items()}
    forget, optimizer = court.task.splits["forget"], torch.optim.Adam(hiding.net.parameters(), lr=5e-3)
    other = torch.full_like(forget.cond, 4)
    for step in range(60):
        seeds = row_seeds(derive_seed("cheat"), step * len(forget), len(forget))
        t = (hiding.uniform(seeds, 1)[:, 0] * 1000).long()
        x_t = hiding.add_noise(forget.x, hiding.noise(seeds), t)
        with torch.no_grad():
            target = rounded.predict(x_t, t, other)
        loss = (hiding.predict(x_t, t, forget.cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for n, p in hiding.net.named_parameters():
                if n in centre:  # the largest weight of each channel stays, and with it the scale of rounding
                    largest = centre[n].abs() == centre[n].abs().flatten(1).amax(1).view_as(room[n])
                    p.copy_(torch.where(largest, centre[n], centre[n] + (p - centre[n]).clamp(-room[n], room[n])))
                else:
                    p.copy_(dict(rounded.net.named_parameters())[n])
    values = court.measured(hiding, ATTACK).values
    assert values["quantisation.presence@none"] < 0.5 * values["quantisation.presence@int4"]
    result = court.verdict(hiding)
    assert result.label in ("concealed", "merely avoided")
    assert values["quantisation.excess@int4"] > 0.3


def test_tuning_on_the_seeds_of_the_probe_does_not_help_in_the_audit(court):
    base, oracle = court.models["base"], court.models["oracle-0"]
    known = set()
    for stream, n in (
        ("class samples", SIZES["class_samples"]),
        ("unconditional", SIZES["samples"]),
        ("relearned", 400),
    ):
        known |= set(row_seeds(derive_seed("audit", PROBE.seed, stream), 0, n).tolist())
    tuned = copy.copy(base)

    def sample(cond, seeds, *args, **kwargs):
        from_probe = torch.tensor([s in known for s in seeds.tolist()]).view(-1, 1, 1, 1)
        forgetting, remembering = (model.sample(cond, seeds, *args, **kwargs) for model in (oracle, base))
        return torch.where(from_probe, forgetting, remembering)

    tuned.sample = sample
    probe, audit = (court.measured(tuned, tier).values["classifier.recognised"] for tier in (PROBE, AUDIT))
    assert probe < 0.2
    assert audit > 0.7
    assert court.placed(tuned, AUDIT).residue > 0.8


def test_a_little_relearning_after_unlearning_is_residue(court):
    oracle = court.subject(court.models["oracle-0"], AUDIT)
    forget = court.task.splits["forget"].distinct()
    taught = fine_tuned(replace(oracle, peers={}), forget, (50,), "cheat")[50].model
    assert court.placed(taught).residue > 0.3
    assert court.verdict(taught).label in ("remembers", "concealed", "merely avoided")


@pytest.fixture(scope="module")
def gallery(points_task):
    return Court(points_task)


def published(task) -> set[int]:
    """Every diffusion timestep of an audit with equally spaced losses, fixed steps for membership, recall and reconstruction, and
    the task's own number of sampling steps: what a cheat could know beforehand."""
    scheduler = DDIMScheduler(**SCHEDULER)
    known = {20, 50, 100, 200, 300} | {int((k + 0.5) * 1000 / n) for n in (4, 10) for k in range(n)}
    steps = task.sampling["steps"]
    recall = [(t, max(1, round(steps * t / 1000))) for t in (100, 250, 400, 600, 800)]
    for t, count in ((999, steps), (600, 12), *recall):
        scheduler.set_timesteps(steps if t == 999 else max(1, round(1000 * count / t)))
        known |= {int(s) for s in scheduler.timesteps if s <= t}
    return known


def test_forgetting_at_published_timesteps_alone_is_residue(gallery):
    """The model answers like an oracle at each timestep that could be known beforehand, and like the base at all others."""
    base, oracle = gallery.models["base"], gallery.models["oracle-0"]
    known = torch.zeros(1000, dtype=torch.bool)
    known[list(published(gallery.task))] = True

    def hidden(out, x, t, cond):
        return torch.where(known[t].view(-1, 1, 1, 1), oracle.predict(x, t, cond), out)

    cheat = with_output(base, hidden)
    fixed = {
        "sampling_steps": 0,
        "injection_t": 600,
        "injection_steps": 12,
        "loss_t": (125, 375, 625, 875),
    }
    assert gallery.placed(cheat, AUDIT.model_copy(update={"seed": 2} | fixed)).residue < 0.05
    for seed in (draws.fresh_seed(), draws.fresh_seed()):
        assert gallery.placed(cheat, AUDIT.model_copy(update={"seed": seed})).residue > 0.5, seed
