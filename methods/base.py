"""The protocol of a method, and what methods see of models and data.

A method is built on a model (a duck-typed handle, see `Model`), asks for rows of the task's splits (`draws`), and
changes the model's network in place, one optimiser step per `step(batch)`. It never touches the global random state:
each row carries a seed that decides its noise and its timestep. Each rank of a data-parallel group gets its share of
one global batch; whatever combines gradients non-linearly reduces each of them first (see `methods.gradients`), so that
one and several workers give the same weights.

Losses are means over rows and, unless a method says otherwise, means over the elements of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from methods import gradients


class Model(Protocol):
    """What a method needs of a diffusion model. Shapes: images (n, C, H, W) in [-1, 1], t and seeds (n,)."""

    net: Any
    alphas: torch.Tensor

    def noise(self, seeds: torch.Tensor) -> torch.Tensor: ...
    def uniform(self, seeds: torch.Tensor, columns: int) -> torch.Tensor: ...
    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor: ...


class Data(Protocol):
    """What `Method.prepare` needs of a task: the rows of a split, and the class to forget and its stand-in."""

    @property
    def forget_class(self) -> int | None: ...
    @property
    def override_class(self) -> int | None: ...
    def all_rows(self, split: str, seed: int) -> Rows: ...


@dataclass(frozen=True)
class Rows:
    """This rank's share of a global batch.

    x: (n, C, H, W) in [-1, 1]; cond: class labels (n,) or None; seeds: (n,) int64, one per row;
    total: rows of the global batch over all ranks, the denominator of every mean.
    """

    x: torch.Tensor
    cond: torch.Tensor | None
    seeds: torch.Tensor
    total: int

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """The same rows where the network lives; seeds stay on the CPU."""
        cond = None if self.cond is None else self.cond.to(device)
        return Rows(self.x.to(device, dtype), cond, self.seeds, self.total)


Batch = dict[str, Rows]


@dataclass(frozen=True)
class Draw:
    """A request for rows of a split at every step: `size` rows (None: all of it), balanced over its groups or not."""

    size: int | None
    balanced: bool = False
    per_group: int | None = None


class Diverged(RuntimeError):
    """A method met a value that is not finite; the message names it."""


class Hyperparameters(BaseModel):
    """Validated settings of a method; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(Hyperparameters):
    """Settings that every iterative method has."""

    lr: float = Field(gt=0, description="learning rate of the optimiser")
    steps: int = Field(ge=0, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="rows per global batch and split")
    clip_norm: float | None = Field(None, gt=0, description="global L2 norm that the gradient is clipped to; null: off")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW); 0 is plain Adam")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")


class Method(ABC):
    """One way to unlearn. Subclasses set the class attributes and say how one step changes the network.

    Args:
        model: the handle whose network is changed in place.
        hyperparameters: an instance of the class attribute `Hyperparameters`.
        prepared: what `prepare` returned for this model and task, {} where the method prepares nothing.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    families: ClassVar[frozenset[str]] = frozenset({"pixel-ddpm"})
    kinds: ClassVar[frozenset[str]] = frozenset({"points", "class"})
    forwards_per_step: ClassVar[float]
    Hyperparameters: ClassVar[type[Training]]

    def __init__(self, model: Model, hyperparameters: Training, prepared: dict[str, torch.Tensor] | None = None):
        self.model, self.hp, self.prepared = model, hyperparameters, prepared or {}
        self.params = [p for p in model.net.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=self.hp.lr,
            betas=(self.hp.beta1, self.hp.beta2),
            weight_decay=self.hp.weight_decay,
            fused=True,
        )
        self.done = 0

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int) -> dict[str, torch.Tensor]:
        """Tensors that depend on the base model and the task only, shared by all trials; {} by default."""
        return {}

    @abstractmethod
    def draws(self) -> dict[str, Draw]:
        """The rows that each step needs, by split ("forget", "retain", "train")."""

    @abstractmethod
    def direction(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """The flat vector to descend along, equal on all ranks, and diagnostics."""

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step. Returns diagnostics; raises Diverged on a value that is not finite."""
        self.model.net.train()
        flat, scalars = self.direction(batch)
        if not bool(torch.isfinite(flat).all()):
            raise Diverged(f"step {self.done}: the gradient is not finite ({_describe(scalars)})")
        gradients.assign(self.params, flat)
        if self.hp.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.hp.clip_norm)
        self.optimizer.step()
        self.done += 1
        return scalars

    def finish(self) -> dict[str, float]:
        """Completes the candidate and returns diagnostics: the distance to the start, over all weights and per block."""
        for name, p in self.model.net.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise Diverged(f"step {self.done}: the weights are not finite ({name})")
        squares: dict[str, float] = {}
        names = [name for name, p in self.model.net.named_parameters() if p.requires_grad]
        for name, p, p0 in zip(names, self.params, self.start, strict=True):
            block = name.split(".")[0]
            squares[block] = squares.get(block, 0.0) + float((p.detach() - p0).double().square().sum())
        distances = {f"distance/{block}": math.sqrt(total) for block, total in squares.items()}
        return {"distance": math.sqrt(sum(squares.values()))} | distances

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue bit for bit (tensors and plain values only)."""
        return {"net": self.model.net.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def timesteps(model: Model, rows: Rows, low: int = 0, high: int | None = None) -> torch.Tensor:
    """Uniform integer timesteps in [low, high), (n,); `high` defaults to the length of the schedule."""
    high = len(model.alphas) if high is None else high
    u = model.uniform(rows.seeds, 1)[:, 0]
    return (low + (u * (high - low)).long()).clamp(max=high - 1)


def squared_errors(model: Model, rows: Rows, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """(predict - target)^2 per element, in the model's own parameterisation, shape of rows.x."""
    output = model.predict(model.add_noise(rows.x, eps, t), t, rows.cond)
    return (output - model.target(rows.x, eps, t)).square()


def mean_loss(model: Model, rows: Rows) -> torch.Tensor:
    """This rank's part of the plain diffusion loss: mean over elements, sum over its rows, divided by the total."""
    errors = squared_errors(model, rows, timesteps(model, rows), model.noise(rows.seeds))
    return errors.flatten(1).mean(1).sum() / rows.total


def _describe(scalars: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in scalars.items())
