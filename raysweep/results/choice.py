"""The choice among the audited candidates: objections to each, reservations about the best, next steps.

A candidate is recommended only if there is no objection to it. Objections: it remembers without any attack; its residue is
shown to be above `FORGOTTEN` (or above the largest residue of an oracle, if that is more) or is at least `MIDWAY`; it is
destroyed; its audit does not show a requirement; other candidates were attacked and it was not. What is uncertain about the
recommended candidate is stated as its reservations. No Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.auditing.verdict import INVALID, Verdict
from raysweep.results import pareto
from raysweep.results.front_row import OBJECTIVES, FrontRow, Objective

FORGOTTEN = 0.1  # residue under which a candidate counts as like the oracle
MIDWAY = 0.5  # residue from which a candidate is as near to the base as to the oracles
STABLE = 0.8  # least share of paired resamples in which a choice without reservations is the same
WIDE = 0.1  # distance from an objective to the upper end of its 95 % interval above which it counts as uncertain
DESTROYED_DAMAGE = 1.0  # damage of the destroyed anchor
NAMED = 5  # candidates that one piece of advice names
RULED_OUT = ("remembers", "destroyed")  # verdicts that put a candidate last
MEANING = {
    "residue": "what is left of the forgotten data (0 like a model that never saw them, 1 like the base)",
    "damage": "the quality lost on retained content (0 like the oracles, which were retrained without the forgotten data, "
    "1 like a destroyed model)",
}


@dataclass(frozen=True)
class Choice:
    """The answer of a sweep.

    trial: the recommended candidate, or the best so far; None if none was audited. against: candidate -> objections to
    recommending it, empty for those that could be. reservations: what is uncertain about the recommended one. steps: what to
    try next. share: of the paired resamples of those that could be recommended in which the recommended one is chosen.
    """

    trial: str | None
    against: dict[str, tuple[str, ...]]
    reservations: tuple[str, ...]
    steps: tuple[str, ...]
    share: float | None

    @property
    def recommended(self) -> str | None:
        """The recommended candidate, or None."""
        return self.trial if self.trial is not None and not self.against[self.trial] else None

    def standing(self, trial: str) -> str:
        """Whether an audited candidate is recommended, and why or why not."""
        against = self.against[trial]
        if trial == self.recommended:
            return "recommended" + (f" with reservations: {'; '.join(self.reservations)}" if self.reservations else "")
        if against:
            label = "best so far, but not recommended" if trial == self.trial else "not recommended"
            return f"{label}: {'; '.join(against)}"
        return f"not the choice: max(residue, damage) of {self.recommended} is smaller"

    def answer(self, rows: Sequence[FrontRow], verdicts: Mapping[str, Verdict]) -> list[str]:
        """The answer in sentences, the first one alone a true summary. rows: the candidates' rows of the front."""
        best = next((row for row in rows if row.trial == self.trial), None)
        if best is None:
            return ["No candidate is recommended, because none was audited."]
        values = f"{best.in_words('residue')}, {best.in_words('damage')}"
        if self.recommended is None:
            lines = [
                f"No candidate is recommended. Best so far is {self.trial}: {'; '.join(self.against[best.trial])}.",
                f"{self.trial}: {values}.",
            ]
        else:
            label = "Recommended with reservations" if self.reservations else "Recommended"
            sound = sum(not objections for objections in self.against.values())
            rank = (
                f"of the {sound} candidates without objections it is the best in {self.share:.0%} of paired resamples"
                if sound > 1
                else "it is the only candidate without objections"
            )
            lines = [f"{label}: {self.trial}, {values}; {rank}."]
            lines += [f"Reservation: {text}." for text in self.reservations]
        verdict = verdicts.get(best.trial)
        if (
            verdict is not None
            and verdict.label != "not tested"
            and not any(verdict.sentence() in text for text in lines)
        ):
            lines.append(f"Under attack: {verdict.sentence()}.")
        lines += [f"Try next: {step}." for step in self.steps]
        return lines


