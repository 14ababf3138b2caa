"""Intervals and distances. NumPy arrays in, plain numbers out.

SciPy and torch-fidelity are imported where they are used: the cheap functions here serve processes without torch, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact two-sided interval of a proportion, k successes of n."""
    from scipy import stats

    interval = stats.binomtest(int(k), int(n)).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)


def normal_interval(value: float, se: float, level: float = LEVEL) -> tuple[float, float]:
    """value -+ z se."""
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + level / 2))
    return value - z * se, value + z * se


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(standard error, low, high) of the mean of independent values (n,), n >= 2, by Student's t."""
    from scipy import stats

    se = float(stats.sem(values))
    half = se * float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    mean = float(np.mean(values))
    return se, mean - half, mean + half


def jackknife(statistic: Callable[[np.ndarray], float], groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """(value, standard error) of a statistic of rows by the delete-a-group jackknife.

    groups: arrays (n_g, ...) that together are the sample. Valid for the Frechet distance, where a naive bootstrap is
    not: resampled duplicates add bias.
    """
    value = statistic(np.concatenate(groups))
    parts = [statistic(np.concatenate([*groups[:g], *groups[g + 1 :]])) for g in range(len(groups))]
    return value, jackknife_se(np.array(parts))


def jackknife_se(replicates: np.ndarray) -> float:
    """Standard error from leave-one-group-out values (G,) or, by the same rule along axis 0, (G, ...)."""
    g = len(replicates)
    return float(np.sqrt((g - 1) / g * np.square(replicates - replicates.mean()).sum()))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features (n, d) and (m, d), by torch-fidelity."""
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = (fid_features_to_statistics(torch.from_numpy(np.ascontiguousarray(f))) for f in (x, y))
    return float(fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"])


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the cubic polynomial kernel on all of (n, d) and (m, d), by torch-fidelity.

    torch-fidelity takes equal numbers of both; the larger set is cut to the size of the smaller.
    """
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    n = min(len(x), len(y))
    f1, f2 = (torch.from_numpy(np.ascontiguousarray(f[:n])) for f in (x, y))
    result = kid_features_to_metric(f1, f2, kid_subsets=1, kid_subset_size=n, verbose=False)
    return float(result["kernel_inception_distance_mean"])


def delong(pos: np.ndarray, neg: np.ndarray) -> tuple[float, float]:
    """(AUC, standard error) that a positive scores above a negative, by DeLong; ties count one half.

    With a single positive the error is that of sampling negatives only.
    """
    v_pos, v_neg = _placements(pos, neg)
    return float(v_pos.mean()), float(np.sqrt(_variance(v_pos) + _variance(v_neg)))


def delong_paired(pos_a: np.ndarray, neg_a: np.ndarray, pos_b: np.ndarray, neg_b: np.ndarray) -> tuple[float, float]:
    """(AUC_a - AUC_b, standard error) for two scorers of the same positives and negatives, by DeLong."""
    (pa, na), (pb, nb) = _placements(pos_a, neg_a), _placements(pos_b, neg_b)
    return float(pa.mean() - pb.mean()), float(np.sqrt(_variance(pa - pb) + _variance(na - nb)))


def _placements(pos: np.ndarray, neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    below = (pos[:, None] > neg[None, :]) + 0.5 * (pos[:, None] == neg[None, :])
    return below.mean(1), below.mean(0)


def _variance(placements: np.ndarray) -> float:
    return float(placements.var(ddof=1) / len(placements)) if len(placements) > 1 else 0.0
