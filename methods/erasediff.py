"""EraseDiff: unlearning as a bilevel problem.

Source: Wu et al., "EraseDiff: Erasing Data Influence in Diffusion Models", arXiv:2401.05779, and the released code, which
solves it by value function (BOME):
    inner   theta^K = K optimiser steps on L_f from theta, then theta is restored;  L_f^ = mean L_f on the way
    outer   minimise  L_r(theta) + lam_B (L_f(theta) - L_f^)
L_f^ is a constant, so the direction is g_r + lam_B g_f, with lam_B
    fixed     `weight`
    adaptive  max(eta - cos(g_r, g_f), 0)     (released; BOME divides by |g_f|^2 instead)
and the inner steps show how far the forget loss can still fall (`gap`); they cost K more passes. `inner_moments: shared`
is a quirk of the release: Adam's moments of the inner steps leak into the outer one.

L_f = mean |eps_theta(x_t, c_f) - stopgrad eps_theta(x_t, c')|^2 with c' a random other class ("relabel"), or
mean |eps_theta(x_t) - u|^2 with u ~ U[0, 1) ("uniform", the older variant, which needs no classes). Both losses are means
over elements.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from methods import gradients
from methods.base import Batch, Descent, Draw, Goal, Model, Rows, Scalars, Training, mean_loss, picked, timesteps

DEFAULT = 0.1  # lam_B and eta of the released code


class EraseDiffSettings(Training):
    """Settings of EraseDiff."""

    lr: float = Field(1e-4, gt=0, description="learning rate, inner and outer (released code, DDPM)")
    steps: int = Field(140, ge=0, description="outer steps (released code, DDPM: 4 epochs of 4,500 images / 128)")
    inner_steps: int = Field(2, ge=0, description="K, inner steps per outer step (released code: 2)")
    mode: Literal["fixed", "adaptive"] = Field("fixed", description="how lam_B is found")
    weight: float | None = Field(None, ge=0, description="lam_B, for mode: fixed; null: 0.1 (released; 1 for SD)")
    eta: float | None = Field(None, ge=0, le=2, description="eta, for mode: adaptive; null: 0.1 (released)")
    target: Literal["auto", "relabel", "uniform"] = Field(
        "auto", description="what forgotten rows learn; auto: relabel where there are classes, else uniform"
    )
    inner_moments: Literal["own", "shared"] = Field("own", description="Adam's moments of the inner steps")

    @model_validator(mode="after")
    def _one_mode(self):
        other = "eta" if self.mode == "fixed" else "weight"
        if getattr(self, other) is not None:
            raise ValueError(f"{other} has no effect with mode: {self.mode}")
        return self


class EraseDiff(Descent):
    """Descends g_r + lam_B g_f after a look ahead on the forget loss; arXiv:2401.05779."""

    name = "erasediff"
    source = "Wu et al., arXiv:2401.05779"
    needs = frozenset({"forget", "retain"})
    forwards_per_step = 15  # two inner steps of 4, an outer one of 7
    copies = 9
    Hyperparameters = EraseDiffSettings
    hp: EraseDiffSettings

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        if hyperparameters.target == "relabel" and not goal.kept:
            return ["target: relabel needs classes; valid here: auto, uniform"]
        return []

    def draws(self) -> dict[str, Draw]:
        return {"forget": Draw(self.hp.batch_size), "retain": Draw(self.hp.batch_size)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget = batch["retain"], batch["forget"]
        reached = self.look_ahead(forget)
        forget_loss = self.forget_loss(forget)
        g_f = self.gradient(forget_loss, 1)
        retain_loss = mean_loss(self.model, retain)
        g_r = self.gradient(retain_loss)
        cosine = gradients.cosine(*gradients.products(g_r, g_f))
        if self.hp.mode == "fixed":
            lam = torch.full_like(cosine, DEFAULT if self.hp.weight is None else self.hp.weight)
        else:
            lam = adaptive_weight(cosine, DEFAULT if self.hp.eta is None else self.hp.eta)
        scalars = gradients.scalars(forget_loss=forget_loss, retain_loss=retain_loss, inner=reached)
        scalars |= {"gap": scalars["forget_loss"] - scalars["inner"], "weight": lam, "cosine": cosine}
        return g_r.addcmul_(g_f, lam), scalars

    def look_ahead(self, rows: Rows) -> torch.Tensor:
        """This rank's part of the mean forget loss over K inner steps, after which the weights are as they were."""
        if self.hp.inner_steps == 0:
            return torch.zeros((), dtype=torch.float64, device=self.params[0].device)
        kept = [p.detach().clone() for p in self.params]
        optimizer = self.optimizer if self.hp.inner_moments == "shared" else self.adam(self.params)
        losses = []
        for k in range(self.hp.inner_steps):
            loss = self.forget_loss(rows.reseeded(k + 1))
            gradients.assign(self.params, self.gradient(loss))
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            for p, before in zip(self.params, kept, strict=True):
                p.copy_(before)
        return torch.stack(losses).mean()

    def forget_loss(self, rows: Rows) -> torch.Tensor:
        """This rank's part of L_f."""
        model, t = self.model, timesteps(self.model, rows)
        x_t = model.add_noise(rows.x, model.noise(rows.seeds), t)
        if self.goal.kept and self.hp.target != "uniform":
            with torch.no_grad():
                teacher = model.predict(x_t, t, picked(model, rows, self.goal.asking(self.goal.kept, rows.x.device)))
            errors = model.predict(x_t, t, rows.cond) - teacher
        else:
            u = model.uniform(rows.seeds ^ 0x2545F4914F6CDD1D, x_t[0].numel()).view_as(x_t).to(x_t)
            errors = model.eps(x_t, t, rows.cond) - u
        return errors.square().flatten(1).mean(1).sum() / rows.total


def adaptive_weight(cosine: torch.Tensor, eta: float) -> torch.Tensor:
    """lam_B = max(eta - cos(g_r, g_f), 0), in [0, 1 + eta]."""
    return (eta - cosine).clamp(min=0)
