"""Named tensors of a network: the editable ones, their depth, groups that change together, and the mean gradient of each.

The rules are those of the code released with SLUG (arXiv:2407.11867), except that a vision projection belongs to the vision
tower and that block 0 may be the deepest. The release has two sets of rules: its Hugging Face path (Stable Diffusion,
UnlearnCanvas, vision-language models) excludes the weights of norms, its open_clip path includes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
    params = [p for n, p in model.net.named_parameters() if n in set(names)]
    training, total, count = model.net.training, None, 0
    model.net.eval()
    for k in range(passes):
        rows = task.all_rows(split, seed + k).to(params[0].device, params[0].dtype)
        for start in range(0, len(rows.x), batch_size):
            part = rows.piece(slice(start, start + batch_size))
            n = len(part.x)
            g = gradients.local(n * loss(model, replace(part, total=n)), params)
            total, count = (g if total is None else total.add_(g)), count + n
    model.net.zero_grad()
    model.net.train(training)
    if total is None or not bool(torch.isfinite(total).all()):
        raise ValueError(f"the gradient on the {split} set is {'empty' if total is None else 'not finite'}")
    order = [n for n, _ in model.net.named_parameters() if n in set(names)]
    return {n: g.clone() for n, g in zip(order, gradients.split(params, total / count), strict=True)}
