"""The protocol of a method, and what methods see of models and data.

A method is built on a model (a duck-typed handle, see `Model`), asks for rows of the task's splits (`draws`), and
changes the model's network in place, one `step(batch)` at a time. It never touches the global random state: each row
carries a seed that decides its noise and its timestep. Each rank of a data-parallel group gets its share of one global
batch; whatever combines gradients non-linearly reduces each of them first (see `methods.gradients`), so that one and
several workers give the same weights.

`Method` covers them all: iterative methods (`Descent` adds the optimiser), edits in one step, several networks, and samplers
that train nothing. Dropout is a property of the network: it is active while a method trains, if the model's configuration
has it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from methods import gradients
from methods.rows import Batch, Draw, Rows

CHECK_EVERY = 20  # steps between two checks for finite numbers on a GPU, where each check waits for the device

Scalars = dict[str, torch.Tensor]


class Model(Protocol):
    """The parts of a diffusion model that methods use. Shapes: images (n, C, H, W) in [-1, 1], t and seeds (n,).

    `prediction` names what the network predicts: "epsilon", "v_prediction", "edm" (the preconditioned network's own output) or
    "flow" (the velocity eps - x0 of a rectified flow). `use_sampler` has the model sampled otherwise than usual, by a sampler that
    the handle knows ("one_step", "safe"), with these settings, plain data; both are saved with the weights.
    """

    net: Any
    alphas: torch.Tensor
    prediction: str
    null_label: int | None

    @property
    def shape(self) -> tuple[int, ...]: ...
    def with_net(self, net: Any) -> Model: ...
    def use_sampler(self, kind: str, **settings: Any) -> None: ...
    def unconditional(self, count: int) -> torch.Tensor | None: ...
    def noise(self, seeds: torch.Tensor) -> torch.Tensor: ...
    def uniform(self, seeds: torch.Tensor, columns: int) -> torch.Tensor: ...
    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def eps(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def x0(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor: ...
    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor: ...
    def x0_error_weight(self, t: torch.Tensor) -> torch.Tensor: ...
    def encode(self, x: torch.Tensor) -> torch.Tensor: ...
    def sample(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float, *, eta: float
    ) -> torch.Tensor: ...
    def trajectory(
        self, cond: torch.Tensor | None, seeds: torch.Tensor, steps: int, guidance: float
    ) -> Iterator[tuple[int, torch.Tensor]]: ...


class Attending(Model, Protocol):
    """A model that offers "cross-attention to prompts": layers `attn2` of its network project the embeddings of a prompt to keys
    (`to_k`) and values (`to_v`), without a bias.

    `attended` returns the embeddings of prompts (n, L) as these layers see them, (n, length, width), and the index (n,) of the
    last token of each prompt before its end; of the empty prompt that is the beginning, 0.
    """

    def attended(self, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Goal:
    """The aim of a task, without its images.

    forget_class, override_class: the class to forget, and the one that stands in for it; None where there is none.
    classes: the labels that the base model was trained on, or that prompts ask for, in order; empty where there are none.
    concept: what a text model must forget, as the tokens of a prompt. prompts: (class, tokens) of all prompts of the search;
    prompts of different classes that come from the same templates are in the same order.
    """

    kind: Literal["points", "class", "concept"]
    forget_class: int | None = None
    override_class: int | None = None
    classes: tuple[int, ...] = ()
    concept: tuple[int, ...] | None = None
    prompts: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def forgotten_class(self) -> int:
        """The class to forget, of a task that has one."""
        assert self.forget_class is not None
        return self.forget_class

    @property
    def override(self) -> int:
        """The class that stands in for the forgotten one, of a task that names one."""
        assert self.override_class is not None
        return self.override_class

    @property
    def kept(self) -> tuple[int, ...]:
        """The classes that stay."""
        return tuple(c for c in self.classes if c != self.forget_class)

    def conditions(self, classes: Sequence[int], device: torch.device) -> torch.Tensor:
        """All conditions that ask for one of `classes`: the labels (k,), or the tokens of their prompts (m, length)."""
        tokens = [p for c, p in self.prompts if c in classes]
        return torch.tensor(tokens if self.kind == "concept" else list(classes), device=device)

    def forgotten(self, count: int, device: torch.device) -> torch.Tensor:
        """The condition that asks for what must be forgotten: labels (count,), or tokens (count, length)."""
        if self.concept is not None:
            return torch.tensor(self.concept, device=device).expand(count, -1)
        return torch.full((count,), self.forgotten_class, device=device)


class Data(Protocol):
    """The parts of a task that `Method.prepare` may read: its goal, and rows."""

    @property
    def goal(self) -> Goal: ...
    def all_rows(self, split: str, seed: int) -> Rows: ...
    def batch(self, draws: dict[str, Draw], seed: int, step: int) -> Batch: ...


class Diverged(RuntimeError):
    """A value is not finite; the message says which, and at which step."""


class Hyperparameters(BaseModel):
    """Validated settings of a method; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(Hyperparameters):
    """Settings of every iterative method."""

    lr: float = Field(gt=0, description="learning rate of the optimiser")
    steps: int = Field(ge=0, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="rows per global batch and split")
    clip_norm: float | None = Field(None, gt=0, description="global L2 norm that the gradient is clipped to; null: off")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW); 0 is plain Adam")
    decays: Literal["all", "matrices"] = Field(
        "all", description="weights that decay; matrices: those of two dimensions and more (open_clip's rule)"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises linearly")
    floor: float = Field(1.0, ge=0, le=1, description="end of the rate's cosine decay, as a share of lr; 1: constant")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights that is the candidate; 0: off"
    )


