"""Scores of membership inference: how much a model behaves as if it had been trained on an image.

Each function maps a model and images (n, C, H, W) with their conditions to scores (n, len(times)), float64, one column per
step t. Larger is meant to say "member", but the sign of an attack is not universal: on small models `secmi` and `pian`
come out inverted. `evaluators.membership` therefore calibrates it on images whose membership is known.

Symbols: alpha_t the cumulative product, x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps, eps(x, t) the predicted noise.
On a rectified flow the factors are 1 - s and s instead, and a DDIM step is Euler's: (1 - r) x0 + r eps = x + (r - s) v. Norms are sums
over the elements of an image, except in `loss`, which is a mean. Networks that predict v are read as eps.
`batches` sets the rows at once; None starts with its default and halves it when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from evaluators.batches import Batches


def loss(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor | None,
    times: Sequence[int],
    noises: torch.Tensor,
    batches: Batches | None = None,
) -> np.ndarray:
    """Minus the denoising loss, mean over elements and over a bank of noises (k, C, H, W) shared by all images and models.

    Matsumoto et al., "Membership Inference Attacks against Diffusion Models", arXiv:2302.03262. k passes per step.
    """

    def score(x0: torch.Tensor, c: torch.Tensor | None) -> list[torch.Tensor]:
        columns = []
        for t in times:
            total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
            for eps in noises:
                x_t = model.add_noise(x0, eps.expand_as(x0), _at(t, x0))
                total += (eps - model.eps(x_t, _at(t, x0), c)).double().square().flatten(1).mean(1)
            columns.append(-total / len(noises))
        return columns

    return _batched(model, x, cond, score, batches)


def secmi(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor | None,
    times: Sequence[int],
    batches: Batches | None = None,
    *,
    stride: int = 10,
) -> np.ndarray:
    """Minus ||x_t - psi(phi(x_t))||^2: x_t by deterministic DDIM inversion of x0 in strides, phi one stride up, psi back.

    Duan et al., "Are Diffusion Models Vulnerable to Membership Inference Attacks?", arXiv:2302.01316 (t-error). Steps are
    rounded down to multiples of `stride`; max(times) / stride + len(times) + 1 passes serve all of them.
    """
    grid = [max(stride, t // stride * stride) for t in times]
    last = len(model.alphas) - 1

    def score(x0: torch.Tensor, c: torch.Tensor | None) -> list[torch.Tensor]:
        errors: dict[int, torch.Tensor] = {}
        state, t = x0, 0
        while t <= max(grid):
            up = _ddim(model, state, t, min(t + stride, last), c)
            if t in grid:
                back = _ddim(model, up, min(t + stride, last), t, c)
                errors[t] = -(state - back).double().square().flatten(1).sum(1)
            state, t = up, t + stride
        return [errors[t] for t in grid]

    return _batched(model, x, cond, score, batches)


def pia(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor | None,
    times: Sequence[int],
    batches: Batches | None = None,
    *,
    power: float = 4.0,
    normalised: bool = False,
) -> np.ndarray:
    """Minus ||eps0 - eps(sqrt(alpha_t) x0 + sqrt(1 - alpha_t) eps0, t)||_p^p with eps0 = eps(x0, 0); draws no noise.

    Kong et al., "An Efficient Membership Inference Attack for the Diffusion Model by Proximal Initialization",
    arXiv:2305.18355, p = 4. `normalised` (PIAN): eps0 is rescaled so that its mean magnitude is that of a standard normal,
    sqrt(2 / pi). len(times) + 1 passes.
    """

    def score(x0: torch.Tensor, c: torch.Tensor | None) -> list[torch.Tensor]:
        first = model.eps(x0, _at(0, x0), c)
        if normalised:
            first = first / first.abs().flatten(1).mean(1).view(-1, 1, 1, 1).clamp(min=1e-12) * (2 / np.pi) ** 0.5
        columns = []
        for t in times:
            second = model.eps(model.add_noise(x0, first, _at(t, x0)), _at(t, x0), c)
            columns.append(-(first - second).double().abs().pow(power).flatten(1).sum(1))
        return columns

    return _batched(model, x, cond, score, batches)


def sima(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor | None,
    times: Sequence[int],
    batches: Batches | None = None,
    *,
    power: float = 4.0,
) -> np.ndarray:
    """Minus ||eps(x0, t)||_p^p at the image itself, without noise; arXiv:2509.25003, p = 4. One pass per step."""

    def score(x0: torch.Tensor, c: torch.Tensor | None) -> list[torch.Tensor]:
        return [-model.eps(x0, _at(t, x0), c).double().abs().pow(power).flatten(1).sum(1) for t in times]

    return _batched(model, x, cond, score, batches)


def clid(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor,
    reduced: Sequence[torch.Tensor],
    times: Sequence[int],
    noises: torch.Tensor,
    batches: Batches | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(loss score, discrepancy), each (n, len(times)).

    The score is minus the loss under the image's own condition, the discrepancy the increase of the loss under `reduced`
    conditions, mean_j [l(x, c_j) - l(x, c)].

    Zhai et al., "Membership Inference on Text-to-Image Diffusion Models via Conditional Likelihood Discrepancy",
    arXiv:2405.14800. reduced: captions without some of their words and the empty one; for a class label, the null label
    alone. The caller calibrates how the two are combined (`robust_mix`).
    """
    full = loss(model, x, cond, times, noises, batches)
    others = [loss(model, x, c, times, noises, batches) for c in reduced]
    return full, np.mean([full - other for other in others], axis=0)


