"""Draws what an audit keeps unknown until it starts: its seed, its diffusion timesteps, and its numbers of steps.

The seed comes from the operating system. Everything else follows from the seed: one value in each of several strata (parts of
the valid range), so that every seed covers the range. Strata of timesteps are those of a noise schedule of 1,000 steps and are
scaled to the model's.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

from raysweep.storage.seeds import derive_seed

SEED_BITS = 63
SCHEDULE = 1000  # steps of the schedule to which the strata below belong
INJECTION_T = (500, 700)
MEMBERSHIP_T = (10, 20, 40, 85, 170, 350)  # about equal on a log scale
MEMBERSHIP_STRIDE = (7, 13)
RECALL_T = (50, 220, 390, 560, 730, 900)
INJECTION_STEPS = (9, 15)
LIKELIHOOD_STEPS = (16, 24)
SAMPLING = (0.6, 1.5)  # range of the number of sampling steps, relative to the task's
LEAST_SAMPLING = 2


def fresh_seed() -> int:
    """A seed that nobody can predict, in [0, 2^63)."""
    return secrets.randbits(SEED_BITS)


def uniform(seed: int, name: str, count: int) -> list[float]:
    """Numbers in [0, 1) that depend only on seed, name and position."""
    return [(derive_seed("draw", seed, name, k) >> 10) / 2**53 for k in range(count)]


def between(seed: int, name: str, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return low + int(uniform(seed, name, 1)[0] * (high - low + 1))


def timesteps(seed: int, name: str, edges: Sequence[float], schedule: int) -> tuple[int, ...]:
    """A timestep in each stratum [edges[k], edges[k + 1]), for a model of `schedule` steps; increasing, from 1.

    edges: of a schedule of `SCHEDULE` steps. On a short schedule strata may share a step, which is then returned once.
    """
    scaled = [edge * schedule / SCHEDULE for edge in edges]
    parts = zip(scaled[:-1], scaled[1:], uniform(seed, name, len(edges) - 1), strict=True)
    return tuple(sorted({min(max(1, int(low + u * (high - low))), schedule - 1) for low, high, u in parts}))


def loss_timesteps(seed: int, count: int, schedule: int) -> tuple[int, ...]:
    """A timestep in each of `count` equal parts of the schedule."""
    return tuple(int((k + u) * schedule / count) for k, u in enumerate(uniform(seed, "loss_t", count)))


def values(seed: int, schedule: int, losses: int, injection_t: int | None = None) -> dict[str, Any]:
    """Every drawn setting of a tier but the number of sampling steps, for a model of `schedule` timesteps.

    losses: number of timesteps of a denoising loss. injection_t: the timestep of reconstructions, if it is given; they take at most
    as many steps.
    """
    t = injection_t or timesteps(seed, "injection_t", INJECTION_T, schedule)[0]
    return {
        "injection_t": t,
        "injection_steps": min(t, between(seed, "injection_steps", *INJECTION_STEPS)),
        "likelihood_steps": between(seed, "likelihood_steps", *LIKELIHOOD_STEPS),
        "loss_t": loss_timesteps(seed, losses, schedule),
        "membership_t": timesteps(seed, "membership_t", MEMBERSHIP_T, schedule),
        "membership_stride": max(
            1, round(between(seed, "membership_stride", *MEMBERSHIP_STRIDE) * schedule / SCHEDULE)
        ),
        "recall_t": timesteps(seed, "recall_t", RECALL_T, schedule),
    }


def sampling_steps(seed: int, steps: int, schedule: int) -> int:
    """A number of sampling steps in the range `SAMPLING` around a task's `steps`, at most `schedule`.

    At least two; a task whose models draw in one step keeps it.
    """
    if steps < LEAST_SAMPLING:
        return steps
    low = max(LEAST_SAMPLING, math.ceil(SAMPLING[0] * steps))
    high = min(round(SAMPLING[1] * steps), max(steps, schedule))
    return between(seed, "sampling_steps", low, max(low, high))
