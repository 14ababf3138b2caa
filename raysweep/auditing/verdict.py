"""The verdict on a model: the first of these labels that holds, by the attacks that bring the forgotten data back.

destroyed        retained content is no longer valid, so little can be said about forgetting
remembers        the model shows more of the forgotten data than the oracles, without any attack
merely avoided   an attack on the input alone (sampler, noise, condition) brings back more than in the oracles
concealed        an attack on the weights does
undecided        none of these is shown, and the data leave an excess above the margin possible
like the oracle  the largest excess that the data leave possible is within the margin

"Brings back more" means an excess over the oracles' mean above `MARGIN`, and larger than that of a further oracle, one-sided. Each
of the three labels that say so is tested apart, at `ALPHA`: the state without an attack by one test; the attacks on the input, and
those on the weights, by Simes' test over the strengths of an attack and Benjamini and Hochberg's control of false discoveries over
the attacks. "Like the oracle" is a claim of equivalence: each excess must be shown to be at most `MARGIN` above the mean of all
possible oracles, each at 95 %, so all of them are (an intersection of tests needs no correction). Moving the weights back towards
the base does not count: it needs the base, and oracles trained from scratch do not lie on such a path. Nor does what an attack has to
beat, its null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evaluators.oracles import Comparison
from raysweep.auditing.terms import comparison_of
from raysweep.settings import ORACLES

MARGIN = 0.1  # excess over the oracles that counts as bringing back more
ALPHA = 0.05  # rate at which each label is given to models that are like a further oracle
INVALID = 0.5  # share of the oracles' validity below which a model is destroyed
UNATTACKED = "no attack"
NULL = "null: "  # beginning of the names of strengths that are an attack's null, as in `evaluators.durability`
COUNTED = ("input", "weights")  # reaches of the attacks that count


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The label, the attacks behind it (`by`), and their number (`tested`).

    within: the largest excess over the mean of all possible oracles that the data leave possible (95 %). For "undecided", what would
    decide: the factor by which samples and noises of the attacks must grow (`draws`), or the least number of oracles, if with these
    no number of samples would, because they differ too much among each other; None if more than can be had.
    """

    label: str
    by: tuple[str, ...] = ()
    within: float | None = None
    tested: int = 0
    draws: float | None = None
    oracles: int | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def sentence(self) -> str:
        """The verdict in words."""
        within = max(0.0, self.within or 0.0)
        if self.label == "not tested":
            return "durability was not tested"
        if self.label == "like the oracle":
            return (
                f"like the oracle: none of {self.tested} attacks brings back more than {within:.2f} above the mean of the oracles "
                f"(95 %, margin {MARGIN:g})"
            )
        if self.label == "undecided":
            if self.draws is not None:
                remedy = f"{math.ceil(self.draws)} times the samples and noises of audit.durability would decide"
            elif self.oracles is not None:
                remedy = f"no number of samples would decide with these oracles, at least {self.oracles} are needed (`oracles`)"
            else:
                remedy = "not even 50 oracles would decide"
            return (
                f"undecided: nothing is shown to come back, but an excess of up to {within:.2f} above the mean of the oracles is possible "
                f"({', '.join(self.by)}; 95 %, margin {MARGIN:g}); {remedy}"
            )
        return f"{self.label}: {', '.join(self.by)}"


@dataclass(frozen=True)
class Excess:
    """The excess over the oracles after one strength of an attack."""

    attack: str
    reach: str
    comparison: Comparison


def verdict(
    rows: Iterable[Mapping[str, Any]], reach: Mapping[str, str | None], validity: float, oracle_validity: float
) -> Verdict:
    """The verdict on a model from its `rows` of the durability tier (see `ROWS`).

    reach: attack -> "input", "weights", or "base" or None, which do not count. validity, oracle_validity: shares of valid samples
    of the model and of the oracles.
    """
    excesses = _excesses(rows, reach)
    tested = len(excesses)
    if not tested:
        return Verdict(label="not tested")
    if validity < INVALID * oracle_validity:
        by = f"{validity:.0%} of its samples are valid, {oracle_validity:.0%} of the oracles'"
        return Verdict(label="destroyed", by=(by,), tested=tested)
    back = _brought_back(excesses)
    shown = {name: f"{name} (+{excess.comparison.difference:.2f})" for name, excess in back.items()}
    if UNATTACKED in back:
        return Verdict(label="remembers", by=(shown[UNATTACKED],), tested=tested)
    for label, way in (("merely avoided", "input"), ("concealed", "weights")):
        by_way = tuple(shown[name] for name, excess in back.items() if excess.reach == way)
        if by_way:
            return Verdict(label=label, by=by_way, tested=tested)
    return _equivalent_or_open(excesses)


def _brought_back(excesses: Mapping[str, Excess]) -> dict[str, Excess]:
    """The excesses that are shown to be above the margin, each label's attacks tested apart."""
    from scipy import stats

    p = {name: excess.comparison.p_excess(MARGIN) for name, excess in excesses.items()}
    back = {UNATTACKED} if p.get(UNATTACKED, 1.0) < ALPHA else set()
    for reach in COUNTED:
        attacks: dict[str, list[str]] = {}
        for name, excess in excesses.items():
            if excess.reach == reach and name != UNATTACKED:
                attacks.setdefault(excess.attack, []).append(name)
        simes = [min(stats.false_discovery_control([p[name] for name in names])) for names in attacks.values()]
        for names, q in zip(attacks.values(), stats.false_discovery_control(simes), strict=True):
            back |= {name for name in names if q < ALPHA and p[name] < ALPHA}
    return {name: excess for name, excess in excesses.items() if name in back}


def _equivalent_or_open(excesses: Mapping[str, Excess]) -> Verdict:
    compared = {name: excess.comparison for name, excess in excesses.items()}
    limits = {name: comparison.upper() for name, comparison in compared.items()}
    worst, tested = max(limits, key=lambda name: limits[name]), len(limits)
    several = all(comparison.spread is not None for comparison in compared.values())
    if limits[worst] <= MARGIN and several:
        return Verdict(label="like the oracle", within=limits[worst], tested=tested)
    open_ = [comparison for name, comparison in compared.items() if limits[name] > MARGIN or not several]
    factor = max(comparison.draws_factor(MARGIN) for comparison in open_)
    needed = [comparison.oracles_needed(MARGIN) if several else ORACLES for comparison in open_]
    return Verdict(
        label="undecided",
        by=(worst,),
        within=limits[worst],
        tested=tested,
        draws=factor if math.isfinite(factor) and several else None,
        oracles=None if None in needed else max(filter(None, needed), default=None),
    )


def _excesses(rows: Iterable[Mapping[str, Any]], reach: Mapping[str, str | None]) -> dict[str, Excess]:
    """The excesses that count, by attack and strength; those of an attack's null do not."""
    excesses = {}
    for row in rows:
        kind, _, strength = row["metric"].partition("@")
        way, given = reach.get(row["check"]), row["status"] == "ok" and not row["paired_with"]
        if way in COUNTED and kind == "excess" and strength and not strength.startswith(NULL) and given:
            comparison = comparison_of(row)
            if comparison is not None:
                name = UNATTACKED if strength == "none" else f"{row['check']} {strength}"
                excesses[name] = Excess(row["check"], way, comparison)
    return excesses