def robust_mix(a: np.ndarray, b: np.ndarray, weight: float, like: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(1 - weight) a + weight b, each centred by the median and scaled by the interquartile range of `like`."""

    def scaled(v: np.ndarray, reference: np.ndarray) -> np.ndarray:
        low, middle, high = np.quantile(reference, [0.25, 0.5, 0.75])
        return (v - middle) / max(high - low, 1e-12)

    return (1 - weight) * scaled(a, like[0]) + weight * scaled(b, like[1])


def lira_offline(scores: np.ndarray, out: np.ndarray, pool: np.ndarray | None = None) -> np.ndarray:
    """Excess of scores (n,) over those of models that never saw the images, out (n, k), in standard deviations.

    Carlini et al., "Membership Inference Attacks From First Principles", arXiv:2112.03570, the one-sided test, on the
    scale of its normal quantile. The deviation is pooled over images, since k is small: over those of `pool` (m, k), which
    populations that are compared share, or of `out`.
    """
    return (scores - out.mean(1)) / _pooled(out if pool is None else pool)


def lira_online(scores: np.ndarray, member: np.ndarray, out: np.ndarray) -> np.ndarray:
    """log N(s; member) - log N(s; out) for scores (n,), with models trained with (n, k) and without (n, l) each image.

    arXiv:2112.03570; deviations are pooled over images, separately for either kind of model.
    """
    from scipy import stats

    with_, without = (stats.norm.logpdf(scores, models.mean(1), _pooled(models)) for models in (member, out))
    return with_ - without


def rmia(
    scores: np.ndarray,
    reference: np.ndarray,
    population: np.ndarray,
    population_reference: np.ndarray,
    gamma: float = 1.0,
) -> np.ndarray:
    """The share of population images z with ratio(x) / ratio(z) >= gamma, ratio = exp((s - s_reference) / tau).

    Zarifzadeh et al., "Low-Cost High-Power Membership Inference Attacks", arXiv:2312.03262. s is minus a loss and no
    probability; tau, the standard deviation of s - s_reference over the population, sets the scale.
    """
    gap, over = scores - reference, population - population_reference
    tau = max(float(over.std(ddof=1)), 1e-12)
    return ((gap[:, None] - over[None, :]) / tau >= np.log(gamma)).mean(1)


def expected_quantile(
    images: torch.Tensor, scores: np.ndarray, level: float = 0.9, bag: int = 5, steps: int = 200, seed: int = 0
) -> Callable[[torch.Tensor], np.ndarray]:
    """The `level` quantile of scores as a function of images, learned on a population without members, (m, C, H, W) and (m,).

    Tang et al., "Membership Inference Attacks on Diffusion Models via Quantile Regression", arXiv:2312.05140: small
    convolutional networks, each on a bootstrap of the population, regress it by the pinball loss, and their mean predicts
    it. The attack's score is the excess over the prediction; it needs no shadow models.
    """
    from torch import nn

    mean, scale = float(scores.mean()), max(float(scores.std()), 1e-12)
    target = torch.from_numpy((scores - mean) / scale).float()
    x, generator, nets = images.float().cpu(), torch.Generator().manual_seed(seed), []
    for k in range(bag):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + k)
            net = nn.Sequential(
                nn.Conv2d(x.shape[1], 16, 3, 2, 1),
                nn.SiLU(),
                nn.Conv2d(16, 16, 3, 2, 1),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 1),
            )
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
        bootstrap = torch.randint(len(x), (len(x),), generator=generator)
        for _ in range(steps):
            rows = bootstrap[torch.randint(len(bootstrap), (64,), generator=generator)]
            error = target[rows] - net(x[rows])[:, 0]
            pinball = torch.maximum(level * error, (level - 1) * error).mean()
            optimizer.zero_grad()
            pinball.backward()
            optimizer.step()
        nets.append(net)

    @torch.no_grad()
    def expected(others: torch.Tensor) -> np.ndarray:
        predicted = torch.stack([net(others.float().cpu())[:, 0] for net in nets]).double().mean(0)
        return predicted.numpy() * scale + mean

    return expected


def _pooled(values: np.ndarray) -> float:
    """The standard deviation around the mean of each row, pooled over rows, of values (n, k), k >= 2."""
    if values.shape[1] < 2:
        raise ValueError("a spread over models needs at least two of them")
    return max(float(np.sqrt(values.var(1, ddof=1).mean())), 1e-12)


def _ddim(model: Any, x: torch.Tensor, t: int, to: int, cond: torch.Tensor | None) -> torch.Tensor:
    """One deterministic DDIM step from t to `to`, up or down; x0 is not clipped."""
    eps = model.eps(x, _at(t, x), cond)
    gamma, sigma = model.gamma_sigma(_at(t, x))
    further, noisier = model.gamma_sigma(_at(to, x))
    return further * (x - sigma * eps) / gamma + noisier * eps


def _at(t: int, x: torch.Tensor) -> torch.Tensor:
    return torch.full((len(x),), t, device=x.device)


@torch.no_grad()
def _batched(
    model: Any,
    x: torch.Tensor,
    cond: torch.Tensor | None,
    score: Callable[[torch.Tensor, torch.Tensor | None], list[torch.Tensor]],
    batches: Batches | None,
) -> np.ndarray:
    """`score` (n, columns), computed in batches on the model's device."""
    model.net.eval()

    def part(rows: slice) -> torch.Tensor:
        c = None if cond is None else cond[rows].to(model.device)
        return torch.stack(score(x[rows].to(model.device, model.dtype), c), 1).double().cpu()

    return torch.cat((batches or Batches()).map(part, len(x))).numpy()
