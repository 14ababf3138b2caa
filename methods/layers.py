"""Named tensors of a network: the editable ones, their depth, groups that change together, and passes over a set of rows that
give the mean gradient of each, or its mean square.

The rules are those of the code released with SLUG (arXiv:2407.11867), except that a vision projection belongs to the vision
tower and that block 0 may be the deepest. The release has two sets of rules: its Hugging Face path (Stable Diffusion,
UnlearnCanvas, vision-language models) excludes the weights of norms, its open_clip path includes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from methods import gradients
from methods.base import Data, Model
from methods.losses import Contrastive, is_contrastive
from methods.rows import Rows

EXCLUDED = {
    "clip": ("bias", "logit_scale", "position", "embedding"),
    "diffusion": ("bias", "position", "time_embedding", "timestep_embedder"),
}
NORMS = ("norm", "ln_")  # in the libraries' names of layer, group and other norms


def eligible(model: Model | Contrastive, norms: bool = False) -> list[str]:
    """The names of the tensors that may be edited: matrices and kernels, and with `norms` the gains of norms."""
    excluded = EXCLUDED["clip" if is_contrastive(model) else "diffusion"]

    def fits(name: str, p: torch.Tensor) -> bool:
        return norms if any(part in name for part in NORMS) else p.dim() > 1

    named = {n: p for n, p in model.net.named_parameters() if p.requires_grad}
    return [n for n, p in named.items() if fits(n, p) and not any(part in n for part in excluded)]


def tower(name: str) -> str:
    """The part of the model that a tensor belongs to, "vision", "language", or "unet" (the denoising network, also where it is a
    transformer); each has its own Pareto front."""
    if re.match(
        r"transformer\.(?!resblocks)", name
    ):  # a name of open_clip's text tower begins with transformer.resblocks
        return "unet"
    if re.search(r"(^|\.)(visual|vision)", name):
        return "vision"
    return "language" if re.search(r"(^|\.)(text|transformer\.resblocks|token|ln_final)", name) else "unet"


def depth(name: str) -> tuple[int, int]:
    """Sort key of a tensor's block: down, middle and up blocks of a U-Net in order, then the block's number."""
    stage = 2 if "up_blocks" in name else 1 if "mid_block" in name else 0
    numbers = re.findall(r"\.(\d+)\.", name)
    return stage, int(numbers[0]) if numbers else 0


def group(name: str, names: list[str], unit: str) -> list[str]:
    """The tensors that change together, `name` first: for the unit "block" q, k and v, or both matrices of an MLP; for
    "tensor" the tensor alone."""
    blocks = (
        ("to_q", "to_k", "to_v"),
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("q_proj", "k_proj", "v_proj"),
        ("q", "k", "v"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
    )
    for parts in blocks if unit == "block" else ():
        for part in parts:
            if f".{part}." in name:
                others = [name.replace(f".{part}.", f".{other}.") for other in parts if other != part]
                return [name, *(other for other in others if other in names)]
    return [name]


def passes_over(model: Model | Contrastive, task: Data, passes: int, seed: int) -> tuple[int, int]:
    """How often to go through the forget and the retain set: `passes` draws of noise and timestep per forget row, and about as many
    rows of the retain set; once each for a contrastive model, whose losses draw nothing."""
    if is_contrastive(model):
        return 1, 1
    forget, retain = (len(task.all_rows(split, seed).x) for split in ("forget", "retain"))
    return passes, max(1, -(-passes * forget // max(1, retain)))


def batches(task: Data, split: str, batch_size: int, passes: int, seed: int, like: torch.Tensor) -> Iterator[Rows]:
    """All rows of a split in their order, in batches of at most `batch_size`, once for each of `passes`; on the device and in the
    dtype of `like`. Each batch is a global batch of its own."""
    for k in range(passes):
        rows = task.all_rows(split, seed + k).to(like.device, like.dtype)
        for start in range(0, len(rows.x), batch_size):
            part = rows.piece(slice(start, start + batch_size))
            yield replace(part, total=len(part.x))


def gradient_pass(
    model: Model | Contrastive,
    task: Data,
    split: str,
    loss: Callable[[Any, Rows], torch.Tensor],
    names: list[str],
    batch_size: int,
    passes: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The gradient of a loss at the current weights, as a mean over all rows of a split and over `passes`, by name.

    Leaves the model unchanged. Raises ValueError if the split has no rows or the gradient is not finite.
    """

    def mean(params: list[torch.Tensor], rows: Iterator[Rows]) -> torch.Tensor | None:
        total, count = None, 0
        for part in rows:
            g = gradients.local(part.total * loss(model, part), params)
            total, count = (g if total is None else total.add_(g)), count + part.total
        return None if total is None else total / count

    return _pass(model, task, split, mean, names, batch_size, passes, seed)


def square_pass(
    model: Model | Contrastive,
    task: Data,
    split: str,
    loss: Callable[[Any, Rows], torch.Tensor],
    names: list[str],
    batch_size: int,
    passes: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The elementwise square of the gradient of a batch's loss at the current weights, as a mean over batches, by name.

    Every batch counts the same, also a short last one. Leaves the model unchanged. Raises ValueError if the split has no rows or a
    gradient is not finite.
    """

    def mean(params: list[torch.Tensor], rows: Iterator[Rows]) -> torch.Tensor | None:
        return gradients.mean_squares((loss(model, part) for part in rows), params)

    return _pass(model, task, split, mean, names, batch_size, passes, seed)


def _pass(
    model: Model | Contrastive,
    task: Data,
    split: str,
    reduce: Callable[[list[torch.Tensor], Iterator[Rows]], torch.Tensor | None],
    names: list[str],
    batch_size: int,
    passes: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The flat vector that `reduce` makes of named parameters and batches (None: there are none), by name."""
    chosen = {n: p for n, p in model.net.named_parameters() if n in set(names)}
    params, training = list(chosen.values()), model.net.training
    model.net.eval()
    vector = reduce(params, batches(task, split, batch_size, passes, seed, params[0]))
    model.net.zero_grad()
    model.net.train(training)
    if vector is None or not bool(torch.isfinite(vector).all()):
        raise ValueError(f"the gradient on the {split} set is {'empty' if vector is None else 'not finite'}")
    return {n: g.clone() for n, g in zip(chosen, gradients.split(params, vector), strict=True)}
