"""Residue and damage: the measurements of a model on scales that measured models fix.

residue  the largest over the task's views of (model - oracles)/(base - oracles): 0 like the oracles, 1 like the untouched base.
         A view is left out if base and oracles differ by less than four standard errors, or if the base shows less of what must
         be forgotten than the oracles, as a base does that has not learned it.
damage   the larger of log(F/F_oracles)/log(F_destroyed/F_oracles), with F the Frechet distance on retained content, and of
         over-forgetting, the farthest that any view lies beyond the oracles in units of their distance to the base or to a
         destroyed model, whichever is larger, at most 1: 0 like the oracles, 1 like a destroyed model.

Both are cut at 0. "The oracles" is the mean over retrained models, of F the geometric one. Retrained models differ, so an interval
is that of the difference to one further oracle (`evaluators.oracles`), and ends where the cut does; its low end holds for all views
at once. A model that knows a little shows a little in every view, which their mean tells sooner than any of them; the largest view
is at least their mean, so what the mean is shown to exceed, the residue exceeds, too. The unit of a view, the distance of base and
oracles, is measured and taken as exact.

A view that an anchor lacks is left out, with the reason; without the anchors' quality and validity no model can be placed, and
`Unmeasured` says what is missing and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from evaluators.oracles import Comparison
from evaluators.statistics import LEVEL
from raysweep.auditing.anchors import SCALED_BY, Anchors, Unmeasured, Values, View, check_scale, ends_of_damage
from raysweep.auditing.terms import Measured, Term, mean_over_rounds, term
from raysweep.settings import ORACLES

TINY = 1e-12  # of a Frechet distance, whose logarithm is taken
MEAN_SHARE = 0.75  # of the error of a low end for the mean of the views; benchmarks/power.py shows what it gives


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A model's place on the scales.

    residue, damage: cut at 0. *_se: standard error of the difference of the deciding term to one further oracle; *_lo, *_hi: its
    95 % interval; residue_upper: one-sided 95 % upper limit of the residue against the mean of all possible oracles.
    views: anchored value of each informative view.
    """

    residue: float
    residue_se: float
    residue_lo: float
    residue_hi: float
    residue_upper: float
    damage: float
    damage_se: float
    damage_lo: float
    damage_hi: float
    over_forgetting: float
    validity: float
    views: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Objectives(Placement):
    """A placement with what it is made of.

    residue_terms, damage_terms: by metric, in units of the scales; residue_mean: the mean of the residue's. uncut: (2,), residue and
    damage before the cut at 0; replicates (groups, 2): the same without each group of units in turn.
    """

    uncut: np.ndarray
    replicates: np.ndarray
    residue_mean: Term
    residue_terms: dict[str, Term] = field(default_factory=dict)
    damage_terms: dict[str, Term] = field(default_factory=dict)

    def p_residue(self, limit: float) -> float:
        """p-value of "against the mean of all possible oracles the residue is at least `limit`": all views must be under it."""
        return max(t.comparison.p_at_least(limit) for t in self.residue_terms.values())

    def placement(self) -> Placement:
        """The placement alone."""
        return Placement(**{f.name: getattr(self, f.name) for f in fields(Placement)})

    def plain(self) -> dict[str, Any]:
        """The placement as JSON data."""
        return asdict(self.placement())


def in_words(objective: str, value: float, low: float, high: float) -> str:
    """Residue or damage with its 95 % interval; at the cut at 0 the upper end alone.

    A model that lies beyond the oracles by more than they differ has residue 0 without an interval.
    """
    if high == 0:
        return f"{objective} 0 (every view lies beyond the oracles)"
    if value == 0:
        return f"{objective} at most {high:.3f} (95 %)"
    return f"{objective} {value:.3f} (95 % interval {low:.3f} to {high:.3f})"


