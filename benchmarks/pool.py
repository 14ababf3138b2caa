"""A pool of oracles of an embedded task, measured once each, and judgements of any model by any of them.

Attacks and checks run on each model alone; their scores per sample are kept in `benchmarks/results/pool-KIND/` and combined with
those of the oracles of a judgement by the checks' own code, so that thousands of judgements cost no further pass of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from ground import Ground
from unlearning import RESULTS, TASKS

from evaluators.base import Scores
from evaluators.durability import Durability
from evaluators.membership import Attack, Loss
from evaluators.metrics import SHARE, Metric
from evaluators.statistics import share_floor
from raysweep.auditing.anchors import Anchors, Unmeasured, View, assess_views
from raysweep.auditing.measure import measure, reduce, subject_of
from raysweep.auditing.objectives import Objectives, objectives
from raysweep.auditing.terms import Measured, columns_of, term
from raysweep.auditing.verdict import Verdict, verdict
from raysweep.config.schema import Tier
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import reach_of, resolve
from raysweep.storage.files import write_file

TIERS = ("audit", "durability")
LEFT_OUT = ("interpolation", "sampler_removal")  # they do not count, or need a candidate made from the base
Measurements = dict[str, dict[str, np.ndarray]]  # tier -> "check.score" -> array


@dataclass(frozen=True)
class Judgement:
    """What raysweep says of a model by some oracles.

    verdict: None if the attacks were not measured; differences: metric -> 95 % interval of the difference to the oracles.
    """

    place: Objectives
    views: list[View]
    verdict: Verdict | None
    differences: dict[str, tuple[float, float]]


class Pool:
    """The oracles of a task, its base and a destroyed model, with their scores.

    Args:
        kind: "points" or "class".
        oracles: number of oracles.
        tiers: those to measure; without "durability", of the attacks, there are no verdicts.
    """

    def __init__(self, kind: str, oracles: int, tiers: Sequence[str] = TIERS):
        self.kind, self.tiers = kind, tiers
        self.ground = Ground(*TASKS[kind], f"oracles={oracles}")
        self.oracles = [f"oracle-{k}" for k in range(oracles)]
        self._scores: dict[str, Measurements] = {}
        self._measured_alone: dict[str, Measured] = {}

    def tier(self, name: str) -> Tier:
        """The default audit's tier with the checks of objectives, verdicts and the loss attack, on fixed seeds."""
        tier: Tier = getattr(self.ground.sweep.audit, name)
        if name == "durability":
            chosen = tier.checks_for(self.ground.task)
            return tier.model_copy(update={"checks": tuple(c for c in chosen if c not in LEFT_OUT)})
        needed = tier.model_copy(update={"checks": None}).checks_for(self.ground.task)
        return tier.model_copy(update={"checks": (*needed, "loss"), "full_fidelity": False, "strips": 0})

    def scores(self, name: str, make: Callable[[], PixelDDPM] | None = None) -> Measurements:
        """The scores of an anchor, or of the model that `make` makes, by tier; measured at the first call, then read."""
        if name not in self._scores:
            file = RESULTS / f"pool-{self.kind}" / f"{name}.npz"
            parts = self._read(file) if file.is_file() else {}
            missing = [tier for tier in self.tiers if tier not in parts]
            if missing:
                model = self.ground.model(name) if make is None else make()
                parts |= {tier: self._measured(model, tier) for tier in missing}
                self._save(file, parts)
            self._scores[name] = parts
        return self._scores[name]

    def measure_anchors(self) -> None:
        """Trains and measures the anchors that are missing, and says so."""
        for name in ("base", "destroyed", *self.oracles):
            self.scores(name)
            print(f"{name}: measured", flush=True)

    def judge(self, name: str, oracles: Sequence[str]) -> Judgement:
        """The judgement of a model, whose scores are known, by some oracles; raises Unmeasured if these cannot fix the scales."""
        task, own = self.ground.task, self.measured(name, "audit", oracles)
        others = [self.measured(o, "audit", [p for p in oracles if p != o]) for o in oracles]
        base, destroyed = (self.measured(anchor, "audit", oracles) for anchor in ("base", "destroyed"))
        place, views = self._placed(own, Anchors(base, tuple(others), destroyed))
        differences = {}
        for metric in own.values:
            if all(metric in other.values for other in others) and not metric.startswith("loss."):
                differences[metric] = term(own, others, metric).comparison.interval()
        for row in self.rows(name, "audit", oracles):
            if row.name == "gap" and row.lo is not None and row.hi is not None:
                differences[f"{row.check}.gap"] = (row.lo, row.hi)
        validity = float(np.mean([other.values[task.validity] for other in others]))
        attacked = "durability" in self.tiers
        said = self._verdict(name, oracles, own.values[task.validity], validity) if attacked else None
        return Judgement(place, views, said, differences)

    def place(self, name: str, oracles: Sequence[str]) -> Objectives:
        """Residue and damage of a model, whose scores are known, by some oracles; raises Unmeasured if these cannot fix the scales."""
        own, base, destroyed, *others = (self._alone(n) for n in (name, "base", "destroyed", *oracles))
        return self._placed(own, Anchors(base, tuple(others), destroyed))[0]

    def _placed(self, own: Measured, anchors: Anchors) -> tuple[Objectives, list[View]]:
        task = self.ground.task
        views = assess_views(anchors, task.views)
        return objectives(own, anchors, views, task.quality, task.validity), views

    def _alone(self, name: str) -> Measured:
        """What the objectives take of a model: nothing of it depends on the oracles beside it."""
        if name not in self._measured_alone:
            self._measured_alone[name] = self.measured(name, "audit", [])
        return self._measured_alone[name]

    def measured(self, name: str, tier: str, oracles: Sequence[str]) -> Measured:
        """The values of a model as objectives take them."""
        values, replicates, floors = {}, {}, {}
        for check, reduced in self._reduced(name, tier, oracles).items():
            values |= {f"{check}.{metric}": value for metric, value in reduced.values.items()}
            replicates |= {f"{check}.{metric}": parts for metric, parts in reduced.replicates.items()}
            shares = [m for m in reduced.metrics if m.interval.startswith(SHARE)]
            floors |= {f"{check}.{m.name}": share_floor(m.n) for m in shares}
        return Measured(values, replicates, {}, floors)

    def rows(self, name: str, tier: str, oracles: Sequence[str]) -> list[Metric]:
        """All metrics of a model next to some oracles."""
        parts = self._reduced(name, tier, oracles)
        return [Metric(**{**vars(m), "check": check}) for check, reduced in parts.items() for m in reduced.metrics]

    def _verdict(self, name: str, oracles: Sequence[str], validity: float, oracle_validity: float) -> Verdict:
        rows = [
            {"check": m.check, "metric": m.name, "status": m.status, "paired_with": "", "value": m.value, "se": m.se}
            | columns_of(m.comparison)
            for m in self.rows(name, "durability", oracles)
        ]
        reach = {check: reach_of(check) for check in {str(row["check"]) for row in rows}}
        return verdict(rows, reach, validity, oracle_validity)

    def _reduced(self, name: str, tier_name: str, oracles: Sequence[str]) -> dict[str, Any]:
        tier, own = self.tier(tier_name), _by_check(self.scores(name)[tier_name])
        others = [_by_check(self.scores(oracle)[tier_name]) for oracle in oracles]
        subject = subject_of(None, self.ground.task, self.ground.judges[tier.judge], tier)
        reduced = {}
        for check, scores in own.items():
            evaluator = resolve("evaluator", check)()
            known = [other[check] for other in others if check in other]
            joined = scores if not known else _joined(evaluator, scores, known)
            reduced[check] = reduce(evaluator, joined, subject, tier.groups)
        return reduced

    def _measured(self, model: PixelDDPM, tier_name: str) -> dict[str, np.ndarray]:
        tier, g = self.tier(tier_name), self.ground
        base = subject_of(g.model("base"), g.task, g.judges[tier.judge], tier)
        base.peers = {"base": base}
        subject = subject_of(model, g.task, g.judges[tier.judge], tier)
        subject.peers = base.peers
        result = measure(subject, tier)
        failed = [f"{row.check}: {row.reason}" for row in result.rows if row.status == "failed"]
        if failed:
            raise Unmeasured("; ".join(failed))
        return result.scores

    @staticmethod
    def _read(file: Path) -> Measurements:
        parts: Measurements = {}
        with np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                tier, _, score = key.partition("/")
                parts.setdefault(tier, {})[score] = stored[key]
        return parts

    @staticmethod
    def _save(file: Path, parts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        arrays: dict[str, Any] = {
            f"{tier}/{name}": array for tier, scores in parts.items() for name, array in scores.items()
        }
        write_file(file, lambda out: np.savez_compressed(out, **arrays))


class Mixture(torch.nn.Module):
    """A network that answers share(t) of the first and the rest of the second. share: steps (n,) -> shares (n,), 0 to 1."""

    def __init__(self, first: Any, second: Any, share: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.second, self.share, self.config = first, second, share, second.config

    def forward(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> UNet2DOutput:
        share = self.share(t).to(x).view(-1, 1, 1, 1)
        first, second = self.first(x, t, **cond).sample, self.second(x, t, **cond).sample
        return UNet2DOutput(sample=share * first + (1 - share) * second)


def _by_check(scores: Mapping[str, np.ndarray]) -> dict[str, Scores]:
    parts: dict[str, Scores] = {}
    for name, array in scores.items():
        check, _, score = name.partition(".")
        parts.setdefault(check, {})[score] = array
    return parts


def _joined(evaluator: Any, scores: Scores, others: Sequence[Scores]) -> Scores:
    """The scores that a check gives next to oracles, from the scores of each model alone."""
    if isinstance(evaluator, Durability):
        return scores | {f"oracles.{s}": np.stack([other[s] for other in others], 1) for s in scores}
    if isinstance(evaluator, Loss) and isinstance(evaluator, Attack):
        step = int(scores["calibration"][0][0])
        names = ("forget", "forget_holdout")
        return scores | {f"oracle_{n}": np.stack([other[n][:, step] for other in others], 1) for n in names}
    return scores