def choose(
    rows: Sequence[FrontRow],
    draws: np.ndarray,
    unmet: Mapping[str, Sequence[str]],
    valid: Mapping[str, tuple[float, float]],
    verdicts: Mapping[str, Verdict],
    keys: Mapping[str, str],
    limit: float = FORGOTTEN,
    gaps: Mapping[str, str] | None = None,
) -> Choice:
    """The choice among the audited candidates.

    rows: their rows of the front, in the order of draws (n, candidates, 2). unmet: candidate -> requirements that its audit
    does not show. valid: candidate -> (share of its samples that are valid, the oracles' share). verdicts: by candidate, of
    those that were attacked. keys: metric of a view, or "damage", -> setting whose samples decide it. limit: residue that
    counts as forgotten: `FORGOTTEN`, or the largest residue of an oracle if that is more. gaps: candidate -> why its attacks
    gave no verdict, if they were made.
    """
    attacked = {name: v for name, v in verdicts.items() if v.label != "not tested"}
    names = [row.trial for row in rows]
    against = {
        row.trial: _objections(row, unmet.get(row.trial, ()), valid[row.trial], attacked.get(row.trial), limit)
        for row in rows
    }
    unattacked = {name: (gaps or {}).get(name, "it was not attacked") for name in names if name not in attacked}
    untried = []
    if any(name in attacked for name in names):
        untried = [
            row.trial
            for row in sorted(rows, key=lambda r: r.worst)
            if row.trial in unattacked and not against[row.trial]
        ]
        against |= {name: (f"{unattacked[name]}, so it may remember",) for name in untried}
    sound = [k for k, name in enumerate(names) if not against[name]]
    if not sound:
        best = _best_so_far(rows, attacked)
        if best is None:
            return Choice(None, against, (), (), None)
        return Choice(best.trial, against, (), _steps(best, against, untried, keys), None)
    points = np.array([[row.residue, row.damage] for row in rows])[sound]
    index = pareto.balanced(points)
    share = float(np.mean([pareto.balanced(draw[sound]) == index for draw in draws]))
    best = rows[sound[index]]
    reservations, steps = _reservations(best, attacked.get(best.trial), unattacked.get(best.trial, ""), keys, limit)
    if len(sound) > 1 and share < STABLE:
        reservations.append(f"another candidate is the better one in {1 - share:.0%} of paired resamples")
        if not _uncertain(best, limit):
            steps.append("measure the candidates more closely: raise audit.rounds")
    return Choice(best.trial, against, tuple(reservations), tuple(steps), share)


def _best_so_far(rows: Sequence[FrontRow], attacked: Mapping[str, Verdict]) -> FrontRow | None:
    """The candidate with the smallest larger objective, ties by the sum.

    Last come those for which nothing speaks: those that an attack ruled out, and those that were not attacked and that another
    candidate dominates, be it one that an attack ruled out.
    """

    def rank(row: FrontRow) -> tuple[bool, float, float]:
        verdict = attacked.get(row.trial)
        last = not row.on_front if verdict is None else verdict.label in RULED_OUT
        return last, row.worst, row.residue + row.damage

    return min(rows, key=rank, default=None)


def _objections(
    row: FrontRow, unmet: Sequence[str], valid: tuple[float, float], verdict: Verdict | None, limit: float
) -> tuple[str, ...]:
    """The objections to a candidate, except missing attacks; see `choose`."""
    objections = []
    if verdict is not None and verdict.label == "remembers":
        excess = verdict.by[0].removeprefix("no attack ")
        objections.append(f"it has not forgotten: without any attack, presence exceeds that of the oracles {excess}")
    if row.interval("residue")[0] > limit:
        lead = "" if objections else "it has not forgotten: "
        objections.append(f"{lead}{row.in_words('residue')} lies above {_in_words(limit)}")
    elif row.residue >= MIDWAY:
        objections.append(f"it is as near to the base as to the oracles: {row.in_words('residue')}")
    elif row.residue_upper >= 1:
        objections.append(f"it may have forgotten nothing, its audit cannot tell: {row.in_words('residue')}")
    share, oracle_share = valid
    if share < INVALID * oracle_share or (verdict is not None and verdict.label == "destroyed"):
        objections.append(
            f"it is destroyed: {share:.0%} of its samples are valid, {oracle_share:.0%} of the oracles' samples are"
        )
    elif row.damage >= DESTROYED_DAMAGE:
        objections.append(f"it is as damaged as a destroyed model: {row.in_words('damage')}")
    if unmet:
        objections.append(f"its audit does not show what was required: {', '.join(unmet)}")
    return tuple(objections)


