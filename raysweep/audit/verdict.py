"""What became of the forgotten thing in a model, in one word, from which attacks bring it back. No Ray.

remembers        it is there without any attack
merely avoided   an attack on the input alone (sampler, noise, condition) brings back more than it does in the oracles
concealed        an attack on the weights does
destroyed        retained content is no longer valid, so that little can be said about forgetting
like the oracle  no attack tells it from models that never saw the thing, up to `within`

"Brings back more" means an excess over the oracles above `MARGIN`, one-sided, with Benjamini and Hochberg's control of false
discoveries over all attacks and strengths of a model. Moving the weights back towards the base does not count: it needs the
base, and oracles trained from scratch do not lie on such a path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MARGIN = 0.1
RATE = 0.05
INVALID = 0.5  # of the oracles' validity
FAIR = ("input", "weights")


@dataclass(frozen=True)
class Verdict:
    """`by`: the attacks behind the label; `within`: the largest excess that the data leave possible (95 %)."""

    label: str
    by: tuple[str, ...]
    within: float | None
    tested: int

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def sentence(self) -> str:
        """For people."""
        if self.label == "not tested":
            return "durability was not tested"
        if self.label == "like the oracle":
            within = max(0.0, self.within or 0.0)
            return (
                f"like the oracle: none of {self.tested} attacks brings back more than {within:.2f} above the oracles"
            )
        return f"{self.label}: {', '.join(self.by)}"


def verdict(rows: Iterable[dict[str, Any]], reach: dict[str, str], validity: float, oracle_validity: float) -> Verdict:
    """The verdict on a model from its `rows` of the durability tier.

    reach: attack -> "input", "weights", or "base", which does not count; validity: share of its valid samples, and that of the oracles.
    """
    from scipy import stats

    found = {}
    for row in rows:
        kind, _, strength = row["metric"].partition("@")
        fair = reach.get(row["check"]) in FAIR
        if fair and kind == "excess" and strength and row["status"] == "ok" and not row["paired_with"]:
            name = "no attack" if strength == "none" else f"{row['check']} {strength}"
            found[name] = (row["check"], strength, row["value"], row["se"] or 0.0, row["hi"])
    if not found:
        return Verdict("not tested", (), None, 0)
    if validity < INVALID * oracle_validity:
        by = f"{validity:.0%} of its samples are valid, {oracle_validity:.0%} of the oracles'"
        return Verdict("destroyed", (by,), None, len(found))
    p = np.array([
        float(stats.norm.sf((value - MARGIN) / se)) if se > 0 else float(value <= MARGIN)
        for _, _, value, se, _ in found.values()
    ])  # fmt: skip
    back = [name for name, q in zip(found, stats.false_discovery_control(p), strict=True) if q < RATE]
    shown = {name: f"{name} (+{found[name][2]:.2f})" for name in back}
    if "no attack" in back:
        return Verdict("remembers", (shown["no attack"],), None, len(found))
    for label, way in (("merely avoided", "input"), ("concealed", "weights")):
        by_way = tuple(shown[name] for name in back if reach[found[name][0]] == way)
        if by_way:
            return Verdict(label, by_way, None, len(found))
    return Verdict("like the oracle", (), max(hi for *_, hi in found.values()), len(found))
