"""Which audited candidate to use, if any: what speaks against each, what the data leave open, what to try next. No Ray.

A candidate is recommended only if nothing speaks against it: it does not remember, its residue is neither shown to lie above
`FORGOTTEN` (or the largest of the oracles' own) nor as near to the base as to the oracles, it is not destroyed, and it meets
what was required. Where others were attacked, it must have been, too. What the data leave open about a recommended one are its
reservations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.audit.verdict import INVALID, Verdict
from raysweep.results import pareto
from raysweep.results.front_row import OBJECTIVES, FrontRow, Objective

FORGOTTEN = 0.1  # residue under which a candidate counts as like the oracle
MIDWAY = 0.5  # residue from which a candidate is as near to the base as to the oracles
STABLE = 0.8  # least share of paired resamples in which a choice without reservations is the same
WIDE = 0.1  # half of a 95 % interval above which an objective counts as uncertain
Z95 = 1.96
MEANING = {
    "residue": "0 like a model that never saw the forgotten data, 1 like the base",
    "damage": "0 like the oracles, 1 like a destroyed model",
}


@dataclass(frozen=True)
class Choice:
    """The answer of a sweep.

    trial: the recommended candidate, or the best so far; None if none was audited. against: candidate -> what speaks against
    recommending it, empty for those that could be. reservations: what is open about the recommended one. steps: what to try
    next. share: of the paired resamples of those that could be recommended in which the recommended one is chosen.
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
        """What one audited candidate is to the answer, in a sentence."""
        against = self.against[trial]
        if trial == self.recommended:
            return "recommended" + (f" with reservations: {'; '.join(self.reservations)}" if self.reservations else "")
        if against:
            so_far = "best so far, but not recommended" if trial == self.trial else "not recommended"
            return f"{so_far}: {'; '.join(against)}"
        return f"not the choice: max(residue, damage) of {self.recommended} is smaller"

    def answer(self, rows: Sequence[FrontRow], verdicts: Mapping[str, Verdict]) -> list[str]:
        """The answer in sentences, the first one alone a true summary. rows: the candidates' rows of the front."""
        best = next((r for r in rows if r.trial == self.trial), None)
        if best is None:
            return ["No candidate is recommended, because none was audited."]
        values = f"{told(best, 'residue')}, {told(best, 'damage')}"
        if self.recommended is None:
            lines = [
                f"No candidate is recommended. Best so far is {self.trial}: {'; '.join(self.against[best.trial])}.",
                f"{self.trial}: {values}.",
            ]
        else:
            how = "Recommended with reservations" if self.reservations else "Recommended"
            sound = sum(not reasons for reasons in self.against.values())
            chosen = (
                f"of the {sound} that nothing speaks against it is the best in {self.share:.0%} of paired resamples"
                if sound > 1
                else "it is the only one that nothing speaks against"
            )
            lines = [f"{how}: {self.trial}, {values}; {chosen}."]
            lines += [f"Reservation: {text}." for text in self.reservations]
        verdict = verdicts.get(best.trial)
        if verdict is not None and verdict.label != "not tested":
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
    does not show. valid: candidate -> share of valid samples, its own and the oracles'. verdicts: by candidate, of those that
    were attacked. keys: metric of an objective, or "damage", -> setting whose samples decide it. limit: residue that
    counts as forgotten: `FORGOTTEN`, or the largest of the oracles' own where that is more. gaps: candidate -> why its attacks gave no verdict, if they were made.
    """
    attacked = {n: v for n, v in verdicts.items() if v.label != "not tested"}
    names = [r.trial for r in rows]
    audited = {r.trial: _against(r, unmet.get(r.trial, ()), valid[r.trial], attacked.get(r.trial), limit) for r in rows}
    sound = [n for n in names if not audited[n]]
    untried = [n for n in sound if n not in attacked] if any(n in attacked for n in names) else []
    why = {n: (gaps or {}).get(n, "it was not attacked") for n in names}
    against = audited | {n: (f"{why[n]}, so it may remember",) for n in untried}
    fit = [k for k, n in enumerate(names) if not against[n]]
    points = np.array([[r.residue, r.damage] for r in rows]).reshape(-1, 2)
    if not fit:
        lost = ("remembers", "destroyed")
        ranks = sorted(
            range(len(names)),
            key=lambda k: (
                names[k] in attacked and attacked[names[k]].label in lost, points[k].max(), points[k].sum()
            ),
        )  # fmt: skip
        best = rows[ranks[0]] if ranks else None
        steps = () if best is None else _steps(best, against, untried, keys)
        return Choice(None if best is None else best.trial, against, (), steps, None)
    at = pareto.balanced(points[fit])
    share = float(np.mean([pareto.balanced(d[fit]) == at for d in draws]))
    best = rows[fit[at]]
    reservations, steps = _reservations(best, share, len(fit), attacked.get(best.trial), keys, limit, why[best.trial])
    return Choice(best.trial, against, reservations, steps, share)


def interval(row: FrontRow, objective: Objective) -> tuple[float, float]:
    """The 95 % interval of an objective, by its standard error; objectives have no values below 0."""
    half = Z95 * row.se(objective)
    return max(0.0, row.value(objective) - half), row.value(objective) + half


def told(row: FrontRow, objective: Objective) -> str:
    """An objective with its 95 % interval; where the jackknife sees no spread (at the cut at 0), an interval would be a lie."""
    if row.se(objective) == 0:
        return f"{objective} {row.value(objective):.3f} (the same whichever group of samples is left out)"
    low, high = interval(row, objective)
    return f"{objective} {row.value(objective):.3f} (95 % interval {low:.3f} to {high:.3f})"


def _against(
    row: FrontRow, unmet: Sequence[str], valid: tuple[float, float], verdict: Verdict | None, limit: float
) -> tuple[str, ...]:
    reasons = []
    if verdict is not None and verdict.label == "remembers":
        excess = verdict.by[0].removeprefix("no attack ")
        reasons.append(f"it has not forgotten: without any attack, presence exceeds the oracles' {excess}")
    if interval(row, "residue")[0] > limit:
        lead = "" if reasons else "it has not forgotten: "
        reasons.append(f"{lead}{told(row, 'residue')} lies above {_limit(limit)}")
    elif row.residue >= MIDWAY:
        reasons.append(f"it is as near to the base as to the oracles: {told(row, 'residue')}")
    own, oracles = valid
    if own < INVALID * oracles or (verdict is not None and verdict.label == "destroyed"):
        reasons.append(f"it is destroyed: {own:.0%} of its samples are valid, {oracles:.0%} of the oracles'")
    elif row.damage >= 1:
        reasons.append(f"it is as damaged as a destroyed model: {told(row, 'damage')}")
    if unmet:
        reasons.append(f"its audit does not show what was required: {', '.join(unmet)}")
    return tuple(reasons)


def _reservations(
    row: FrontRow, share: float, rivals: int, verdict: Verdict | None, keys: Mapping[str, str], limit: float, why: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what is open about a recommended candidate, what would settle it)."""
    found, steps = [], []
    if verdict is None:
        found.append(f"{why}, so whether the forgotten thing comes back is unknown")
        steps.append(
            "have it attacked: audit.finalists >= 1 and checks in audit.durability that serve the task, or `raysweep audit` on its "
            "folder; attacks that failed are made again by the same command"
        )
    elif verdict.label in ("concealed", "merely avoided"):
        found.append(f"under attack the forgotten thing comes back ({verdict.sentence()})")
    high = interval(row, "residue")[1]
    wide = [o for o in OBJECTIVES if Z95 * row.se(o) > WIDE]
    if high > limit:
        found.append(f"its audit does not show a residue under {_limit(limit)}: {told(row, 'residue')}")
        wide = ["residue", *(o for o in wide if o != "residue")]
    found += [f"its {o} is uncertain: {told(row, o)}" for o in wide if o != "residue" or high <= limit]
    steps += [f"measure {o} more closely: raise {_key(row, o, keys)} or audit.rounds" for o in wide]
    if rivals > 1 and share < STABLE:
        found.append(f"another candidate is the better one in {1 - share:.0%} of paired resamples")
        if not wide:
            steps.append("measure the candidates more closely: raise audit.rounds")
    return tuple(found), tuple(steps)


