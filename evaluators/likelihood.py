"""Likelihood of images under a diffusion model, by the ordinary differential equation of its probability flow.

In the variance-exploding form x = x_t / gamma, with noise level s = sigma / gamma, the flow is dx/ds = eps(x, s), and the
log density along it changes by minus the divergence of eps (Song et al., arXiv:2011.13456, section 4.3 and appendix D.2;
the form is that of Karras et al., arXiv:2206.00364). The divergence is estimated with random signs (Hutchinson), the same
for all images and models. The solver is torchdiffeq's Runge-Kutta of order 4 on a fixed grid of log s: an adaptive one
takes its steps from the whole batch, so that a result would depend on what else is in it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchdiffeq import odeint

from evaluators.base import BATCHES, Evaluator, Images, Metric, Model, Scores, Subject
from evaluators.membership import populations
from evaluators.statistics import jackknife_interval, t_interval


class Likelihood(Evaluator):
    """Bits per dimension of forgotten, matched held-out and retained images in [-1, 1]; arXiv:2011.13456.

    Of a latent model it is the density of latents. For 8-bit images, add log2(127.5) to compare with figures for integer pixels. `excess` is how much better forgotten
    images are predicted than held-out ones of their kind, in bits per dimension: above 0 they are remembered.
    """

    name = "likelihood"
    directions = {"forget_bits": "target", "retain_bits": "min", "excess": "target"}
    needs = "forget and retain sets and the holdout of the first"
    cost = "4 `likelihood_steps` passes per image, each with `likelihood_probes` backward passes"

    def scores(self, subject: Subject) -> Scores:
        probes = subject.model.noise(subject.seeds("likelihood", subject.sizes["likelihood_probes"])).sign()
        found = populations(subject)
        return {
            name: bits_per_dimension(
                subject.model, subject.inputs(found[name]), probes, subject.sizes["likelihood_steps"]
            )
            for name in ("forget", "forget_holdout", "retain")
        }

    def values(self, scores: Scores, subject: Subject) -> dict[str, float]:
        forget, other = float(scores["forget"].mean()), float(scores["forget_holdout"].mean())
        return {"forget_bits": forget, "retain_bits": float(scores["retain"].mean()), "excess": other - forget}

    def rows(self, scores: Scores, subject: Subject, replicates: dict[str, np.ndarray]) -> list[Metric]:
        values, rows = self.values(scores, subject), []
        for name in ("forget", "retain"):
            per_image = scores[name].mean(1)
            value, n, direction = values[f"{name}_bits"], len(per_image), self.directions[f"{name}_bits"]
            if n > 1:
                se, lo, hi = t_interval(per_image)
                rows.append(Metric(f"{name}_bits", value, n, se, lo, hi, "student-t over images", direction))
            else:
                rows.append(Metric(f"{name}_bits", value, n, direction=direction, reason="one image: no interval"))
        se, lo, hi = jackknife_interval(values["excess"], replicates["excess"])
        rows.append(Metric("excess", values["excess"], len(scores["forget"]), se, lo, hi, "jackknife over images"))
        return rows


def bits_per_dimension(model: Model, images: Images, probes: torch.Tensor, steps: int) -> np.ndarray:
    """Negative log2 density per dimension, (n, probes): their mean over probes is unbiased.

    probes: signs (k, C, H, W), shared by all images. The density is that of images plus the noise of the model's first step.
    """
    model.net.eval()

    def part(rows: slice) -> torch.Tensor:
        cond = None if images.cond is None else images.cond[rows].to(model.device)
        return log_density(model, images.x[rows].to(model.device, model.dtype), cond, probes, steps).double().cpu()

    dimensions = images.x[0].numel()
    return -torch.cat(BATCHES.map(part, len(images.x))).numpy() / (dimensions * math.log(2))


def log_density(
    model: Model, x: torch.Tensor, cond: torch.Tensor | None, probes: torch.Tensor, steps: int
) -> torch.Tensor:
    """Estimates of log p(x) in nats, (n, probes), for x (n, C, H, W); `steps` of the solver between first and last step."""
    levels = model.levels().double()
    grid = torch.linspace(float(levels[0].log()), float(levels[-1].log()), steps + 1, dtype=x.dtype, device=x.device)

    def flow(u: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        s = min(max(math.exp(float(u)), float(levels[0])), float(levels[-1]))
        with torch.enable_grad():
            here = state[0].detach().requires_grad_(True)
            eps = model.eps_at(here, s, cond)
            traces = []
            for k, probe in enumerate(probes):
                (product,) = torch.autograd.grad((eps * probe).sum(), here, retain_graph=k + 1 < len(probes))
                traces.append((product * probe).flatten(1).sum(1))
        return s * eps.detach(), s * torch.stack(traces, 1)

    with torch.no_grad():
        start = (x, torch.zeros(len(x), len(probes), dtype=x.dtype, device=x.device))
        path, divergence = odeint(flow, start, grid, method="rk4")
    variance = 1 + float(levels[-1]) ** 2
    latent = path[-1].flatten(1)
    prior = -0.5 * (latent.square().sum(1) / variance + latent.shape[1] * math.log(2 * math.pi * variance))
    return prior[:, None] + divergence[-1]
