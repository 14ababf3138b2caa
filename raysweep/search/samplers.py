"""Samplers of the search: functions (seed, spaces) that return a sampler of Optuna.

Each trial has a new one with its own seed, so that a resumed search continues like an uninterrupted one. It reads
the trials before it from the study, whose two objectives (residue, damage) are minimised.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from raysweep.search.spaces import Space
from raysweep.search.study import quiet


def random(seed: int, spaces: Sequence[Space]) -> BaseSampler:
    """Independent draws."""
    return RandomSampler(seed=seed)


def tpe(seed: int, spaces: Sequence[Space]) -> BaseSampler:
    """Multi-objective tree-structured Parzen estimators; the first two trials of each method are drawn at random."""
    with quiet():
        return TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=2 * len(spaces)
        )
