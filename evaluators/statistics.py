"""Intervals, tests, sample sizes and distances, from NumPy arrays to plain numbers.

SciPy and torch-fidelity are imported inside functions, because processes without torch use the cheap ones.
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact two-sided interval of a proportion with k successes in n trials.

    If trials differ in their rates, like samples of several prompts in turn, it covers the mean of the rates at least as
    often (Hoeffding, "On the distribution of the number of successes in independent trials", 1956).
    """
    from scipy import stats

    interval = stats.binomtest(int(k), int(n)).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)


def share_floor(n: int, level: float = LEVEL) -> float:
    """The standard error of a share of n units of which none shows it, by the width of the exact interval.

    All units may be equal by chance, so the error of a share is never smaller.
    """
    from scipy import stats

    return clopper_pearson(0, n, level)[1] / (2 * float(stats.norm.ppf(0.5 + level / 2)))


def corrected_shares(shares: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """True class shares (c,) given the shares that an imperfect classifier reports (Rogan and Gladen, 1978).

    confusion[i, j]: the share of real images of class j that it takes for class i. Solved by least squares within the
    simplex, so the results are shares again.
    """
    from scipy import optimize

    n = confusion.shape[1]
    weight = 1e3  # of an extra row, "the shares sum to one", which then holds to 1e-6
    a = np.vstack([confusion, np.full((1, n), weight)])
    solution, _ = optimize.nnls(a, np.append(np.asarray(shares, dtype=float), weight))
    return solution / solution.sum()


def normal_interval(value: float, se: float, level: float = LEVEL) -> tuple[float, float]:
    """(value - z se, value + z se)."""
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + level / 2))
    return value - z * se, value + z * se


