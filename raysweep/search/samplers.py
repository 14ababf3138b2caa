"""Samplers of the search: functions (seed, space) that return a sampler of Optuna for one trial of the space's method.

Each trial has a new one with its own seed, so that a resumed search continues like an uninterrupted one. It reads from its study
the trials of the method that it may learn from (see `raysweep.search.view`); their two objectives (residue, damage) are minimised.
"""

from __future__ import annotations

from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from raysweep.search.spaces import Space
from raysweep.search.study import quiet


def random(seed: int, space: Space) -> BaseSampler:
    """Independent draws."""
    return RandomSampler(seed=seed)


def tpe(seed: int, space: Space) -> BaseSampler:
    """Multi-objective tree-structured Parzen estimators; until two trials of the method are known, trials are drawn at random."""
    with quiet():
        return TPESampler(
            seed=seed,
            multivariate=True,
            group=any(p.when for p in space.parameters),  # only then do trials differ in their parameters
            constant_liar=True,
            n_startup_trials=2,
        )
