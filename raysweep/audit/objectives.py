"""Residue and damage: a candidate's measurements, anchored by measured models rather than by assumption.

residue  the worst over the task's views of (candidate - oracle)/(base - oracle): 0 like the oracle, 1 like the untouched
         base. A view whose gap between base and oracle is under four standard errors says nothing and is left out; so is one in which
         the base shows less of what must be forgotten than the oracle, as a base does that has not learned it.
damage   the larger of log(F/F_oracle)/log(F_destroyed/F_oracle), with F the Frechet distance on retained content, and of
         over-forgetting, the farthest that any view lies beyond the oracle in units of its distance to the base or to a
         destroyed model, whichever is larger, at most 1: 0 like the oracle, 1 like a destroyed model.
Both are cut at 0. The oracle is the mean over retrained models. A view that an anchor lacks is left out, with the reason;
without the anchors' quality and validity no model can be placed, and `Unmeasured` says what is missing and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluators.statistics import jackknife_se

INFORMATIVE = 4.0
# On which side of the oracles a model lies that knows what must be forgotten; of metrics that are not here nothing is assumed.
KNOWS = {
    "classifier.leak": 1,
    "classifier.recognised": 1,
    "contrast.forget_similarity": 1,
    "contrast.recognised": 1,
    "denoising.forget_log_loss": -1,
    "generation.rate": 1,
    "questions.forget_accuracy": 1,
    "reconstruction.correlation": 1,
    "relearning.presence": 1,
}

Values = Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """Metric values and their leave-one-group-out replicates (groups,), both by "check.metric".

    absent: why a check gave no value, by "check.metric".
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return min((len(r) for r in self.replicates.values()), default=0)

    def has(self, metric: str) -> bool:
        """Whether the metric was measured and is finite."""
        return bool(np.isfinite(self.values.get(metric, np.nan)))

    def why_absent(self, metric: str) -> str:
        """Why the metric has no value."""
        if metric in self.values:
            return f"it is {self.values[metric]:g}"
        if metric in self.absent:
            return self.absent[metric]
        check = metric.partition(".")[0]  # one that failed names its main metrics alone
        others = (why for name, why in self.absent.items() if name.startswith(f"{check}."))
        return next(others, f"{check} does not give it")

    def part(self, group: int) -> Values:
        """The values without one group of units."""
        return {name: float(r[group]) for name, r in self.replicates.items()}


@dataclass(frozen=True)
class Anchors:
    """The models that fix the scales, as one tier measured them."""

    base: Measured
    oracles: tuple[Measured, ...]
    destroyed: Measured

    def lacking(self, metric: str) -> Iterator[str]:
        """Each anchor that has no value of the metric, with the reason."""
        oracles = {f"oracle-{k}": oracle for k, oracle in enumerate(self.oracles)}
        for name, anchor in {"base": self.base, **oracles, "destroyed": self.destroyed}.items():
            if not anchor.has(metric):
                yield f"{name} ({anchor.why_absent(metric)})"


@dataclass(frozen=True)
class View:
    """One view of the residue: its anchors (None where an anchor lacks it) and whether it can tell base and oracle apart."""

    metric: str
    base: float | None
    oracle: float | None
    gap_se: float | None
    informative: bool
    reason: str


@dataclass(frozen=True)
class Objectives:
    """A candidate's place. `replicates` (groups, 2) are residue and damage without each group of units in turn."""

    residue: float
    damage: float
    residue_se: float
    damage_se: float
    over_forgetting: float
    validity: float
    views: dict[str, float]
    replicates: np.ndarray

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}


class Unmeasured(ValueError):
    """An objective lacks a measurement; the message names it."""


class Indistinct(Unmeasured):
    """No view tells the base from the oracles, or none in the right direction; `views` holds each with its reason."""

    def __init__(self, views: list[View]):
        super().__init__(
            "no view shows that the base knows more of what must be forgotten than the oracles, so there is nothing to forget: "
            + "; ".join(f"{v.metric}: {v.reason}" for v in views)
        )
        self.views = views


def assess_views(anchors: Anchors, metrics: Sequence[str]) -> list[View]:
    """Each view with its verdict; raises Indistinct if none shows that the base knows more."""
    views = []
    for metric in metrics:
        lacking = list(anchors.lacking(metric))
        if lacking:
            views.append(View(metric, None, None, None, False, f"not measured on {', '.join(lacking)}"))
            continue
        base, oracle = anchors.base.values[metric], float(np.mean([o.values[metric] for o in anchors.oracles]))
        gap = anchors.base.replicates[metric] - np.mean([o.replicates[metric] for o in anchors.oracles], axis=0)
        se = jackknife_se(gap)
        reason = _not_used(metric, base, oracle, se)
        views.append(View(metric, base, oracle, se, not reason, reason))
    if not any(v.informative for v in views):
        raise Indistinct(views)
    return views