def _uncertain(row: FrontRow, limit: float) -> list[Objective]:
    """The objectives to measure more closely: a residue that may lie above the limit, and wide intervals."""
    wide = [objective for objective in OBJECTIVES if row.interval(objective)[1] - row.value(objective) > WIDE]
    if row.residue_upper > limit and "residue" not in wide:
        wide.insert(0, "residue")
    return wide


def _reservations(
    row: FrontRow, verdict: Verdict | None, unattacked: str, keys: Mapping[str, str], limit: float
) -> tuple[list[str], list[str]]:
    """(what is uncertain about a recommended candidate, what would settle it). unattacked: why it has no verdict."""
    reservations, steps = [], []
    if verdict is None:
        reservations.append(f"{unattacked}, so whether the forgotten data come back is unknown")
        steps.append(
            "attack it: set audit.finalists >= 1 and checks in audit.durability that fit the task, or run `raysweep audit` on its "
            "folder; attacks that failed are made again by the same command"
        )
    elif verdict.label == "undecided":
        reservations.append(f"whether attacks bring the forgotten data back is {verdict.sentence()}")
        if verdict.draws is not None:
            steps.append(f"decide the verdict: audit.attack_draws={math.ceil(verdict.draws)} or more")
        elif verdict.oracles is not None:
            steps.append(f"decide the verdict: oracles={verdict.oracles} or more")
    elif verdict.label in ("concealed", "merely avoided"):
        reservations.append(f"under attack the forgotten data come back ({verdict.sentence()})")
    for objective in _uncertain(row, limit):
        if objective == "residue" and row.residue_upper > limit:
            reservations.append(
                f"its audit does not show a residue under {_in_words(limit)}: {row.in_words('residue')}"
            )
        else:
            reservations.append(f"its {objective} is uncertain: {row.in_words(objective)}")
        steps.append(f"measure {objective} more closely: raise {_key(row, objective, keys)}, audit.rounds or oracles")
    return reservations, steps


def _steps(
    best: FrontRow, against: Mapping[str, tuple[str, ...]], untried: Sequence[str], keys: Mapping[str, str]
) -> tuple[str, ...]:
    """Advice for a sweep without a recommendation.

    untried: candidates whose only objection is that they were not attacked, the best first.
    """
    objections, method, steps = " ".join(against[best.trial]), best.method, []
    if untried:
        best_first = ", ".join(untried[:NAMED]) + (f" and {len(untried) - NAMED} more" if len(untried) > NAMED else "")
        steps.append(
            f"attack {best_first}, to which there is no other objection: raise audit.finalists, or run `raysweep audit` on "
            "the candidate's folder"
        )
    if "not forgotten" in objections or "as near to the base" in objections:
        steps.append(
            f"search further: raise search.trials, add methods, or widen spaces.{method} towards stronger settings (more steps, "
            "a higher learning rate)"
        )
    if "as near to the base" in objections or "forgotten nothing" in objections:
        steps.append(f"measure residue more closely: raise {_key(best, 'residue', keys)}, audit.rounds or oracles")
    if "destroyed" in objections:
        steps.append(
            f"search more gently: widen spaces.{method} towards weaker settings (fewer steps, a lower learning rate), or add methods"
        )
    if "required" in objections:
        steps.append(
            "search further (search.trials, methods), raise the samples of the checks in audit.require, or require less"
        )
    return tuple(steps)


def _in_words(limit: float) -> str:
    return f"{limit:.3g}" + (", the largest residue of an oracle" if limit > FORGOTTEN else "")


def _key(row: FrontRow, objective: Objective, keys: Mapping[str, str]) -> str:
    """The setting whose samples decide an objective: for the residue, that of its worst view."""
    if objective == "damage":
        return keys["damage"]
    return keys[max(row.views, key=lambda name: row.views[name])]
