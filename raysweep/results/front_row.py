"""A row of the audited front as a record, and the rows of a run's front read from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from raysweep.auditing.objectives import in_words
from raysweep.rundir import RunDir
from raysweep.storage.schemas import FRONT, read_table

Objective = Literal["residue", "damage"]
OBJECTIVES: tuple[Objective, ...] = ("residue", "damage")
JSON = ("views", "hyperparameters")  # columns that hold JSON
OF_CANDIDATES = {
    "probe_residue",
    "probe_damage",
    "on_front",
    "on_method_front",
    "p_dominated",
    "audits",
    "hyperparameters",
}


@dataclass(frozen=True, kw_only=True)
class FrontRow:
    """An audited candidate or an anchor; its fields are the columns of `storage.schemas.FRONT`, which describes them.

    What only candidates have is None in an anchor.
    """

    trial: str
    method: str
    kind: str
    residue: float
    residue_lo: float
    residue_hi: float
    residue_upper: float
    damage: float
    damage_lo: float
    damage_hi: float
    over_forgetting: float
    views: dict[str, float]
    probe_residue: float | None = None
    probe_damage: float | None = None
    on_front: bool | None = None
    on_method_front: bool | None = None
    p_dominated: float | None = None
    audits: int | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""

    @property
    def is_candidate(self) -> bool:
        """Whether a trial made it; the others are anchors."""
        return self.kind == "candidate"

    @property
    def worst(self) -> float:
        """The larger of residue and damage."""
        return max(self.residue, self.damage)

    def value(self, objective: Objective) -> float:
        """The audited value of an objective."""
        return self.residue if objective == "residue" else self.damage

    def interval(self, objective: Objective) -> tuple[float, float]:
        """The 95 % interval of an objective: of the difference to one further oracle, cut at 0."""
        if objective == "residue":
            return self.residue_lo, self.residue_hi
        return self.damage_lo, self.damage_hi

    def in_words(self, objective: Objective) -> str:
        """An objective with its 95 % interval, in words."""
        return in_words(objective, self.value(objective), *self.interval(objective))

    def in_brief(self, objective: Objective) -> str:
        """An objective for a table whose head names the 95 % interval in brackets."""
        value, (low, high) = self.value(objective), self.interval(objective)
        if value == 0:
            return f"<= {high:.3f}" if high > 0 else "0 (beyond)"
        return f"{value:.3f} ({low:.3f} to {high:.3f})"

    def probe(self, objective: Objective) -> float | None:
        """The search's own estimate of an objective."""
        return self.probe_residue if objective == "residue" else self.probe_damage

    def plain(self) -> dict[str, Any]:
        """The entry of front.json under "points"; the verdict is elsewhere in that file."""
        left_out = {"verdict"} if self.is_candidate else {"verdict", *OF_CANDIDATES}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def stored(self) -> dict[str, Any]:
        """The row of front.parquet: views and hyperparameters as JSON."""
        settings = json.dumps(self.hyperparameters, sort_keys=True) if self.is_candidate else None
        return vars(self) | {"views": json.dumps(self.views), "hyperparameters": settings}


def read_front(folder: RunDir) -> list[FrontRow]:
    """The rows of front.parquet. Raises StoreError if it cannot be read."""
    rows = read_table(folder.front_table, FRONT).to_pylist()
    return [FrontRow(**row | {name: json.loads(row[name] or "{}") for name in JSON}) for row in rows]
