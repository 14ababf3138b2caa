"""Concept Ablation: under the name of a concept, the network learns to predict what it predicts for an anchor.

Source: Kumari et al., "Ablating Concepts in Text-to-Image Diffusion Models", ICCV 2023, arXiv:2303.13516, and the released code.
    model-based  minimise  mean |predict(x_t, c*) - stopgrad predict(x_t, c)|^2
    noise-based  minimise  mean |predict(x_t, c*) - target(x, eps, t)|^2
    with `lam`   plus      lam * mean |predict(x_t, c) - target(x, eps, t)|^2,   on other images of the anchor
for images x that the base model generated for the anchor c, where c* asks for the concept to forget instead; no image of the task is
read. Both answers of the model-based loss are those of the network that is trained, as in the paper's implementation. The means are over
elements and rows, timesteps are uniform, and the paper's weights w_t are 1 as released. The anchor is the task's override class.
Prompts c* and c differ by the name alone (`methods.pairing`).

`layers` are the weights that change: the embeddings of the name's tokens that the anchor's prompts lack (`embedding`; in a
class-conditional network, the forgotten class's row of the class embedding), the keys and values of the cross-attention, all attention
(added by the release after publication), or the whole denoiser. With `embedding` the gradient of every other row is zero, before it is
clipped; weight decay still reaches these rows, as released. A class-conditional network has no cross-attention; there
`cross_attention` is the whole class embedding, the only point where the condition enters.

The released networks let no gradient pass through the keys and values of a prompt's first token (`first_token: constant`), which is
in none of the paper's equations. Not implemented: horizontal flips, the resizing of images with words for it in the prompt ("zoomed in"),
prompts written by a language model, and the search for prompts that make a memorised image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import nn

from methods import gradients
from methods.base import Data, Descent, Goal, Model, Scalars, Training
from methods.losses import diffusion_loss, pick
from methods.pairing import pairs, unpaired
from methods.relabelling import relabel_loss
from methods.rows import SEEDS, Batch, Draw, Rows

Layers = Literal["embedding", "cross_attention", "attention", "full"]


class ConceptAblationSettings(Training):
    """Settings of Concept Ablation; defaults are the release's for a style on CompVis, but `layers`."""

    lr: float = Field(1.6e-5, gt=0, description="learning rate (released: 2e-6 x 2 GPUs x 4 rows)")
    steps: int = Field(110, ge=0, description="optimiser steps (released: 110; diffusers 100)")
    batch_size: int = Field(8, ge=1, description="rows of each term (released: 2 GPUs x 4 rows)")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay (released: PyTorch's default)")
    target: Literal["model", "noise"] = Field(
        "model", description="the network's own answer for the anchor, or that of the diffusion loss"
    )
    lam: float = Field(
        0.0, ge=0, description="weight of the diffusion loss of the anchor (released: 0; with regularisation 0.2 or 1)"
    )
    layers: Layers = Field("full", description="weights that change (released: cross_attention)")
    first_token: Literal["trained", "constant"] = Field(
        "trained", description="whether gradients pass through its keys and values (released: constant)"
    )
    images: int = Field(1000, ge=1, description="generated images of the anchor (released: 1000)")
    sampler_steps: int = Field(200, ge=1, description="steps of these images (released: 200; diffusers 25)")
    sampler_eta: float = Field(
        1.0, ge=0, le=1, description="noise of each of these steps, as a share of DDPM's (released: 1)"
    )
    guidance: float = Field(6.0, ge=0, description="guidance of these images (released: 6)")


class ConceptAblation(Descent):
    """Regresses the concept's prediction to the anchor's; arXiv:2303.13516."""

    name = "concept_ablation"
    source = "Kumari et al., ICCV 2023, arXiv:2303.13516"
    needs = frozenset()
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 7  # 4 for the ablation, 3 for the diffusion loss
    copies = 5
    prepared_by = ("images", "sampler_steps", "sampler_eta", "guidance")
    quick = {"images": 2}
    Hyperparameters = ConceptAblationSettings
    hp: ConceptAblationSettings

    def setup(self) -> None:
        super().setup()
        first = self.params[0]
        self.x = self.prepared["x"].to(first)
        self.concept, self.anchor = pairs(self.goal, first.device)
        self.members = torch.arange(len(self.x), device=first.device)
        self.rows = named_rows(self.concept, self.anchor)

    @classmethod
    def prepare(
        cls, model: Model, task: Data, seed: int, hyperparameters: ConceptAblationSettings
    ) -> dict[str, torch.Tensor]:
        """`x`: images of the anchor as the network takes them, (images, ...); image i is of the i-th prompt, over and over."""
        hp = hyperparameters
        seeds = task.batch({"images": Draw(hp.images, split=SEEDS)}, seed, 0)["images"].seeds
        _, anchor = pairs(task.goal, torch.device("cpu"))
        cond = anchor[torch.arange(hp.images) % len(anchor)]
        images = model.sample(cond, seeds, hp.sampler_steps, hp.guidance, eta=hp.sampler_eta)
        return {"x": model.encode(images.to(model.noise(seeds[:1]))).cpu()}

    @classmethod
    def unsuited(cls, hyperparameters: ConceptAblationSettings, model: Model, goal: Goal) -> list[str]:
        hp, net, length = hyperparameters, model.net, len(model.alphas)
        reasons = unpaired(goal)
        free = {n for n, p in net.named_parameters() if p.requires_grad}
        if not layer_names(net, hp.layers) & free:
            valid = [v for v in get_args(Layers) if layer_names(net, v) & free]
            reasons.append(
                f"layers: {hp.layers} names no weight of this model that may change; valid: {', '.join(valid) or 'none'}"
            )
        elif hp.layers == "embedding" and not reasons and not len(named_rows(*pairs(goal, torch.device("cpu")))):
            reasons.append(
                "layers: embedding: the prompts of the forgotten class have no token that those of its stand-in lack"
            )
        if hp.first_token == "constant" and not prompt_projections(net):
            reasons.append("first_token: constant needs a network with cross-attention; use trained")
        if hp.sampler_steps > length:
            reasons.append(f"sampler_steps: {hp.sampler_steps} is more than the {length} steps of the schedule")
        return reasons

    @cached_property
    def moves(self) -> set[str]:
        """The names of the parameters that `layers` lets change."""
        return layer_names(self.model.net, self.hp.layers)

    def trains(self, name: str) -> bool:
        return name in self.moves

    def draws(self) -> dict[str, Draw]:
        terms = ("ablation", "anchor") if self.hp.lam else ("ablation",)
        return {term: Draw(self.hp.batch_size, split=SEEDS) for term in terms}

    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        losses: Scalars = {}

        def each() -> Iterator[torch.Tensor]:  # one graph at a time
            loss = self.ablation_loss(batch["ablation"])
            losses["ablation_loss"] = loss.detach()
            yield loss
            if self.hp.lam:
                rows, _, anchor = self.of_anchor(batch["anchor"])
                loss = diffusion_loss(self.model, replace(rows, cond=anchor))
                losses["anchor_loss"] = loss.detach()
                yield self.hp.lam * loss

        constant = self.hp.first_token == "constant"
        with first_token_constant(self.model.net) if constant else contextlib.nullcontext():
            flat = self.gradient(each())
        if self.hp.layers == "embedding":
            for piece in gradients.split(self.params, flat):
                kept = piece[self.rows].clone()
                piece.zero_()[self.rows] = kept
        return flat, gradients.scalars(**losses)

    def ablation_loss(self, rows: Rows) -> torch.Tensor:
        """This rank's part of the loss under the concept's name."""
        rows, concept, anchor = self.of_anchor(rows)
        rows = replace(rows, cond=concept)
        return relabel_loss(self.model, rows, anchor) if self.hp.target == "model" else diffusion_loss(self.model, rows)

    def of_anchor(self, rows: Rows) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """(rows with an image of the anchor each, c*, c); both conditions have the shape (n,) or (n, length)."""
        image = pick(self.model, rows, self.members)
        pair = image % len(self.anchor)
        return replace(rows, x=self.x[image]), self.concept[pair], self.anchor[pair]


def named_rows(concept: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """The rows of an embedding that ask for the concept and not for the anchor, (r,), in order: labels, or tokens."""
    used = torch.unique(concept)
    return used[~torch.isin(used, anchor)]


def layer_names(net: Any, layers: Layers) -> set[str]:
    """The names of the parameters that the setting `layers` lets change."""
    if layers == "embedding":
        tables = {n for n, module in net.named_modules() if isinstance(module, nn.Embedding)}
        return {f"{n}.weight" for n in tables if n.endswith(("token_embedding", "class_embedding"))}
    denoiser = {n for n, _ in net.named_parameters() if not n.startswith("text_encoder")}
    if layers == "full":
        return denoiser
    if layers == "cross_attention":
        prompts = {n for n in denoiser if "attn2.to_k." in n or "attn2.to_v." in n}
        return prompts or {n for n in denoiser if "class_embedding" in n}
    return {n for n in denoiser if any(part in n for part in (".to_q.", ".to_k.", ".to_v.", ".to_out."))}


def prompt_projections(net: Any) -> list[nn.Module]:
    """The modules that make keys and values (n, length, width) of the embedded tokens of prompts."""
    return [module for name, module in net.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


@contextlib.contextmanager
def first_token_constant(net: Any) -> Iterator[None]:
    """Makes the keys and values of each prompt's first token constants of the backward pass; values stay the same."""

    def cut(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)

    hooks = [module.register_forward_hook(cut) for module in prompt_projections(net)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
