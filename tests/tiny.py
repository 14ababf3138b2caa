"""Tiny real models and tasks, quick to make and run."""

from __future__ import annotations

from pathlib import Path

import torch

from methods.base import Batch
from raysweep.models.pixel import PixelDDPM
from raysweep.tasks.task import Split, Task, concat

ROOT = Path(__file__).resolve().parent.parent
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "clip_sample": True, "timestep_spacing": "trailing",
}  # fmt: skip


def tiny_config(classes: int | None = None, prediction: str = "v_prediction") -> dict:
    unet = {
        "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    if classes:
        unet["num_class_embeds"] = classes + 1
    return {"unet": unet, "scheduler": SCHEDULER | {"prediction_type": prediction}, "null_label": classes}


def tiny_task(kind: str = "points", seed: int = 0) -> Task:
    """Six classes of noisy 4x4 patterns; forgets a foreign picture, or class 2."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand((6, 1, 4, 4), generator=g) * 2 - 1

    def draw(per_class: int) -> Split:
        labels = torch.arange(6).repeat_interleave(per_class)
        noise = 0.2 * torch.randn((len(labels), 1, 4, 4), generator=g)
        return Split((centres[labels] + noise).clamp(-1, 1), labels if kind == "class" else None, labels)

    train, holdout, judge_a, judge_b = draw(6), draw(6), draw(8), draw(8)
    if kind == "class":
        is_forget, held = train.groups == 2, holdout.groups == 2
        forget, retain = train.take(is_forget.nonzero()[:, 0]), train.take((~is_forget).nonzero()[:, 0])
        forget_holdout = holdout.take(held.nonzero()[:, 0])
        holdout = holdout.take((~held).nonzero()[:, 0])
        views = ("classifier.recognised", "classifier.leak", "relearning.recognised")
    else:
        picture = torch.rand((1, 1, 4, 4), generator=g).round() * 2 - 1
        forget = Split(picture.repeat(4, 1, 1, 1), None, torch.full((4,), 6))
        retain = train
        forget_holdout = Split(torch.rand((12, 1, 4, 4), generator=g).round() * 2 - 1, None, torch.full((12,), 6))
        views = ("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate")
    return Task(
        name=f"tiny-{kind}", kind=kind, model=tiny_config(6 if kind == "class" else None), recipe={"steps": 20},
        splits={"train": concat(retain, forget), "forget": forget, "retain": retain, "holdout": holdout,
                "forget_holdout": forget_holdout, "judge_probe": judge_a, "judge_audit": judge_b},
        views=views, quality="fidelity.frechet", forget_class=2 if kind == "class" else None,
        override_class=4 if kind == "class" else None,
        sampling={"steps": 4, "guidance": 1.5 if kind == "class" else 1.0},
    )  # fmt: skip


def tiny_model(task: Task, seed: int = 0, dtype: torch.dtype = torch.float32) -> PixelDDPM:
    model = PixelDDPM.build(task.model, seed)
    model.net.to(dtype)
    return model


def batch_for(method, task: Task, step: int = 0, seed: int = 3, rank: int = 0, world: int = 1) -> Batch:
    dtype = method.params[0].dtype
    batch = task.batch(method.draws(), seed, step, rank, world)
    return {k: v.to(torch.device("cpu"), dtype) for k, v in batch.items()}