def objectives(candidate: Measured, anchors: Anchors, views: Sequence[View], quality: str, validity: str) -> Objectives:
    """Residue and damage of a model from the informative `views` and the metrics `quality` and `validity`.

    Raises Unmeasured, with the reason, if the model or an anchor lacks one of these.
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
    oracles, residue, damage = anchors.oracles, {}, {}
    units = _Units.of(metrics, quality, anchors.base.values, [o.values for o in oracles], anchors.destroyed.values)
    for metric in metrics:
        residue[metric] = term(candidate, oracles, metric).scaled(1 / units.gaps[metric])
        damage[metric] = residue[metric].scaled(-units.reaches[metric])
    mean = _mean_of_views(candidate, oracles, units.gaps)
    damage[quality] = term(candidate, oracles, quality, _log).scaled(1 / units.damage)
    replicates = np.array(
        [
            _Units.of(
                metrics, quality, anchors.base.without(g), [o.without(g) for o in oracles], anchors.destroyed.without(g)
            ).place(candidate.without(g), [o.without(g) for o in oracles])
            for g in range(candidate.groups)
        ]
    )
    whole = units.place(candidate.values, [o.values for o in oracles])
    return _placed(residue, mean, damage, quality, candidate.values[validity], replicates - whole)


def mean_objectives(parts: Mapping[int, Objectives], rounds: int, quality: str) -> Objectives:
    """A model's objectives over independent rounds of audits. parts: number of the round, from 1 to `rounds`, -> objectives in it.

    In a round without the model its replicates do not deviate, so the groups of several models stay aligned.
    """
    first, *_ = parts.values()
    residue = {m: mean_over_rounds([p.residue_terms[m] for p in parts.values()]) for m in first.residue_terms}
    mean = mean_over_rounds([p.residue_mean for p in parts.values()])
    damage = {m: mean_over_rounds([p.damage_terms[m] for p in parts.values()]) for m in first.damage_terms}
    validity = float(np.mean([part.validity for part in parts.values()]))
    still = np.zeros_like(first.replicates)
    deviations = [
        (parts[number].replicates - parts[number].uncut) / len(parts) if number in parts else still
        for number in range(1, rounds + 1)
    ]
    return _placed(residue, mean, damage, quality, validity, np.concatenate(deviations))


def noise_floor(anchors: Anchors, views: Sequence[View], quality: str, validity: str) -> list[Objectives]:
    """Each oracle placed by the others: how far perfectly unlearned models lie from 0. A single oracle lies at 0 by itself."""
    return [
        objectives(oracle, anchors.without_oracle(k), views, quality, validity)
        for k, oracle in enumerate(anchors.oracles)
    ]


def floor_in_words(oracles: Sequence[tuple[float, float]]) -> str:
    """The noise floor as sentences. oracles: (residue, damage) of each, placed by the others."""
    if len(oracles) < 2:
        return "The noise floor is unknown: a single oracle cannot be placed by others."
    residues, damages = (", ".join(f"{value:.3f}" for value in values) for values in zip(*oracles, strict=True))
    few = (
        f" {len(oracles)} oracles are few: how much oracles differ is hardly known, so intervals are wide; raise `oracles`."
        if len(oracles) < ORACLES
        else ""
    )
    return (
        f"Noise floor: models that never saw the forgotten data lie this far from 0 by chance. The {len(oracles)} oracles, each "
        f"placed by the others, have residue {residues} and damage {damages}.{few}"
    )


def _mean_of_views(candidate: Measured, oracles: Sequence[Measured], gaps: Mapping[str, float]) -> Term:
    """The mean over views of the model's and the oracles' values, each in its own unit. gaps: metric -> that unit."""
    name, groups = "mean", min(m.groups for m in (candidate, *oracles))

    def mean(of: Measured) -> Measured:
        values = [of.values[metric] / gap for metric, gap in gaps.items()]
        replicates = [of.replicates[metric][:groups] / gap for metric, gap in gaps.items()]
        floor = float(np.mean([of.floors.get(metric, 0.0) / gap for metric, gap in gaps.items()]))
        return Measured({name: float(np.mean(values))}, {name: np.mean(replicates, axis=0)}, floors={name: floor})

    return term(mean(candidate), [mean(oracle) for oracle in oracles], name)


def _placed(
    residue: dict[str, Term],
    mean: Term,
    damage: dict[str, Term],
    quality: str,
    validity: float,
    deviations: np.ndarray,
) -> Objectives:
    """deviations: (groups, 2), of residue and damage without each group of units from those with all."""
    left, lost = _largest(residue, mean), _largest(damage, most={m: 1.0 for m in damage if m != quality})
    beyond = max((t.comparison.difference for m, t in damage.items() if m != quality), default=0.0)
    uncut = np.array([left.uncut, lost.uncut])
    return Objectives(
        residue=max(0.0, left.uncut),
        residue_se=left.se,
        residue_lo=left.lo,
        residue_hi=left.hi,
        residue_upper=left.upper,
        damage=max(0.0, lost.uncut),
        damage_se=lost.se,
        damage_lo=lost.lo,
        damage_hi=lost.hi,
        over_forgetting=max(0.0, beyond),
        validity=validity,
        views={m: t.comparison.difference for m, t in residue.items()},
        uncut=uncut,
        replicates=uncut + deviations,
        residue_mean=mean,
        residue_terms=residue,
        damage_terms=damage,
    )


@dataclass(frozen=True)
class _Largest:
    """The largest of several terms with its error; its interval and one-sided upper limit, cut at 0."""

    uncut: float
    se: float
    lo: float
    hi: float
    upper: float


def _largest(terms: Mapping[str, Term], mean: Term | None = None, most: Mapping[str, float] | None = None) -> _Largest:
    """The largest term. mean: of the terms; most: value at which a term ends, by metric.

    Low end: the largest value that Simes' test, which several terms that lie a little apart can pass together, shows not all terms
    to be under; with the mean of several terms, by the weighted test of Simes' test and of the mean's own (Genovese, Roeder and
    Wasserman, 2006). High end and upper limit: the largest of the terms' own, since the truly largest term is one of them.
    """
    ends, compared = [], []
    for metric, one in terms.items():
        comparison, cut = one.comparison, (most or {}).get(metric, math.inf)
        values = (min(cut, v) for v in (comparison.difference, comparison.interval()[1], comparison.upper()))
        ends.append((*values, comparison.se))
        compared.append((comparison, cut))
    high, upper = (max(0.0, *(end[i] for end in ends)) for i in (1, 2))
    uncut, *_, se = max(ends)
    return _Largest(
        uncut, se, _low_end(compared, uncut, mean.comparison if mean and len(terms) > 1 else None), high, upper
    )


def _low_end(compared: Sequence[tuple[Comparison, float]], largest: float, mean: Comparison | None) -> float:
    """The low end, cut at 0, of the largest of several comparisons, each with the value at which it ends, between 0 and `largest`."""
    from scipy import optimize, stats

    tail = (1 - LEVEL) / 2

    def excess(limit: float) -> float:
        p = [comparison.p_at_most(limit) if limit < cut else 1.0 for comparison, cut in compared]
        single = float(min(stats.false_discovery_control(p)))
        if mean is None:
            return single - tail
        weighted = [single / (1 - MEAN_SHARE) / 2, mean.p_at_most(limit) / MEAN_SHARE / 2]
        return float(min(stats.false_discovery_control(np.minimum(1, weighted)))) - tail

    if largest <= 0 or excess(0.0) >= 0:
        return 0.0
    return float(optimize.bisect(excess, 0.0, largest, xtol=1e-6))


@dataclass(frozen=True)
class _Units:
    """What one unit of each term is in the metric itself, and how far over-forgetting in a view reaches towards destruction.

    damage: the distance of oracles and destroyed model in the logarithm of the quality.
    """

    quality: str
    gaps: dict[str, float]
    reaches: dict[str, float]
    damage: float

    @classmethod
    def of(
        cls, metrics: Sequence[str], quality: str, base: Values, oracles: Sequence[Values], destroyed: Values
    ) -> _Units:
        gaps, reaches = {}, {}
        for metric in metrics:
            by = SCALED_BY.get(metric, metric)
            gap, unit = (base[m] - float(np.mean([o[m] for o in oracles])) for m in (metric, by))
            gap = max(gap, unit)  # so that the base itself is at most at 1
            if gap == 0:
                raise Unmeasured(f"base and oracles do not differ in {by}, so {metric} has no scale")
            distance = destroyed[metric] - float(np.mean([o[metric] for o in oracles]))
            gaps[metric], reaches[metric] = gap, min(1.0, abs(gap / (distance or gap)))
        best, worst = ends_of_damage(oracles, destroyed, quality)
        return cls(quality, gaps, reaches, worst - best)

    def place(self, candidate: Values, oracles: Sequence[Values]) -> tuple[float, float]:
        """(residue, damage), uncut."""
        views = {
            metric: (candidate[metric] - float(np.mean([o[metric] for o in oracles]))) / gap
            for metric, gap in self.gaps.items()
        }
        lost = _log(candidate[self.quality]) - float(np.mean([_log(o[self.quality]) for o in oracles]))
        beyond = [min(1.0, -views[metric] * reach) for metric, reach in self.reaches.items()]
        return max(views.values()), max([lost / self.damage, *beyond])


def _log(quality: float) -> float:
    return math.log(max(quality, TINY))
