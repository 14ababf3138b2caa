"""ConceptPrune: the weights that a concept uses more than its stand-in are set to zero; nothing is trained.

Source: Chavhan et al., "ConceptPrune: Concept Editing in Diffusion Models via Skilled Neuron Pruning", ICLR 2025, arXiv:2405.19237,
and the released code. In every feed-forward network of the transformer blocks, let W (d, m) be the weight of the second linear layer.
At step t of sampling under prompts that ask for the concept (c*) and under the same prompts without it (c), with the same noise,
    A_t,j   = sqrt(sum of z_j^2) over all tokens z of the layer's input, each divided by its length     (m,)
    S_t     = |W| * A_t, column by column: the scores of Wanda (arXiv:2306.11695)                        (d, m)
    skilled at t: a weight with S_t(c*) > S_t(c) that is among the int(ratio m) largest S_t(c*) of its row
    pruned: a weight that is skilled at more than select * `timesteps` of the first `timesteps` steps; with select 0, their union
The first steps are those of the largest noise. Weights that are pruned become zero, all others stay as they are.

Both sets of prompts go through sampler runs with guidance; the activations that count are those of the conditional and of the
unconditional passes (`branches: both`, released; the latter differ between c* and c through x_t alone), or of the former. Wanda itself
does not divide by the length of the tokens (`tokens: raw`). c is the task's stand-in (`methods.pairing`), where the released prompts leave
the object or style out, or the empty prompt, as released for memorised images. The release can also prune the first layer, keys and
values of attention, or the text encoder, and mask each step of a sampler on its own; neither is implemented.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from methods.base import Data, Goal, Hyperparameters, Method, Model, Scalars
from methods.pairing import pairs, unpaired
from methods.rows import SEEDS, Batch, Draw

SECOND = ".ff.net.2"  # the end of the second layer's name in the libraries' transformer blocks
CHUNK = 16  # rows that are sampled at once


class ConceptPruneSettings(Hyperparameters):
    """Settings of ConceptPrune; defaults are the release's for a style."""

    ratio: float = Field(
        0.01, gt=0, le=1, description="share of each row's weights that can be skilled (released: 0.01)"
    )
    timesteps: int = Field(10, ge=1, description="first steps of the sampler that count (released: 10)")
    select: float = Field(
        0.0, ge=0, lt=1, description="share of these steps at more than which a pruned weight is skilled (released: 0)"
    )
    reference: Literal["override", "unconditional"] = Field(
        "override", description="what the concept is compared with: its stand-in, or the empty prompt"
    )
    tokens: Literal["unit", "raw"] = Field(
        "unit", description="activations of a token, divided by their length (released), or as they are"
    )
    branches: Literal["both", "conditional"] = Field(
        "both", description="passes of guided sampling whose activations count (released: both)"
    )
    noises: int = Field(1, ge=1, description="initial noises per prompt (released: 1)")
    sampler_steps: int = Field(50, ge=1, description="length of the sampler run (released: 50)")
    guidance: float = Field(7.5, ge=0, description="guidance of the sampler run (released: 7.5)")


class ConceptPrune(Method):
    """Prunes the second layers of feed-forward networks by Wanda's scores; arXiv:2405.19237."""

    name = "conceptprune"
    source = "Chavhan et al., ICLR 2025, arXiv:2405.19237"
    needs = frozenset()
    abilities = frozenset({"feed-forward layers"})
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 0  # the first steps of a few sampler runs in all, shared by every trial
    copies = 1.2  # the first values of the layers: 5 % of the weights of Stable Diffusion 1.4, 17 % of XL's
    tape = 0
    prepared_by = ("timesteps", "reference", "tokens", "branches", "noises", "sampler_steps", "guidance")
    quick = {"timesteps": 1, "noises": 1}
    Hyperparameters = ConceptPruneSettings
    hp: ConceptPruneSettings

    @classmethod
    @torch.no_grad()
    def prepare(
        cls, model: Model, task: Data, seed: int, hyperparameters: ConceptPruneSettings
    ) -> dict[str, torch.Tensor]:
        """`concept/NAME` and `reference/NAME`: A_t of the second layers, (timesteps, m), for c* and c."""
        hp, device = hyperparameters, next(model.net.parameters()).device
        concept, reference = compared(model, task.goal, hp, device)
        count = len(concept) * hp.noises
        seeds = task.batch({"noise": Draw(count, split=SEEDS)}, seed, 0)["noise"].seeds
        prompt = torch.arange(count) % len(concept)
        norms = {}
        for which, cond in (("concept", concept), ("reference", reference)):
            for name, a in activation_norms(model, cond[prompt], seeds, hp).items():
                norms[f"{which}/{name}"] = a
        return norms

    @classmethod
    def unsuited(cls, hyperparameters: ConceptPruneSettings, model: Model, goal: Goal) -> list[str]:
        hp, length = hyperparameters, len(model.alphas)
        reasons = unpaired(goal) if hp.reference == "override" else []
        if hp.reference == "unconditional" and model.unconditional(1) is None:
            reasons.append("reference: unconditional needs a model with an unconditional branch")
        widths = [m.weight.shape[1] for m in second_layers(model.net).values() if m.weight.requires_grad]
        if not widths:
            reasons.append("no second layer of a feed-forward network of this model may change (train.modules)")
        elif int(hp.ratio * max(widths)) == 0:
            reasons.append(f"ratio: {hp.ratio:g} of the {max(widths)} weights of a row is less than one")
        if hp.timesteps > hp.sampler_steps:
            reasons.append(f"timesteps: {hp.timesteps} is more than the {hp.sampler_steps} of sampler_steps")
        if hp.sampler_steps > length:
            reasons.append(f"sampler_steps: {hp.sampler_steps} is more than the {length} steps of the schedule")
        return reasons

    @property
    def steps(self) -> int:
        return 1

    def trains(self, name: str) -> bool:
        return name.endswith(f"{SECOND}.weight")

    def draws(self) -> dict[str, Draw]:
        return {}

    @torch.no_grad()
    def step(self, batch: Batch) -> Scalars:
        """Sets the weights to their base values, and the pruned ones to zero."""
        hp, pruned, total = self.hp, 0, 0
        for name, weight, start in zip(self.names, self.params, self.start, strict=True):
            concept, reference = (self.prepared[f"{which}/{name}"].to(start) for which in ("concept", "reference"))
            mask = pruned_weights(start, concept, reference, hp.ratio, hp.select)
            weight.copy_(start.masked_fill(mask, 0))
            pruned, total = pruned + int(mask.sum()), total + mask.numel()
        self.done += 1
        return {"pruned": torch.tensor(pruned / total, dtype=torch.float64)}


