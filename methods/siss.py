"""SISS: subtracted importance-sampled scores.

Source: Alberti, Hasanaliyev, Shah, Ermon, "Data Unlearning in Diffusion Models", ICLR 2025, arXiv:2503.01034, and the
released code. With X the training set, A in X the forget set, q(m|x) = N(gamma_t x, sigma_t^2 I), one noisy image m is
drawn from the defensive mixture q_lam(m|x,a) = (1 - lam) q(m|x) + lam q(m|a) and serves both terms:
    L_x = E w_x |eps_theta(m,t) - eps_x(m)|^2,   w_x = q(m|x)/q_lam(m|x,a),   eps_x(m) = (m - gamma_t x)/sigma_t
    L_a = E w_a |eps_theta(m,t) - eps_a(m)|^2,   w_a = q(m|a)/q_lam(m|x,a),   eps_a(m) = (m - gamma_t a)/sigma_t
As in the released code, x is drawn from X \\ A and the gradients are combined as  g = g_x - c g_a  with one of
    renormalise  c = tau/|g_a|        (released code; the superfactor that this implies is dynamic)
    clip         c = min(1, tau/|g_a|)
    fixed        c = superfactor      (paper: (1 + s) K/(N - K))
tau is either `rho` times |g_x| (relative, does not depend on units) or the absolute `tau` in the released code's units:
losses are SUMS over the elements of an image and means over rows. The target follows the model's own parameterisation
(v instead of epsilon where the network predicts v); this reweights timesteps and does not change w_x, w_a. On a rectified
flow gamma = 1 - sigma: the formulas are the same, log q(m|a)/q(m|x) = ((1 - sigma)/sigma^2) <a - x, m - (1 - sigma)(x + a)/2>, and
the targets are (m - x)/sigma and (m - a)/sigma, the velocities of the straight paths through m. Where x and a have different
conditions (classes), each term is evaluated under its own, at the cost of a second forward pass.

Latents are the mean of the autoencoder's posterior; the Stable Diffusion script samples it anew at every step.

`t_sampler` is explicit because the released CelebA-HQ and Stable Diffusion scripts draw only t = 999, while the paper
says uniform.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from methods import gradients
from methods.base import Descent, Scalars, Training
from methods.rows import Batch


class SubtractSettings(Training):
    """Settings of subtracted scores, with or without importance sampling."""

    lr: float = Field(5e-6, gt=0, description="learning rate (released code: 5e-6 CelebA-HQ, 5e-5 MNIST, 1e-5 SD)")
    steps: int = Field(60, ge=0, description="optimiser steps (released code: 60 CelebA-HQ, 300 MNIST, 35 SD)")
    scaling: Literal["renormalise", "clip", "fixed"] = Field("renormalise", description="rule for the scale c of g_a")
    rho: float | None = Field(0.1, gt=0, description="tau / |g_x| (released README: about 10 %); null: use tau")
    tau: float | None = Field(None, gt=0, description="absolute norm in sum-loss units (released: 5, 500, 750)")
    superfactor: float | None = Field(None, ge=0, description="c itself, for scaling: fixed")
    t_sampler: Literal["uniform", "fixed", "window"] = Field(
        "uniform", description="uniform: paper; fixed: as released"
    )
    t_low: int = Field(0, ge=0, description="window: first timestep; fixed: the timestep")
    t_high: int | None = Field(None, ge=1, description="window: one past the last timestep; null: end of the schedule")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient clipping (released code)")
    weight_decay: float = Field(1e-6, ge=0, description="AdamW weight decay (released code, pixel models)")
    beta1: float = Field(0.95, ge=0, lt=1, description="AdamW (released code, pixel models)")

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.scaling == "fixed":
            if self.superfactor is None:
                raise ValueError("scaling: fixed needs superfactor")
        elif (self.rho is None) == (self.tau is None):
            raise ValueError("give exactly one of rho and tau (rho: null switches to tau)")
        if self.t_high is not None and self.t_high <= self.t_low:
            raise ValueError(f"t_high must exceed t_low, but {self.t_high} <= {self.t_low}")
        for name, unused in (
            ("superfactor", self.scaling != "fixed"),
            ("rho", self.scaling == "fixed" and self.rho is not None),
            ("tau", self.scaling == "fixed" and self.tau is not None),
            ("t_low", self.t_sampler == "uniform"),
            ("t_high", self.t_sampler != "window"),
        ):
            if name in self.model_fields_set and unused and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with scaling: {self.scaling} and t_sampler: {self.t_sampler}")
        return self


class SISSSettings(SubtractSettings):
    """Settings of SISS."""

    lam: float = Field(0.5, ge=0, le=1, description="share of rows noised from the forget set (paper: 0.5)")


class SubtractedScores(Descent):
    """Base of SISS and its variants without importance sampling: timesteps and the combination of gradients."""

    needs = frozenset({"forget", "retain"})
    hp: SubtractSettings

    def draw_t(self, u: torch.Tensor) -> torch.Tensor:
        """Timesteps (n,) from uniforms (n,) in [0, 1), by `t_sampler`."""
        end = len(self.model.alphas)
        if self.hp.t_sampler == "uniform":
            low, high = 0, end
        elif self.hp.t_sampler == "window":
            low, high = self.hp.t_low, min(end, self.hp.t_high or end)
        else:
            low, high = self.hp.t_low, self.hp.t_low + 1
        return (low + (u * (high - low)).long()).clamp(max=end - 1)

    def combine(self, g_x: torch.Tensor, g_a: torch.Tensor) -> tuple[torch.Tensor, Scalars]:
        """(g_x - c g_a in the storage of g_x, diagnostics)."""
        dot, x_sq, a_sq = gradients.products(g_x, g_a)
        norm_x, norm_a = x_sq.sqrt(), a_sq.sqrt()
        if self.hp.scaling == "fixed":
            c = torch.full_like(norm_x, self.hp.superfactor or 0.0)
        else:
            tau = norm_x * (self.hp.rho or 0.0) if self.hp.tau is None else torch.full_like(norm_x, self.hp.tau)
            c = torch.where(norm_a > 0, tau / torch.where(norm_a > 0, norm_a, 1), 0)
            if self.hp.scaling == "clip":
                c = c.clamp(max=1.0)
        scalars = {"norm_x": norm_x, "norm_a": norm_a, "c": c, "cosine": gradients.cosine(dot, x_sq, a_sq)}
        return g_x.addcmul_(g_a, c, value=-1), scalars


class SISS(SubtractedScores):
    """Importance-sampled subtraction with one forward pass per row; arXiv:2503.01034."""

    name = "siss"
    source = "Alberti et al., ICLR 2025, arXiv:2503.01034, SISS"
    forwards_per_step = 5  # one forward pass and two backward passes; two forward passes under two conditions
    tape = 1.2  # the graph stays for the second backward pass
    Hyperparameters = SISSSettings
    hp: SISSSettings

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget, model = batch["retain"], batch["forget"], self.model
        u = model.uniform(retain.seeds, 2)
        t, from_forget = self.draw_t(u[:, 0]), u[:, 1] < self.hp.lam
        eps = model.noise(retain.seeds)
        mask = from_forget.view(-1, 1, 1, 1)
        m = model.add_noise(torch.where(mask, forget.x, retain.x), eps, t)
        gamma, sigma = model.gamma_sigma(t)
        ratio = log_ratio(retain.x, forget.x, m, gamma.flatten(), sigma.flatten())
        w_x, w_a = importance_weights(ratio, self.hp.lam)
        outputs = self.predict_both(m, t, retain.cond, forget.cond)
        losses = []
        for rows, weight, output in zip((retain, forget), (w_x, w_a), outputs, strict=True):
            target = model.target(rows.x, (m - gamma * rows.x) / sigma, t)
            errors = (output - target).square().flatten(1).sum(1)
            # where a weight underflows to 0 the error may be infinite; the product must be 0, not NaN
            losses.append(torch.where(weight > 0, weight.to(errors.dtype) * errors, 0.0).sum() / rows.total)
        g_x = self.gradient(losses[0], 0, keep_graph=True)
        g_a = self.gradient(losses[1], 1)
        p = w_a * self.hp.lam
        stats = gradients.scalars(
            loss_x=losses[0],
            loss_a=losses[1],
            weight_x=w_x.sum() / retain.total,
            weight_a=w_a.sum() / retain.total,
            activity=(p * (1 - p)).sum() / retain.total,
        )
        direction, scalars = self.combine(g_x, g_a)
        return direction, stats | scalars

    def predict_both(
        self, m: torch.Tensor, t: torch.Tensor, cond_x: torch.Tensor | None, cond_a: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's output at m under the two terms' conditions: one pass where these agree, else two."""
        output = self.model.predict(m, t, cond_x)
        if cond_x is None or cond_a is None or torch.equal(cond_x, cond_a):
            return output, output
        return output, self.model.predict(m, t, cond_a)


