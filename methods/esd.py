"""ESD: erased stable diffusion, by the model's own negative guidance.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, arXiv:2303.07345, and the released code.
    target  y = eps0(x_t, null) - eta * (eps0(x_t, c) - eps0(x_t, null)),   eps0 the frozen base model
    minimise  mean |eps_theta(x_t, c) - y|^2
No image is read: x_t is sampled under c with guidance up to a random point of a DDIM run, from the model being trained
(paper, first release) or from the frozen base (current release). The current release writes the target as
eps_c - eta' (eps_c - eps_null): eta' = eta + 1.

`timestep` is the t that the networks receive, see `methods.partial`.

On a rectified flow (gamma = 1 - sigma, output v = eps - x0) both sides are velocities. At a given x_t, eps = x_t + gamma v, so
    eps0(null) - eta (eps0(c) - eps0(null)) = x_t + gamma y,   y = v0(null) - eta (v0(c) - v0(null))
and the loss in eps is gamma^2 |v_theta(c) - y|^2. Without gamma^2 the first points of the run, where gamma is near 0 and the
picture is decided, weigh as much as the others.

`layers` are the weights that change: x is cross-attention (concepts tied to their name), x_strict its keys and values only,
u everything else (concepts that appear without being named; the current release leaves out its norms, the first one the
output and the time embedding), full is all. A class-conditional network has no cross-attention; there x is the class
embedding, the only point where the condition enters. In a transformer whose text and image tokens share one attention, x is
the attention's weights for text tokens, and x_strict those of their keys and values.
"""

from __future__ import annotations

import copy
import re
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Descent, Goal, Model, Scalars
from methods.partial import Sampled, partial_samples
from methods.rows import SEEDS, Batch, Draw


class ESDSettings(Sampled):
    """Settings of ESD."""

    lr: float = Field(1e-5, gt=0, description="learning rate (paper: 1e-5; current release: 5e-5)")
    steps: int = Field(1000, ge=0, description="optimiser steps (paper: 1000; current release: 200)")
    batch_size: int = Field(1, ge=1, description="rows per step (paper: 1)")
    eta: float = Field(1.0, gt=0, description="strength of the negative guidance (paper: 1)")
    layers: Literal["x", "x_strict", "u", "full"] = Field("full", description="weights that change")


class ESD(Descent):
    """Regresses the concept's prediction to negative guidance; arXiv:2303.07345."""

    name = "esd"
    source = "Gandikota et al., ICCV 2023, arXiv:2303.07345"
    needs = frozenset()
    kinds = frozenset({"class", "concept"})
    # two of the base, three of the model; and two per step of the DDIM run, half of it on average
    forwards_per_step = 5
    Hyperparameters = ESDSettings
    hp: ESDSettings

    def setup(self) -> None:
        super().setup()
        self.base = self.model.with_net(copy.deepcopy(self.model.net).requires_grad_(False).eval())

    @cached_property
    def moves(self) -> set[str]:
        """The names of the parameters that `layers` lets change."""
        return layer_names([n for n, _ in self.model.net.named_parameters()], self.hp.layers)

    @classmethod
    def unsuited(cls, hyperparameters: ESDSettings, model: Model, goal: Goal) -> list[str]:
        hp, length = hyperparameters, len(model.alphas)
        reasons = [] if model.unconditional(1) is not None else ["it needs a model with an unconditional branch"]
        named = dict(model.net.named_parameters())
        free = {n for n, p in named.items() if p.requires_grad}
        if not layer_names(list(named), hp.layers) & free:
            valid = [v for v in ("x", "x_strict", "u", "full") if layer_names(list(named), v) & free]
            reasons.append(
                f"layers: {hp.layers} names no weight of this model that may change; valid: {', '.join(valid)}"
            )
        if hp.sampler_steps > length:
            reasons.append(f"sampler_steps: {hp.sampler_steps} is more than the {length} steps of the schedule")
        return reasons

    def trains(self, name: str) -> bool:
        return name in self.moves

    def draws(self) -> dict[str, Draw]:
        return {"forget": Draw(self.hp.batch_size, split=SEEDS)}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        rows, model = batch["forget"], self.model
        with torch.no_grad():
            x_t, t = self.partial_samples(rows.seeds)
            cond, null = self.goal.forgotten(len(t), t.device), model.unconditional(len(t))
            y = target(prediction(self.base, x_t, t, cond), prediction(self.base, x_t, t, null), self.hp.eta)
        model.net.train()
        loss = (prediction(model, x_t, t, cond) - y).square().flatten(1).mean(1).sum() / rows.total
        return self.gradient(loss), gradients.scalars(loss=loss)

    def partial_samples(self, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, t): rows (n, C, H, W) sampled under the concept up to a random step of the run, and the t of `timestep`."""
        model = self.model if self.hp.sample_from == "trained" else self.base
        return partial_samples(model, self.goal.forgotten(len(seeds), self.params[0].device), seeds, self.hp)


def prediction(model: Model, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
    """What is regressed: the predicted noise, or the velocity of a flow."""
    return model.predict(x_t, t, cond) if model.prediction == "flow" else model.eps(x_t, t, cond)


def target(eps_cond: torch.Tensor, eps_uncond: torch.Tensor, eta: float) -> torch.Tensor:
    """eps_uncond - eta (eps_cond - eps_uncond), the new prediction under the concept; velocities alike."""
    return eps_uncond - eta * (eps_cond - eps_uncond)


def layer_names(names: list[str], layers: str) -> set[str]:
    """Those of the parameter names that the setting `layers` lets change."""
    joint = {n for n in names if re.search(r"\.attn\.(add_|to_add_|norm_added_)", n)}  # whose attn2 is of images alone
    cross = joint or {n for n in names if "attn2" in n}
    entry = cross or {n for n in names if "class_embedding" in n}
    if layers == "full":
        return set(names)
    if layers == "x_strict":
        return {n for n in cross if re.search(r"\.(to|add)_[kv](_proj)?\.", n)}
    return entry if layers == "x" else set(names) - entry
