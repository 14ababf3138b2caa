"""The measured models that fix the scales of residue and damage, and which views tell the base from the oracles. No Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.auditing.terms import Measured, term

INFORMATIVE = 4.0  # least difference of base and oracles, in standard errors, for a view to count
ALTERED = tuple(f"altered.presence@{alteration}" for alteration in ("mirror", "negative", "shift", "crop"))
# Views that add to the others: a list of checks may leave them out.
ADDED = (*ALTERED, "denoising.unlabelled_log_loss")
# Side of the oracles on which models with the forgotten data lie; other metrics have no known side.
KNOWS = dict.fromkeys(ALTERED, 1) | {
    "classifier.leak": 1,
    "classifier.recognised": 1,
    "contrast.forget_similarity": 1,
    "contrast.recognised": 1,
    "denoising.forget_log_loss": -1,
    "denoising.unlabelled_log_loss": -1,
    "generation.rate": 1,
    "questions.forget_accuracy": 1,
    "reconstruction.correlation": 1,
    "relearning.presence": 1,
}
# Views on which the base is like the oracles; their unit is the distance of base and oracles on another view.
SCALED_BY = dict.fromkeys(ALTERED, "reconstruction.correlation")

Values = Mapping[str, float]


@dataclass(frozen=True)
class Anchors:
    """The measurements, in one tier, of the models that fix the scales."""

    base: Measured
    oracles: tuple[Measured, ...]
    destroyed: Measured

    def lacking(self, metric: str) -> Iterator[str]:
        """Each anchor without a value of the metric, with the reason."""
        for name, anchor in self.by_name().items():
            if not anchor.has(metric):
                yield f"{name} ({anchor.why_absent(metric)})"

    def by_name(self) -> dict[str, Measured]:
        """The anchors as tables name them: base, oracle-K, destroyed."""
        oracles = {f"oracle-{k}": oracle for k, oracle in enumerate(self.oracles)}
        return {"base": self.base, **oracles, "destroyed": self.destroyed}

    def mean_oracle(self, metric: str) -> float:
        """The mean of a metric over the oracles."""
        return float(np.mean([oracle.values[metric] for oracle in self.oracles]))

    def without_oracle(self, index: int) -> Anchors:
        """The anchors without one oracle, to place it by; a single one stays, since without it there is no scale."""
        others = self.oracles[:index] + self.oracles[index + 1 :]
        return Anchors(self.base, others or self.oracles, self.destroyed)


@dataclass(frozen=True)
class View:
    """One view of the residue.

    base, oracle: their values, None if an anchor lacks the metric; gap_se: the standard error of the difference of the base to one
    further oracle. informative: whether it separates them in the right direction; reason: why not.
    """

    metric: str
    base: float | None
    oracle: float | None
    gap_se: float | None
    informative: bool
    reason: str


class Unmeasured(ValueError):
    """A measurement that an objective needs is missing; the message names it."""


class Indistinct(Unmeasured):
    """No view separates the base from the oracles in the right direction; `views` contains each with its reason."""

    def __init__(self, views: list[View]):
        super().__init__(
            "no view shows that the base knows more of what must be forgotten than the oracles, so there is nothing to forget: "
            + "; ".join(f"{v.metric}: {v.reason}" for v in views)
        )
        self.views = views


def assess_views(anchors: Anchors, metrics: Sequence[str]) -> list[View]:
    """Assesses each view; raises Indistinct if none shows that the base knows more than the oracles."""
    views: dict[str, View] = {}
    for metric in sorted(metrics, key=lambda m: m in SCALED_BY):  # those that give their unit to others first
        lacking = list(anchors.lacking(metric))
        if lacking:
            views[metric] = View(metric, None, None, None, False, f"not measured on {', '.join(lacking)}")
            continue
        base, oracle = anchors.base.values[metric], anchors.mean_oracle(metric)
        se = term(anchors.base, anchors.oracles, metric).comparison.se
        if metric in SCALED_BY:
            unit = views.get(SCALED_BY[metric])
            reason = (
                ""
                if unit and unit.informative
                else f"its unit, {SCALED_BY[metric]}, does not separate base and oracles"
            )
        else:
            reason = _uninformative(metric, base, oracle, se)
        views[metric] = View(metric, base, oracle, se, not reason, reason)
    assessed = [views[metric] for metric in metrics]
    if not any(v.informative for v in assessed):
        raise Indistinct(assessed)
    return assessed


def knows_less(metric: str, base: float, oracle: float) -> bool:
    """Whether the base lies on the side of the oracle that means less knowledge of what must be forgotten."""
    return KNOWS.get(metric, 0) * (base - oracle) < 0


def _uninformative(metric: str, base: float, oracle: float, se: float) -> str:
    """The reason why a view is uninformative; empty if it separates the base from the oracles."""
    gap = abs(base - oracle)
    if gap == 0:
        return f"base and oracles are both {base:.3g}"
    if gap <= INFORMATIVE * se:
        return (
            f"base and oracles differ by {gap:.3g} ({base:.3g} and {oracle:.3g}); with these samples and these oracles at least "
            f"{INFORMATIVE * se:.3g} is needed to tell the base from a further oracle"
        )
    if knows_less(metric, base, oracle):
        return f"the base ({base:.3g}) shows less of what must be forgotten than the oracles ({oracle:.3g})"
    return ""


def check_scale(anchors: Anchors, quality: str, validity: str) -> None:
    """Raises Unmeasured if the anchors do not fix the scale of damage."""
    for metric in (quality, validity):
        lacking = list(anchors.lacking(metric))
        if lacking:
            raise Unmeasured(f"{metric} was not measured on {', '.join(lacking)}, so no model can be placed")
    ends_of_damage([o.values for o in anchors.oracles], anchors.destroyed.values, quality)


def ends_of_damage(oracles: Sequence[Values], destroyed: Values, quality: str) -> tuple[float, float]:
    """The logarithm of the quality at damage 0 and at damage 1."""
    values = [o[quality] for o in oracles]
    worst = destroyed[quality]
    if min(values) > 0 and worst > 0:
        best = float(np.log(values).mean())
        if best != math.log(worst):
            return best, math.log(worst)
    mean = float(np.mean(values))
    raise Unmeasured(f"{quality} cannot tell damage: the oracles have {mean:.3g}, a destroyed model {worst:.3g}")
