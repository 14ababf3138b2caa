"""Likelihood of images under a diffusion model, by the ordinary differential equation of its probability flow.

In the variance-exploding form x = x_t / gamma, with noise level s = sigma / gamma, the flow is dx/ds = eps(x, s), and the
log density along it changes by minus the divergence of eps (Song et al., arXiv:2011.13456, section 4.3 and appendix D.2;
the form is that of Karras et al., arXiv:2206.00364). The divergence is estimated with random signs (Hutchinson), the same
for all images and models. The solver is torchdiffeq's Runge-Kutta of order 4 on a fixed grid of log s: an adaptive solver
chooses its steps from the whole batch, so results would depend on the other images in it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from scipy import stats
from torchdiffeq import odeint

from evaluators import statistics
from evaluators.base import Evaluator, Images, Metric, Model, Scores, Subject
from evaluators.batches import Batches
from evaluators.membership import populations


class Likelihood(Evaluator):
    """Bits per dimension of forgotten, matched held-out and retained images in [-1, 1]; arXiv:2011.13456.

    For a latent model the density is that of latents. Add log2(127.5) to compare with figures for integer pixels of 8 bits.
    `excess` is the difference between held-out and forgotten images of the same kind: above 0 the latter are remembered.
    """

    name = "likelihood"
    directions = {"forget_bits": "target", "retain_bits": "min", "excess": "target"}
    needs = "forget and retain sets and the holdout of the first"
    cost = "4 `likelihood_steps` passes per image, each with `likelihood_probes` backward passes"

    def scores(self, subject: Subject) -> Scores:
        probes = subject.model.noise(subject.seeds("likelihood", subject.sizes["likelihood_probes"])).sign()
        images = populations(subject)
        steps = subject.sizes["likelihood_steps"]
        return {
            name: bits_per_dimension(subject.model, subject.inputs(images[name]), probes, steps, subject.batches)
            for name in ("forget", "forget_holdout", "retain")
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        forget, other = float(scores["forget"].mean()), float(scores["forget_holdout"].mean())
        return {"forget_bits": forget, "retain_bits": float(scores["retain"].mean()), "excess": other - forget}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, per_image = self.values(scores, subject), {name: a.mean(1) for name, a in scores.items()}
        rows = [
            Metric.mean(f"{name}_bits", values[f"{name}_bits"], per_image[name], over="images", direction=direction)
            for name, direction in (
                ("forget", self.directions["forget_bits"]),
                ("retain", self.directions["retain_bits"]),
            )
        ]
        return [*rows, _excess(values["excess"], per_image["forget"], per_image["forget_holdout"])]


def _excess(value: float, forget: np.ndarray, other: np.ndarray) -> Metric:
    """Bits of held-out images (m,) minus those of forgotten ones (n,), with the interval of Welch's t for two samples."""
    n = len(forget)
    if n == 1:  # a constant to compare held-out images with
        reason = "one forgotten image: the interval is over held-out images only"
        return replace(
            Metric.mean("excess", value, other, over="held-out images", offset=-float(forget[0]), reason=reason), n=1
        )
    if len(other) < 2 or np.ptp(forget) == np.ptp(other) == 0:
        return Metric("excess", value, n, reason="no interval: it needs images that differ, of either kind")
    test = stats.ttest_ind(other, forget, equal_var=False)
    lo, hi = test.confidence_interval(statistics.LEVEL)
    se = float(np.hypot(stats.sem(other), stats.sem(forget)))
    return Metric("excess", value, n, se=se, lo=float(lo), hi=float(hi), interval="welch's t over images")


def bits_per_dimension(
    model: Model, images: Images, probes: torch.Tensor, steps: int, batches: Batches | None = None
) -> np.ndarray:
    """Negative log2 density per dimension (n, probes), whose mean over probes is unbiased.

    probes: signs (k, C, H, W), shared by all images. The density is that of images plus the noise of the model's first step.
    batches: the rows at once; None starts with its default and halves it when memory runs out.
    """
    model.net.eval()

    def part(rows: slice) -> torch.Tensor:
        cond = None if images.cond is None else images.cond[rows].to(model.device)
        return log_density(model, images.x[rows].to(model.device, model.dtype), cond, probes, steps).double().cpu()

    dimensions = images.x[0].numel()
    return -torch.cat((batches or Batches()).map(part, len(images.x))).numpy() / (dimensions * math.log(2))


def log_density(
    model: Model, x: torch.Tensor, cond: torch.Tensor | None, probes: torch.Tensor, steps: int
) -> torch.Tensor:
    """Estimates of log p(x) in nats, (n, probes), for x (n, C, H, W), in `steps` steps between the first and the last level."""
    levels = model.levels().double()
    grid = torch.linspace(float(levels[0].log()), float(levels[-1].log()), steps + 1, dtype=x.dtype, device=x.device)

    def flow(u: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        s = min(max(math.exp(float(u)), float(levels[0])), float(levels[-1]))
        with torch.enable_grad():
            point = state[0].detach().requires_grad_(True)
            eps = model.eps_at(point, s, cond)
            traces = []
            for k, probe in enumerate(probes):
                (product,) = torch.autograd.grad((eps * probe).sum(), point, retain_graph=k + 1 < len(probes))
                traces.append((product * probe).flatten(1).sum(1))
        return s * eps.detach(), s * torch.stack(traces, 1)

    with torch.no_grad():
        start = (x, torch.zeros(len(x), len(probes), dtype=x.dtype, device=x.device))
        path, divergence = odeint(flow, start, grid, method="rk4")
    variance = 1 + float(levels[-1]) ** 2
    latent = path[-1].flatten(1)
    prior = -0.5 * (latent.square().sum(1) / variance + latent.shape[1] * math.log(2 * math.pi * variance))
    return prior[:, None] + divergence[-1]
