"""Residue and damage: the measurements of a candidate on scales that measured models fix.

residue  the worst over the task's views of (candidate - oracle)/(base - oracle): 0 like the oracle, 1 like the untouched
         base. A view is left out if base and oracle differ by less than four standard errors, or if the base shows less of
         what must be forgotten than the oracle, as a base does that has not learned it.
damage   the larger of log(F/F_oracle)/log(F_destroyed/F_oracle), with F the Frechet distance on retained content, and of
         over-forgetting, the farthest that any view lies beyond the oracle in units of its distance to the base or to a
         destroyed model, whichever is larger, at most 1: 0 like the oracle, 1 like a destroyed model.

Both are cut at 0. The oracle is the mean over retrained models. A view that an anchor lacks is left out, with the reason;
without the anchors' quality and validity no model can be placed, and `Unmeasured` says what is missing and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from evaluators.statistics import jackknife_se

INFORMATIVE = 4.0  # least difference of base and oracles, in standard errors, for a view to count
# Side of the oracles on which models with the forgotten data lie; other metrics have no known side.
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

    absent: reason why a metric has no value, by "check.metric".
    """

    values: dict[str, float]
    replicates: dict[str, np.ndarray]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Number of groups of units; the smallest if metrics differ in it."""
        return min((len(r) for r in self.replicates.values()), default=0)

    def has(self, metric: str) -> bool:
        """Whether the metric was measured and is finite."""
        return bool(np.isfinite(self.values.get(metric, np.nan)))

    def why_absent(self, metric: str) -> str:
        """The reason why the metric has no finite value."""
        if metric in self.values:
            return f"it is {self.values[metric]:g}"
        if metric in self.absent:
            return self.absent[metric]
        check = metric.partition(".")[0]  # a failed check lists only its main metrics
        reasons = (reason for name, reason in self.absent.items() if name.startswith(f"{check}."))
        return next(reasons, f"{check} does not give it")

    def without(self, group: int) -> Values:
        """The values without one group of units."""
        return {name: float(r[group]) for name, r in self.replicates.items()}


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


@dataclass(frozen=True)
class View:
    """One view of the residue.

    base, oracle: their values, None if an anchor lacks the metric; gap_se: the standard error of their difference.
    informative: whether it separates them in the right direction; reason: why not.
    """

    metric: str
    base: float | None
    oracle: float | None
    gap_se: float | None
    informative: bool
    reason: str


@dataclass(frozen=True)
class Placement:
    """A model's place on the scales, with standard errors. views: anchored value of each informative view."""

    residue: float
    damage: float
    residue_se: float
    damage_se: float
    over_forgetting: float
    validity: float
    views: dict[str, float]


@dataclass(frozen=True)
class Objectives(Placement):
    """A placement, and residue and damage without each group of units in turn: replicates (groups, 2)."""

    replicates: np.ndarray

    def placement(self) -> Placement:
        """The placement without the replicates."""
        return Placement(**{f.name: getattr(self, f.name) for f in fields(Placement)})

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self.placement()) | {"replicates": self.replicates.tolist()}


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
    views = []
    for metric in metrics:
        lacking = list(anchors.lacking(metric))
        if lacking:
            views.append(View(metric, None, None, None, False, f"not measured on {', '.join(lacking)}"))
            continue
        base, oracle = anchors.base.values[metric], anchors.mean_oracle(metric)
        gap = anchors.base.replicates[metric] - np.mean([o.replicates[metric] for o in anchors.oracles], axis=0)
        se = jackknife_se(gap)
        reason = _uninformative(metric, base, oracle, se)
        views.append(View(metric, base, oracle, se, not reason, reason))
    if not any(v.informative for v in views):
        raise Indistinct(views)
    return views


def knows_less(metric: str, base: float, oracle: float) -> bool:
    """Whether the base lies on the side of the oracle that means less knowledge of what must be forgotten."""
    return KNOWS.get(metric, 0) * (base - oracle) < 0


def _uninformative(metric: str, base: float, oracle: float, se: float) -> str:
    """The reason why a view is uninformative; empty if it separates the base from the oracle."""
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
    """Raises Unmeasured if the anchors do not fix the scale of damage."""
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
    """Residue and damage of a candidate from the informative `views` and the metrics `quality` and `validity`.

    Raises Unmeasured, with the reason, if the candidate or an anchor lacks one of these.
    """
    check_scale(anchors, quality, validity)
    metrics = [v.metric for v in views if v.informative]
    for metric in (*metrics, quality, validity):
        if not candidate.has(metric):
            raise Unmeasured(f"{metric} was not measured ({candidate.why_absent(metric)})")
    for metric in metrics:
        lacking = list(anchors.lacking(metric))
        if lacking:
            raise Unmeasured(f"{metric} was not measured on {', '.join(lacking)}")
    base, oracles, destroyed = anchors.base, anchors.oracles, anchors.destroyed
    whole = _place(metrics, quality, candidate.values, base.values, [o.values for o in oracles], destroyed.values)
    parts = [
        _place(
            metrics,
            quality,
            candidate.without(g),
            base.without(g),
            [o.without(g) for o in oracles],
            destroyed.without(g),
        )
        for g in range(candidate.groups)
    ]
    replicates = np.array([[part.residue, part.damage] for part in parts])
    return Objectives(
        residue=whole.residue,
        damage=whole.damage,
        residue_se=jackknife_se(replicates[:, 0]),
        damage_se=jackknife_se(replicates[:, 1]),
        over_forgetting=whole.over_forgetting,
        validity=candidate.values[validity],
        views=whole.views,
        replicates=replicates,
    )


@dataclass(frozen=True)
class _Place:
    residue: float
    damage: float
    over_forgetting: float
    views: dict[str, float]


def _place(
    metrics: Sequence[str], quality: str, candidate: Values, base: Values, oracles: Sequence[Values], destroyed: Values
) -> _Place:
    views, beyond = {}, [0.0]
    for metric in metrics:
        oracle = float(np.mean([o[metric] for o in oracles]))
        gap = base[metric] - oracle
        views[metric] = (candidate[metric] - oracle) / gap
        beyond.append(-views[metric] * min(1.0, abs(gap / (destroyed[metric] - oracle or gap))))
    best, worst = _ends_of_damage(oracles, destroyed, quality)
    damage = float(np.log(max(candidate[quality], 1e-12) / best) / np.log(worst / best))
    return _Place(max(0.0, *views.values()), max(min(1.0, max(beyond)), damage, 0.0), max(beyond), views)
