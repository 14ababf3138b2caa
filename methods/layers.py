"""Named tensors of a network: which may be edited, where they stand, which move together, and the mean gradient of each.

The rules are those of the code released with SLUG (arXiv:2407.11867), save that a vision projection belongs to the vision
tower and that block 0 may be the deepest. The release has two sets of them: its Hugging Face path (Stable Diffusion,
UnlearnCanvas, vision-language models) leaves out the weights of norms, and its open_clip path lets them compete.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from methods import gradients
from methods.base import Data, Model, Rows
from methods.losses import contrastive

EXCLUDED = {
    "clip": ("bias", "logit_scale", "position", "embedding"),
    "diffusion": ("bias", "position", "time_embedding"),
}
NORMS = ("norm", "ln_")  # the libraries' names of layer, group and other norms


def eligible(model: Model, norms: bool = False) -> list[str]:
    """The names of the tensors that may be edited: matrices and kernels, and with `norms` the gains of norms."""
    excluded = EXCLUDED["clip" if contrastive(model) else "diffusion"]

    def fits(name: str, p: torch.Tensor) -> bool:
        return norms if any(part in name for part in NORMS) else p.dim() > 1

    return [n for n, p in model.net.named_parameters()
            if p.requires_grad and fits(n, p) and not any(part in n for part in excluded)]  # fmt: skip


def tower(name: str) -> str:
    """Which front a tensor belongs to: "vision", "language", or "unet"."""
    if re.search(r"(^|\.)(visual|vision)", name):
        return "vision"
    return "language" if re.search(r"(^|\.)(text|transformer\.resblocks|token|ln_final)", name) else "unet"


def depth(name: str) -> tuple[int, int]:
    """The place of a tensor's block: down, middle and up blocks of a U-Net in order, or the block's number."""
    stage = 2 if "up_blocks" in name else 1 if "mid_block" in name else 0
    numbers = re.findall(r"\.(\d+)\.", name)
    return stage, int(numbers[0]) if numbers else 0


def group(name: str, names: list[str], how: str) -> list[str]:
    """The tensors that move together, `name` first: itself, or q, k and v, or both of an MLP."""
    families = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"))
    for family in families if how == "block" else ():
        for part in family:
            if f".{part}." in name:
                others = [name.replace(f".{part}.", f".{o}.") for o in family if o != part]
                return [name, *(o for o in others if o in names)]
    return [name]


def gradient_pass(
    model: Model, task: Data, split: str, loss: Any, names: list[str], batch_size: int, passes: int, seed: int
) -> dict[str, torch.Tensor]:
    """The mean over samples of a loss's gradient at the weights as they are, by name; nothing else is changed."""
    params = [p for n, p in model.net.named_parameters() if n in set(names)]
    training, total, count = model.net.training, None, 0
    model.net.eval()
    for k in range(passes):
        rows = task.all_rows(split, seed + k).to(params[0].device, params[0].dtype)
        for start in range(0, len(rows.x), batch_size):
            part = slice(start, start + batch_size)
            cond = None if rows.cond is None else rows.cond[part]
            n = len(rows.x[part])
            g = gradients.flat(n * loss(model, Rows(rows.x[part], cond, rows.seeds[part], n)), params)
            total, count = (g if total is None else total.add_(g)), count + n
    model.net.zero_grad()
    model.net.train(training)
    if total is None or not bool(torch.isfinite(total).all()):
        raise ValueError(f"the gradient on the {split} set is {'empty' if total is None else 'not finite'}")
    order = [n for n, _ in model.net.named_parameters() if n in set(names)]
    return {n: g.clone() for n, g in zip(order, gradients.split(params, total / count), strict=True)}