def knows_less(metric: str, base: float, oracle: float) -> bool:
    """Whether the base lies on the side of the oracle where a model lies that knows less of what must be forgotten."""
    return KNOWS.get(metric, 0) * (base - oracle) < 0


def _not_used(metric: str, base: float, oracle: float, se: float) -> str:
    """Why a view says nothing; empty if it tells the base from the oracle."""
    gap = abs(base - oracle)
    if gap == 0:
        return f"base and oracle are both {base:.3g}"
    if gap <= INFORMATIVE * se:
        return (
            f"base and oracle differ by {gap:.3g} ({base:.3g} and {oracle:.3g}); at this sample size at least "
            f"{INFORMATIVE * se:.3g} is needed to tell them apart"
        )
    if knows_less(metric, base, oracle):
        return f"the base ({base:.3g}) shows less of what must be forgotten than the oracle ({oracle:.3g})"
    return ""


def check_scale(anchors: Anchors, quality: str, validity: str) -> None:
    """Raises Unmeasured if the anchors do not fix the scale of damage, so that no model could be placed on it."""
    for metric in (quality, validity):
        lacking = list(anchors.lacking(metric))
        if lacking:
            raise Unmeasured(f"{metric} was not measured on {', '.join(lacking)}, so no model can be placed")
    _ends_of_damage([o.values for o in anchors.oracles], anchors.destroyed.values, quality)


def _ends_of_damage(oracles: Sequence[Values], destroyed: Values, quality: str) -> tuple[float, float]:
    """The quality at damage 0 and at damage 1."""
    best, worst = float(np.mean([o[quality] for o in oracles])), destroyed[quality]
    if not (best > 0 and worst > 0) or best == worst:
        raise Unmeasured(f"{quality} cannot tell damage: the oracles have {best:.3g}, a destroyed model {worst:.3g}")
    return best, worst


def objectives(candidate: Measured, anchors: Anchors, views: Sequence[View], quality: str, validity: str) -> Objectives:
    """Residue and damage of a candidate from the informative `views` and the metric `quality`; `validity` names the metric
    that says which share of it is good for anything.

    Raises Unmeasured, with the reason, if the candidate or an anchor lacks one of these.
    """
    check_scale(anchors, quality, validity)
    used = [v.metric for v in views if v.informative]
    for metric in (*used, quality, validity):
        if not candidate.has(metric):
            raise Unmeasured(f"{metric} was not measured ({candidate.why_absent(metric)})")
    for metric in used:
        lacking = list(anchors.lacking(metric))
        if lacking:
            raise Unmeasured(f"{metric} was not measured on {', '.join(lacking)}")

    def place(
        own: Values, base: Values, oracles: Sequence[Values], destroyed: Values
    ) -> tuple[float, float, float, dict]:
        anchored, past = {}, []
        for metric in used:
            oracle = float(np.mean([o[metric] for o in oracles]))
            gap = base[metric] - oracle
            anchored[metric] = (own[metric] - oracle) / gap
            past.append(-anchored[metric] * min(1.0, abs(gap / (destroyed[metric] - oracle or gap))))
        beyond = max(0.0, *past)
        best, worst = _ends_of_damage(oracles, destroyed, quality)
        damage = float(np.log(max(own[quality], 1e-12) / best) / np.log(worst / best))
        return max(0.0, *anchored.values()), max(min(1.0, beyond), damage, 0.0), beyond, anchored

    residue, damage, beyond, anchored = place(
        candidate.values, anchors.base.values, [o.values for o in anchors.oracles], anchors.destroyed.values
    )
    parts = np.array(
        [
            place(
                candidate.part(g), anchors.base.part(g), [o.part(g) for o in anchors.oracles], anchors.destroyed.part(g)
            )[:2]
            for g in range(candidate.groups)
        ]
    )
    return Objectives(
        residue=residue,
        damage=damage,
        residue_se=jackknife_se(parts[:, 0]),
        damage_se=jackknife_se(parts[:, 1]),
        over_forgetting=beyond,
        validity=candidate.values[validity],
        views=anchored,
        replicates=parts,
    )