class Method(ABC):
    """A way to unlearn. Subclasses set the class attributes and define `step`; what they compute or store once per candidate
    belongs in `setup`, so that all methods are built by the same call.

    Attributes of the class:
        needs: splits of the task that it reads; empty for a method that needs no data.
        model_kinds: the kinds of models that it works on: "diffusion", "contrastive" (which compare images with captions).
        abilities: its other requirements of a model: "safe sampling" (the handle's sampler steers away from a concept),
            "retraining" (a new model can be trained from scratch on the task's images), "cross-attention to prompts" (see
            `Attending`), "feed-forward layers" (transformer blocks whose `ff.net.2` is the second of two linear layers),
            "a trainable text encoder" (layers of `text_encoder` on the word embeddings `token_embedding`).
        kinds: the kinds of tasks that it can serve.
        forwards_per_step: cost of a step in forward passes of one batch, a backward pass counting as two.
        copies: numbers that a step holds at once per trained weight (weights, gradients, moments, and so on), besides the
            moving average of `Descent`.
        tape: number of forward passes of a batch whose activations it holds at once.
        prepared_by: hyperparameters that `prepare` reads; no other one changes the prepared tensors.
        quick: values of some of these with which `prepare` costs little; a dry run prepares with them.

    Args:
        model: the handle whose network is changed in place.
        hyperparameters: an instance of the class attribute `Hyperparameters`; kept as `hp`.
        prepared: the tensors that `prepare` returned for this model, task and `prepared_by`; {} if it prepares nothing.
        goal: the aim of the task; None for methods that only read data.

    Attributes: `names`, `params` and `start` are the parameters that may change and copies of their first values; `done` is
    the number of finished steps.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    model_kinds: ClassVar[frozenset[str]] = frozenset({"diffusion"})
    abilities: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[str]] = frozenset({"points", "class", "concept"})
    forwards_per_step: ClassVar[float]
    copies: ClassVar[float] = 6
    tape: ClassVar[float] = 1
    prepared_by: ClassVar[tuple[str, ...]] = ()
    quick: ClassVar[dict[str, Any]] = {}
    Hyperparameters: ClassVar[type[BaseModel]]

    def __init__(
        self,
        model: Model,
        hyperparameters: Any,
        prepared: dict[str, torch.Tensor] | None = None,
        goal: Goal | None = None,
    ):
        self.model, self.hp, self.prepared = model, hyperparameters, prepared or {}
        self.goal = goal or Goal("points")
        chosen = {n: p for n, p in model.net.named_parameters() if p.requires_grad and self.trains(n)}
        self.names, self.params = list(chosen), list(chosen.values())
        self.start = [p.detach().clone() for p in self.params]
        self.done = 0
        self.setup()

    def setup(self) -> None:  # noqa: B027
        """Builds what else the method keeps for this candidate (optimisers, masks, further networks); called once, at the end
        of `__init__`. An override calls `super().setup()` first."""

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: Any) -> dict[str, torch.Tensor]:
        """Tensors that depend on base model, task and `prepared_by` alone, shared by all trials; {} by default.

        Leaves the model as it is. Every rank runs it on all rows, so nothing is summed over ranks: see `gradients.local`.
        """
        return {}

    @classmethod
    def choices(cls, name: str, prepared: dict[str, torch.Tensor], hyperparameters: Any) -> list[Any]:
        """Values that a search may choose for hyperparameter `name`, where its space has `choice: from_model`."""
        raise ValueError(f"{cls.name} offers no choices for {name}")

    @classmethod
    def on_images(cls, hyperparameters: Any) -> bool:
        """Whether the method reads images even if the model's network takes latents."""
        return False

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        """Reasons why these settings cannot work on this model and goal, as sentences for people; [] if they can."""
        return []

    @property
    def steps(self) -> int:
        """Number of calls of `step`."""
        return int(self.hp.steps)

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name may change; all of them by default."""
        return True

    @abstractmethod
    def draws(self) -> dict[str, Draw]:
        """Requests for the rows of the next step, by name: the split ("forget", "retain", "train"), unless `Draw.split` names
        another."""

    @abstractmethod
    def step(self, batch: Batch) -> Scalars:
        """One step. Returns diagnostics; raises Diverged on a value that is not finite."""

    def watch(self, norm: torch.Tensor, scalars: Scalars) -> None:
        """Raises Diverged if the norm of a gradient is not finite; on a GPU once for every `CHECK_EVERY` steps."""
        self._norms = norm + getattr(self, "_norms", 0.0)
        if norm.device.type == "cpu" or self.done % CHECK_EVERY == 0:
            if not math.isfinite(self._norms):
                raise Diverged(f"step {self.done}: the gradient is not finite ({_describe(scalars)})")
            del self._norms

    def finish(self) -> dict[str, float]:
        """Completes the candidate and returns diagnostics: the L2 distance to the start, over all weights and per block.

        Raises Diverged on a weight that is not finite.
        """
        for name, p in self.model.net.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise Diverged(f"step {self.done}: the weights are not finite ({name})")
        squares: dict[str, float] = {}
        for name, p, p0 in zip(self.names, self.params, self.start, strict=True):
            block = name.split(".")[0]
            squares[block] = squares.get(block, 0.0) + float((p.detach() - p0).double().square().sum())
        distances = {f"distance/{block}": math.sqrt(total) for block, total in squares.items()}
        return {"distance": math.sqrt(sum(squares.values()))} | distances

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit (tensors and plain values only)."""
        return {"net": self.model.net.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.net.load_state_dict(state["net"])
        self.done = state["done"]


class Descent(Method):
    """An iterative method: one AdamW step along `direction` per step.

    With `ema` the candidate is the moving average of the weights, which starts at the base's.
    """

    Hyperparameters: ClassVar[type[BaseModel]] = Training
    hp: Training

    def setup(self) -> None:
        super().setup()
        self.optimizer = self.adam(self.params)
        self.average = [p.detach().clone() for p in self.params] if self.hp.ema else []
        self.buffers: dict[int, torch.Tensor] = {}  # flat gradients, by the number that `gradient` is given

    def adam(self, params: list[torch.Tensor]) -> torch.optim.AdamW:
        """A new optimiser with this method's settings."""
        hp = self.hp
        groups: list[dict[str, Any]] = [{"params": params}]
        if hp.decays == "matrices" and any(p.dim() < 2 for p in params):
            matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            groups, lr=hp.lr, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, weight_decay=hp.weight_decay, fused=True
        )

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of `lr`: linear warm-up, then a cosine decay down to `floor`."""
        hp = self.hp
        if step < hp.warmup:
            return (step + 1) / hp.warmup
        progress = (step - hp.warmup) / max(1, hp.steps - hp.warmup)
        return hp.floor + (1 - hp.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets an optimiser's learning rate to that of the next step."""
        for group in optimizer.param_groups:
            group["lr"] = self.hp.lr * self.rate(self.done)

    def ema_decay(self, step: int) -> float:
        """The decay of the moving average after a step."""
        return self.hp.ema

    def gradient(
        self, loss: torch.Tensor | Iterable[torch.Tensor], which: int = 0, keep_graph: bool = False
    ) -> torch.Tensor:
        """The flat gradient of the global loss, or of the sum of several losses (see `gradients.flat`).

        A method that needs several gradients at once numbers them with `which`: each number has its own memory, reused at
        every step. The vector may be changed in place.
        """
        if which not in self.buffers:
            self.buffers[which] = gradients.empty(self.params)
        return gradients.flat(loss, self.params, keep_graph, self.buffers[which])

    def draws(self) -> dict[str, Draw]:
        """By default `batch_size` rows of each split that the method needs."""
        return {split: Draw(self.hp.batch_size) for split in sorted(self.needs)}

    @abstractmethod
    def direction(self, batch: Batch) -> tuple[torch.Tensor, Scalars]:
        """The flat vector to descend along, equal on all ranks, and diagnostics. The caller may change the vector in place."""

    def constrain(self, flat: torch.Tensor) -> None:
        """Changes the clipped direction in place, for example by a mask; does nothing by default."""

    def step(self, batch: Batch) -> Scalars:
        """One optimiser step. Returns diagnostics; raises Diverged on a value that is not finite."""
        self.model.net.train()
        flat, scalars = self.direction(batch)
        norm = flat.norm()
        self.watch(norm, scalars)
        if self.hp.clip_norm is not None:
            gradients.clip(flat, norm, self.hp.clip_norm)
        self.constrain(flat)
        gradients.assign(self.params, flat)
        self.set_rate(self.optimizer)
        self.optimizer.step()
        if self.average:
            gradients.average(self.average, self.params, self.ema_decay(self.done))
        self.done += 1
        return scalars

    def finish(self) -> dict[str, float]:
        with torch.no_grad():
            for p, average in zip(self.params, self.average, strict=False):  # `average` is empty without `ema`
                p.copy_(average)
        return super().finish()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict(), "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [a.clone() for a in state["average"]]


def _describe(scalars: Scalars) -> str:
    return ", ".join(f"{name} {float(value):.3g}" for name, value in scalars.items())