def jackknife_interval(value: float, replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(standard error, low, high) of a value from its leave-one-group-out values (G,), by Student's t with G - 1 degrees.

    The error is itself estimated from G groups, so with the usual ten or twenty a normal interval would be too short.
    """
    from scipy import stats

    se = jackknife_se(replicates)
    half = se * float(stats.t.ppf(0.5 + level / 2, len(replicates) - 1))
    return se, value - half, value + half


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(standard error, low, high) of the mean of independent values (n,), n >= 2, by Student's t."""
    from scipy import stats

    se = float(stats.sem(values))
    half = se * float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    mean = float(np.mean(values))
    return se, mean - half, mean + half


def jackknife_se(replicates: np.ndarray) -> float:
    """Standard error from leave-one-group-out values (G,) or, by the same rule along axis 0, (G, ...).

    Valid for the Frechet distance, unlike a naive bootstrap, whose duplicates add bias.
    """
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

    torch-fidelity takes equal numbers of both, so the larger set is cut to the size of the smaller.
    """
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    n = min(len(x), len(y))
    f1, f2 = (torch.from_numpy(np.ascontiguousarray(f[:n])) for f in (x, y))
    result = kid_features_to_metric(f1, f2, kid_subsets=1, kid_subset_size=n, verbose=False)
    return float(result["kernel_inception_distance_mean"])


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Shares of generated features (n, d) inside the manifold of real ones (m, d) and the reverse, by torch-fidelity.

    Kynkaanniemi et al., arXiv:1904.06991: the manifold is the union of balls around each point up to its third neighbour.
    """
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    features = (torch.from_numpy(np.ascontiguousarray(f)) for f in (generated, real))
    result = prc_features_to_metric(*features, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    return float(result["precision"]), float(result["recall"])


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of each image's class distribution from their mean, for logits (n, classes), by torch-fidelity.

    Computed on all images at once: the usual mean over ten parts lowers it by an amount that depends on n.
    """
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    result = isc_features_to_metric(torch.from_numpy(np.ascontiguousarray(logits)), splits=1, shuffle=False)
    return float(result["inception_score_mean"])


def diversity(features: np.ndarray) -> float:
    """Mean Euclidean distance between two different rows of features (n, d)."""
    from scipy.spatial import distance

    return float(distance.pdist(features).mean())


def delong(pos: np.ndarray, neg: np.ndarray) -> tuple[float, float]:
    """(AUC, standard error) by DeLong; the AUC is the probability that a positive scores above a negative, ties count one half.

    With a single positive the error is that of sampling negatives only.
    """
    v_pos, v_neg = _placements(pos, neg)
    return float(v_pos.mean()), float(np.sqrt(_variance(v_pos) + _variance(v_neg)))


def auc_interval(pos: np.ndarray, neg: np.ndarray, level: float = LEVEL) -> tuple[float, float, float, float]:
    """(AUC, standard error, low, high) by DeLong, within [0, 1].

    For scores that do not overlap DeLong's error is 0, which understates the uncertainty: the interval is then the exact one
    of a proportion without failures among the smaller kind.
    """
    auc, se = delong(pos, neg)
    low, high = normal_interval(auc, se, level)
    if se == 0 and auc in (0.0, 1.0):
        low, high = clopper_pearson(round(auc) * min(len(pos), len(neg)), min(len(pos), len(neg)), level)
    return auc, se, max(0.0, low), min(1.0, high)


def paired_gap(pos: np.ndarray, neg: np.ndarray, pos_ref: np.ndarray, neg_ref: np.ndarray) -> tuple[float, float]:
    """(AUC - mean AUC of reference models, standard error) on the same positives (n,) and negatives (m,).

    pos_ref (n, k), neg_ref (m, k): scores by k references. The error is that of the sampling of images (DeLong on the paired
    placements); how much references differ is left to `evaluators.oracles.compare`.
    """
    placed_pos, placed_neg = _placements(pos, neg)
    references = [_placements(pos_ref[:, k], neg_ref[:, k]) for k in range(pos_ref.shape[1])]
    gap_pos = placed_pos - np.mean([p for p, _ in references], axis=0)
    gap_neg = placed_neg - np.mean([n for _, n in references], axis=0)
    return float(gap_pos.mean()), float(np.sqrt(_variance(gap_pos) + _variance(gap_neg)))


def tpr_at_fpr(pos: np.ndarray, neg: np.ndarray, fpr: float) -> tuple[float | None, str]:
    """(true positive rate, "") at a false positive rate of at most `fpr`, or (None, reason).

    The threshold lets exactly floor(fpr m) of the m negatives pass, none by ties, without interpolation. With fewer than
    10 / fpr negatives the realised rate may be several times `fpr`, so no number is returned.
    """
    needed = int(np.ceil(10 / fpr))
    if len(neg) < needed:
        return None, f"needs {needed:,} non-members to speak of {fpr:.1%} false positives; there are {len(neg):,}"
    allowed = int(np.floor(fpr * len(neg)))
    threshold = np.sort(neg)[::-1][allowed]
    return float((pos > threshold).mean()), ""


def advantage(pos: np.ndarray, neg: np.ndarray) -> float:
    """Largest |true - false positive rate| over thresholds, the two-sided Kolmogorov-Smirnov distance."""
    from scipy import stats

    return float(stats.ks_2samp(pos, neg, method="asymp").statistic)


def detectable_auc(positives: int, negatives: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The smallest |AUC - 0.5| that a two-sided test at `level` detects with `power`.

    Without a difference, the AUC of n positives and m negatives has variance (n + m + 1) / (12 n m).
    """
    return _units(power, level) * float(np.sqrt((positives + negatives + 1) / (12 * positives * negatives)))


def detectable_proportion(n: int, rate: float, power: float = 0.8, level: float = LEVEL) -> float:
    """The smallest difference between two proportions near `rate`, n samples each, detected with `power`."""
    return _units(power, level) * float(np.sqrt(2 * max(rate * (1 - rate), 1 / (4 * n)) / n))


def _units(power: float, level: float) -> float:
    """Standard errors between no difference and one that is detected with `power`."""
    from scipy import stats

    return float(stats.norm.ppf(0.5 + level / 2) + stats.norm.ppf(power))


def _placements(pos: np.ndarray, neg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of negatives below each positive (n,), share of positives above each negative (m,))."""
    below = (pos[:, None] > neg[None, :]) + 0.5 * (pos[:, None] == neg[None, :])
    return below.mean(1), below.mean(0)


def _variance(placements: np.ndarray) -> float:
    return float(placements.var(ddof=1) / len(placements)) if len(placements) > 1 else 0.0
