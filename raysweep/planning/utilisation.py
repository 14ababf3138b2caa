"""The expected utilisation of a plan: a simulated search whose trials have the numbers of steps that their spaces give."""

from __future__ import annotations

import random
from typing import Any

from raysweep.config.schema import Sweep
from raysweep.engine.resources import Plan
from raysweep.search.spaces import Space
from raysweep.search.utilisation import Ahead, Timeline, simulate
from raysweep.search.window import resolve_window


class _Draws(random.Random):
    """Draws values as a search without results does."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        return min(high, int(self.suggest_float(name, low, high + 1, log=log)))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return low * (high / low) ** self.random() if log else self.uniform(low, high)


def simulated(sweep: Sweep, spaces: list[Space], plan: Plan, step_s: dict[str, float], probe_s: float) -> Timeline:
    """A search of a sweep in simulated time. step_s: method -> seconds of a step; probe_s: of a probe.

    Where the steward replaces idle auditors by slots or slots by auditors, their numbers are those at which both have as much to do.
    """
    draws = _Draws(sweep.search.seed)
    lengths = []
    for place in range(sweep.search.trials):
        turn, index = divmod(place, len(spaces))
        space = spaces[index]
        settings = space.ask(draws, space.points[turn].values if turn < len(space.points) else {})
        lengths.append(step_s[space.method] * settings.get("steps", 1))
    slots, both = plan.slots, plan.slots + plan.auditors
    if plan.interchangeable and sweep.train.executor == "warm":
        training, probing = sum(lengths), probe_s * len(lengths)
        slots = min(both - 1, max(1, round(both * training / ((training + probing) or 1.0))))
    window = resolve_window(sweep.search, plan.concurrent_trials)
    return simulate(
        Ahead(window, sweep.search.trials),
        slots,
        both - slots,
        plan.concurrent_trials,
        lambda place: lengths[place],
        lambda place: probe_s,
    )


def in_words(sweep: Sweep, plan: Plan, line: Timeline) -> str:
    """How busy the slots are, for people."""
    window = resolve_window(sweep.search, plan.concurrent_trials)
    told = "no suggestion waits for results"
    if window is not None:
        told = f"at most {min(window, sweep.search.trials)} of {sweep.search.trials} trials are ahead of results"
    slots = f"{line.slots}"
    if line.slots != plan.slots:
        slots += f" where {plan.slots + plan.auditors - line.slots} audit, as both then have as much to do"
    return f"{slots}, busy {line.busy:.0%} of the search by a simulation; {told} (search.window)"
