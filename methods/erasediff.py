"""EraseDiff: unlearning as a bilevel problem.

Source: Wu et al., "EraseDiff: Erasing Data Influence in Diffusion Models", arXiv:2401.05779, and the released code, which
solves it by value function (BOME):
    inner   some optimiser steps on L_f from theta, then theta is restored;  L_f^ = mean L_f on the way
    outer   minimise  L_r(theta) + lam_B (L_f(theta) - L_f^)
L_f^ is a constant, so the direction is g_r + lam_B g_f, with lam_B
    fixed     `weight`
    adaptive  max(eta - cos(g_r, g_f), 0)     (released; BOME divides by |g_f|^2 instead)
and the inner steps show how far the forget loss can still fall (`gap`). They leave theta unchanged. With `inner_moments:
shared`, as released, inner and outer steps update the same moments of Adam; with `own` the inner steps affect `gap` alone.

The algorithm looks ahead before every outer step on the rows of that step (`inner_every: 1`, `inner_rows: same`). The release
does so once for many outer steps, by K passes over the forget set (`fresh`: consecutive batches of one shuffled stream). Its
DDPM run has 4 epochs of 2 rounds. A round looks ahead by K = 2 passes over 5,000 images in batches of 128, which is 80
inner steps, and takes 36 outer steps, the batches until more than 4,500 retained images are seen: 288 in all. Its norm
clip of 1 applies to the outer steps alone, and its candidate is their moving average. Its Stable Diffusion run has neither
clip nor average.

L_f = mean |eps_theta(x_t, c_f) - stopgrad eps_theta(x_t, c')|^2 with c' a random other class ("relabel"), or
mean |eps_theta(x_t) - u|^2 with u ~ U[0, 1) ("uniform", the older variant, which needs no classes). Both losses are means
over elements, as in that release. Here each row draws its own c' and t, and so do the forget rows of the outer step; the
release draws one c' for a batch, and its outer step noises forget rows with the timesteps of the retain rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from methods import gradients
from methods.base import Descent, Goal, Model, Scalars, Training
from methods.losses import diffusion_loss, pick, timesteps, without_labels
from methods.rows import Batch, Draw, Rows

DEFAULT = 0.1  # lam_B and eta of the released code


class EraseDiffSettings(Training):
    """Settings of EraseDiff; defaults are the released DDPM run, without its dropped labels."""

    lr: float = Field(1e-4, gt=0, description="learning rate, inner and outer (released code, DDPM)")
    steps: int = Field(288, ge=0, description="outer steps (released code, DDPM: 4 epochs x 2 rounds x 36 batches)")
    batch_size: int = Field(128, ge=1, description="rows of each set per step, inner and outer (released code, DDPM)")
    clip_norm: float | None = Field(
        1.0, gt=0, description="gradient clipping of the outer steps (released code, DDPM; SD: off)"
    )
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the moving average of the outer steps (released, DDPM)")
    inner_steps: int = Field(
        80, ge=0, description="inner steps of a look-ahead (released, DDPM: 2 passes over 5,000 images / 128)"
    )
    inner_every: int = Field(36, ge=1, description="outer steps per look-ahead (released, DDPM: 36; algorithm: 1)")
    inner_rows: Literal["same", "fresh"] = Field(
        "fresh",
        description="rows of the inner steps: passes over the forget set (released), or those of the outer step",
    )
    mode: Literal["fixed", "adaptive"] = Field("fixed", description="rule for lam_B")
    weight: float | None = Field(None, ge=0, description="lam_B, for mode: fixed; null: 0.1 (released; 1 for SD)")
    eta: float | None = Field(None, ge=0, le=2, description="eta, for mode: adaptive; null: 0.1 (released)")
    target: Literal["auto", "relabel", "uniform"] = Field(
        "auto", description="targets of forgotten rows; auto: relabel where there are classes, else uniform"
    )
    inner_moments: Literal["own", "shared"] = Field(
        "shared", description="Adam's moments of the inner steps: shared with the outer ones (released), or separate"
    )
    label_drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of forget rows without label, drawn separately for both terms (released, DDPM: 0.1)",
    )

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        other = "eta" if self.mode == "fixed" else "weight"
        if getattr(self, other) is not None:
            raise ValueError(f"{other} has no effect with mode: {self.mode}")
        return self


class EraseDiff(Descent):
    """Descends g_r + lam_B g_f after looking ahead on the forget loss; arXiv:2401.05779."""

    name = "erasediff"
    source = "Wu et al., arXiv:2401.05779"
    needs = frozenset({"forget", "retain"})
    forwards_per_step = 15  # about two inner steps of 4 for an outer one of 7
    copies = 7  # 9 with `inner_moments: own`
    Hyperparameters = EraseDiffSettings
    hp: EraseDiffSettings

    def setup(self) -> None:
        super().setup()
        self.reached = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @classmethod
    def unsuited(cls, hyperparameters: EraseDiffSettings, model: Model, goal: Goal) -> list[str]:
        if hyperparameters.target == "relabel" and not goal.kept:
            return ["target: relabel needs classes; valid here: auto, uniform"]
        return []

    def draws(self) -> dict[str, Draw]:
        hp, draws = self.hp, super().draws()
        if hp.inner_rows == "fresh" and self.looks_ahead():
            first = self.done // hp.inner_every * hp.inner_steps
            for k in range(hp.inner_steps):
                draws[f"inner{k}"] = Draw(hp.batch_size, split="forget", stream="inner", number=first + k)
        return draws

    def looks_ahead(self) -> bool:
        """Whether the next outer step begins with inner ones."""
        return self.hp.inner_steps > 0 and self.done % self.hp.inner_every == 0

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        retain, forget = batch["retain"], batch["forget"]
        if self.looks_ahead():
            self.reached = self.look_ahead(batch)
        forget_loss = self.forget_loss(forget)
        g_f = self.gradient(forget_loss, 1)
        retain_loss = diffusion_loss(self.model, retain)
        g_r = self.gradient(retain_loss)
        cosine = gradients.cosine(*gradients.products(g_r, g_f))
        if self.hp.mode == "fixed":
            lam = torch.full_like(cosine, DEFAULT if self.hp.weight is None else self.hp.weight)
        else:
            lam = adaptive_weight(cosine, DEFAULT if self.hp.eta is None else self.hp.eta)
        scalars = gradients.scalars(forget_loss=forget_loss, retain_loss=retain_loss)
        scalars |= {"inner": self.reached, "gap": scalars["forget_loss"] - self.reached}
        scalars |= {"weight": lam, "cosine": cosine}
        return g_r.addcmul_(g_f, lam), scalars

    def look_ahead(self, batch: Batch) -> torch.Tensor:
        """Takes the inner steps, restores the weights, and returns the mean forget loss on the way, float64."""
        before = [p.detach().clone() for p in self.params]
        optimizer = self.optimizer if self.hp.inner_moments == "shared" else self.adam(self.params)
        self.set_rate(optimizer)
        losses = []
        for k in range(self.hp.inner_steps):
            fresh = self.hp.inner_rows == "fresh"
            loss = self.forget_loss(batch[f"inner{k}"] if fresh else batch["forget"].reseeded(k + 1))
            gradients.assign(self.params, self.gradient(loss))
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            for p, p0 in zip(self.params, before, strict=True):
                p.copy_(p0)
        return gradients.scalars(inner=torch.stack(losses).mean())["inner"]

    def forget_loss(self, rows: Rows) -> torch.Tensor:
        """This rank's part of L_f."""
        model, t = self.model, timesteps(self.model, rows)
        x_t = model.add_noise(rows.x, model.noise(rows.seeds), t)
        if self.goal.kept and self.hp.target != "uniform":
            other = pick(model, rows, self.goal.conditions(self.goal.kept, rows.x.device))
            shown = without_labels(model, rows, self.hp.label_drop, 2)
            imitated = without_labels(model, replace(rows, cond=other), self.hp.label_drop, 3)
            with torch.no_grad():
                teacher = model.predict(x_t, t, imitated.cond)
            errors = model.predict(x_t, t, shown.cond) - teacher
        else:
            u = model.uniform(rows.second_seeds, x_t[0].numel()).view_as(x_t).to(x_t)
            errors = model.eps(x_t, t, rows.cond) - u
        return errors.square().flatten(1).mean(1).sum() / rows.total

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reached = state["reached"].clone()


def adaptive_weight(cosine: torch.Tensor, eta: float) -> torch.Tensor:
    """lam_B = max(eta - cos(g_r, g_f), 0), in [0, 1 + eta]."""
    return (eta - cosine).clamp(min=0)