def compared(
    model: Model, goal: Goal, hp: ConceptPruneSettings, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(c*, c): the conditions under which activations are compared, equally many."""
    if hp.reference == "override":
        return pairs(goal, device)
    concept = goal.conditions([goal.forgotten_class], device)
    null = model.unconditional(len(concept))
    assert null is not None
    return concept, null.to(device)


def second_layers(net: Any) -> dict[str, nn.Linear]:
    """The second linear layers of the feed-forward networks in transformer blocks, by the name of their weight."""
    named = net.named_modules()
    return {f"{n}.weight": m for n, m in named if isinstance(m, nn.Linear) and n.endswith(SECOND)}


def activation_norms(
    model: Model, cond: torch.Tensor, seeds: torch.Tensor, hp: ConceptPruneSettings
) -> dict[str, torch.Tensor]:
    """A_t of each second layer, (timesteps, m), over sampler runs under `cond` from the noises of `seeds`."""
    first, training = next(model.net.parameters()), model.net.training
    with squared_inputs(model.net, hp) as sums:
        for start in range(0, len(seeds), CHUNK):
            part = slice(start, start + CHUNK)
            asked, null = cond[part], model.unconditional(len(cond[part]))
            run = model.trajectory(asked, seeds[part], hp.sampler_steps, hp.guidance)
            for step, (t, x) in zip(range(hp.timesteps), run, strict=False):
                sums.step = step
                for condition in (asked,) if hp.branches == "conditional" or null is None else (asked, null):
                    model.predict(x, torch.full((len(x),), t, device=first.device), condition)
                sums.step = None  # the sampler's own passes do not count
    model.net.train(training)
    return {name: total.sqrt().cpu() for name, total in sums.totals.items()}


class Sums:
    """Sums of squares, (timesteps, m), by name; `step` is the one that inputs are added to, None for none."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.totals: dict[str, torch.Tensor] = {}


@contextlib.contextmanager
def squared_inputs(net: Any, hp: ConceptPruneSettings) -> Iterator[Sums]:
    """Adds up the squares of the inputs (..., m) of every second layer while it lasts, over all but the last axis."""
    sums, hooks = Sums(), []
    for name, module in second_layers(net).items():
        sums.totals[name] = module.weight.new_zeros(hp.timesteps, module.in_features)

        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            if sums.step is not None:
                z = inputs[0].reshape(-1, inputs[0].shape[-1]).to(sums.totals[name])
                sums.totals[name][sums.step] += (F.normalize(z, dim=1) if hp.tokens == "unit" else z).square().sum(0)

        hooks.append(module.register_forward_pre_hook(add))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def skilled_weights(weight: torch.Tensor, concept: torch.Tensor, reference: torch.Tensor, ratio: float) -> torch.Tensor:
    """Whether each weight of W (d, m) is skilled at one step, bool (d, m), from A (m,) of concept and reference.

    Of equal scores in a row the earlier ones come first.
    """
    scores = weight.abs() * concept
    largest = scores.argsort(dim=1, descending=True, stable=True)[:, : int(ratio * weight.shape[1])]
    top = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, largest, True)
    return top & (scores > weight.abs() * reference)


def pruned_weights(
    weight: torch.Tensor, concept: torch.Tensor, reference: torch.Tensor, ratio: float, select: float
) -> torch.Tensor:
    """Whether each weight of W (d, m) is pruned, bool (d, m), from A of all steps, (timesteps, m)."""
    votes = torch.zeros_like(weight, dtype=torch.int)
    for a, b in zip(concept, reference, strict=True):
        votes += skilled_weights(weight, a, b, ratio)
    return votes > select * len(concept)