def _steps(
    best: FrontRow,
    against: Mapping[str, tuple[str, ...]],
    untried: Sequence[str],
    keys: Mapping[str, str],
) -> tuple[str, ...]:
    """What to try where nothing is recommended."""
    reasons, method, steps = " ".join(against[best.trial]), best.method, []
    if untried:
        steps.append(
            f"attack {', '.join(untried)}, which nothing else speaks against: raise audit.finalists, or run `raysweep audit` on "
            "the candidate's folder"
        )
    if "not forgotten" in reasons or "as near to the base" in reasons:
        steps.append(
            f"search further: raise search.trials, add methods, or widen spaces.{method} towards stronger settings (more steps, "
            "a higher rate)"
        )
        if "lies above" not in reasons:
            steps.append(f"measure residue more closely: raise {_key(best, 'residue', keys)} or audit.rounds")
    if "destroyed" in reasons:
        steps.append(
            f"search more gently: widen spaces.{method} towards weaker settings (fewer steps, a lower rate), or add methods"
        )
    if "required" in reasons:
        steps.append(
            "search further (search.trials, methods), raise the samples of the checks in audit.require, or ask for less"
        )
    return tuple(steps)


def _limit(limit: float) -> str:
    """The limit of the residue in words."""
    return f"{limit:.3g}" + (", the largest residue of an oracle" if limit > FORGOTTEN else "")


def _key(row: FrontRow, objective: Objective, keys: Mapping[str, str]) -> str:
    """The setting whose samples decide an objective: for the residue, that of its worst view."""
    if objective == "damage":
        return keys["damage"]
    return keys[max(row.views, key=lambda name: row.views[name])]
