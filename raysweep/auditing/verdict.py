"""The verdict on a model: the first of these labels that holds, by the attacks that bring the forgotten data back.

destroyed        retained content is no longer valid, so little can be said about forgetting
remembers        the model shows more of the forgotten data than the oracles, without any attack
merely avoided   an attack on the input alone (sampler, noise, condition) brings back more than in the oracles
concealed        an attack on the weights does
like the oracle  no attack separates the model from the oracles, up to `within`

"Brings back more" means an excess over the oracles above `MARGIN`, one-sided, with Benjamini and Hochberg's control of false
discoveries over all attacks and strengths of a model. Moving the weights back towards the base does not count: it needs the
base, and oracles trained from scratch do not lie on such a path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

MARGIN = 0.1  # excess over the oracles that counts as bringing back more
RATE = 0.05  # of false discoveries
INVALID = 0.5  # share of the oracles' validity below which a model is destroyed
UNATTACKED = "no attack"
COUNTED = ("input", "weights")  # reaches of the attacks that count


@dataclass(frozen=True)
class Verdict:
    """The label, the attacks behind it (`by`), and their number (`tested`).

    within: for "like the oracle", the largest excess that the data leave possible (95 %).
    """

    label: str
    by: tuple[str, ...]
    within: float | None
    tested: int

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    def sentence(self) -> str:
        """The verdict in words."""
        if self.label == "not tested":
            return "durability was not tested"
        if self.label == "like the oracle":
            within = max(0.0, self.within or 0.0)
            return (
                f"like the oracle: none of {self.tested} attacks brings back more than {within:.2f} above the oracles"
            )
        return f"{self.label}: {', '.join(self.by)}"


@dataclass(frozen=True)
class Excess:
    """The excess over the oracles after one strength of an attack; hi: upper end of its 95 % interval."""

    reach: str
    value: float
    se: float
    hi: float

    @property
    def p(self) -> float:
        """One-sided p-value of an excess of at most MARGIN."""
        from scipy import stats

        return float(stats.norm.sf((self.value - MARGIN) / self.se)) if self.se > 0 else float(self.value <= MARGIN)


def verdict(
    rows: Iterable[Mapping[str, Any]], reach: Mapping[str, str | None], validity: float, oracle_validity: float
) -> Verdict:
    """The verdict on a model from its `rows` of the durability tier (see `ROWS`).

    reach: attack -> "input", "weights", or "base" or None, which do not count. validity, oracle_validity: shares of valid samples
    of the model and of the oracles.
    """
    from scipy import stats

    excesses = _excesses(rows, reach)
    tested = len(excesses)
    if not tested:
        return Verdict("not tested", (), None, 0)
    if validity < INVALID * oracle_validity:
        by = f"{validity:.0%} of its samples are valid, {oracle_validity:.0%} of the oracles'"
        return Verdict("destroyed", (by,), None, tested)
    q = stats.false_discovery_control([excess.p for excess in excesses.values()])
    back = {name: excess for (name, excess), rate in zip(excesses.items(), q, strict=True) if rate < RATE}
    shown = {name: f"{name} (+{excess.value:.2f})" for name, excess in back.items()}
    if UNATTACKED in back:
        return Verdict("remembers", (shown[UNATTACKED],), None, tested)
    for label, way in (("merely avoided", "input"), ("concealed", "weights")):
        by_way = tuple(shown[name] for name, excess in back.items() if excess.reach == way)
        if by_way:
            return Verdict(label, by_way, None, tested)
    return Verdict("like the oracle", (), max(excess.hi for excess in excesses.values()), tested)


def _excesses(rows: Iterable[Mapping[str, Any]], reach: Mapping[str, str | None]) -> dict[str, Excess]:
    """The excesses that count, by attack and strength."""
    excesses = {}
    for row in rows:
        kind, _, strength = row["metric"].partition("@")
        way = reach.get(row["check"])
        if way in COUNTED and kind == "excess" and strength and row["status"] == "ok" and not row["paired_with"]:
            name = UNATTACKED if strength == "none" else f"{row['check']} {strength}"
            excesses[name] = Excess(way, row["value"], row["se"] or 0.0, row["hi"])
    return excesses