def log_ratio(
    x: torch.Tensor, a: torch.Tensor, m: torch.Tensor, gamma: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """log q(m|a) - log q(m|x) per row, (B,), for images (B, ...) and gamma, sigma (B,).

    Computed as (gamma/sigma^2) <a - x, m - gamma (x + a)/2>, which does not subtract two large squared norms.
    """
    shape = (-1,) + (1,) * (x.dim() - 1)
    middle = m - gamma.view(shape) * (x + a) / 2
    return (gamma / sigma**2) * ((a - x) * middle).flatten(1).sum(1)


def importance_weights(log_ratio: torch.Tensor, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(w_x, w_a), each (B,): q(m|x) and q(m|a) over the mixture (1 - lam) q(m|x) + lam q(m|a).

    For 0 < lam < 1 through the posterior p = sigmoid(log_ratio + logit lam): w_a = p/lam, w_x = (1 - p)/(1 - lam), both
    finite for any input, and (1 - lam) w_x + lam w_a = 1. At the ends one weight is 1 and the other the plain ratio,
    its logarithm cut at 80.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], not {lam}")
    one = torch.ones_like(log_ratio)
    if lam == 0:
        return one, log_ratio.clamp(max=80).exp()
    if lam == 1:
        return (-log_ratio).clamp(max=80).exp(), one
    logit = torch.logit(torch.tensor(lam, dtype=torch.float64)).to(log_ratio)
    return torch.sigmoid(-log_ratio - logit) / (1 - lam), torch.sigmoid(log_ratio + logit) / lam
