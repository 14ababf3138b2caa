"""Reads scikit-learn's bundled scans and photographs, and cuts them into the splits of the embedded tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from raysweep.tasks.task import Split, Task, concat

if TYPE_CHECKING:
    from raysweep.tasks.digits import ClassTask, PictureTask

PHOTOGRAPHS = {"china.jpg": (427, 640), "flower.jpg": (427, 640)}
PATCH = 120
HOLDOUT = 300
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}


def picture_task(config: PictureTask) -> Task:
    """Digits, and copies of a patch of a photograph that must be forgotten."""
    digits, labels = _digits()
    train, holdout, judge_a, judge_b = _stratified(labels, (config.images, HOLDOUT), config.seed)
    picture = _patch(config.photograph, config.row, config.column)
    forget = _unlabelled(picture.repeat(config.copies, 1, 1, 1), torch.full((config.copies,), 10))
    retain = _unlabelled(digits[train], labels[train])
    return Task(
        name=config.name,
        kind="points",
        model={"unet": _UNET, "scheduler": _SCHEDULER, "null_label": None},
        recipe={"steps": config.base_steps},
        splits={
            "forget": forget,
            "retain": retain,
            "train": concat(retain, forget),
            "holdout": _unlabelled(digits[holdout], labels[holdout]),
            "forget_holdout": _other_patches(config),
            "judge_probe": _unlabelled(digits[judge_a], labels[judge_a]),
            "judge_audit": _unlabelled(digits[judge_b], labels[judge_b]),
        },
        views=("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate"),
        quality="fidelity.frechet",
        base=None if config.base is None else str(config.base),
        sensitive=False,
    )


def _other_patches(config: PictureTask) -> Split:
    """Patches of the same photographs on a grid, none overlapping the forgotten one: its matched holdout."""
    patches = []
    for name, (height, width) in PHOTOGRAPHS.items():
        for row in range(0, height - PATCH + 1, 50):
            for column in range(0, width - PATCH + 1, 50):
                same = name == config.photograph
                if not (same and abs(row - config.row) < PATCH and abs(column - config.column) < PATCH):
                    patches.append(_patch(name, row, column))
    return _unlabelled(torch.cat(patches), torch.full((len(patches),), 10)).distinct()


def class_task(config: ClassTask) -> Task:
    """Labelled digits, one of which must be forgotten."""
    digits, labels = _digits()
    train, holdout, judge_a, judge_b = _stratified(labels, (config.images, HOLDOUT), config.seed)

    def labelled(index: np.ndarray) -> Split:
        return Split(digits[index], labels[index], labels[index])

    is_forget = labels.numpy() == config.forget
    forget, retain = labelled(train[is_forget[train]]), labelled(train[~is_forget[train]])
    return Task(
        name=config.name,
        kind="class",
        model={"unet": _UNET | {"num_class_embeds": 11}, "scheduler": _SCHEDULER, "null_label": 10},
        recipe={"steps": config.base_steps},
        splits={
            "forget": forget,
            "retain": retain,
            "train": concat(retain, forget),
            "holdout": labelled(holdout[~is_forget[holdout]]),
            "forget_holdout": labelled(holdout[is_forget[holdout]]),
            "judge_probe": labelled(judge_a),
            "judge_audit": labelled(judge_b),
        },
        views=("classifier.recognised", "classifier.leak", "relearning.presence"),
        quality="fidelity.frechet",
        sampling={"steps": 10, "guidance": 1.5},
        forget_class=config.forget,
        override_class=config.override,
        base=None if config.base is None else str(config.base),
        sensitive=False,
        class_names=tuple(f"handwritten {word}" for word in WORDS),
    )


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All scans (1797, 1, 8, 8) in [-1, 1] and their labels."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 8 - 1
    return x, torch.from_numpy(data.target.astype(np.int64))


def _stratified(labels: torch.Tensor, sizes: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Index sets (train, holdout, judge A, judge B): the first two of the given sizes, the judges' halves disjoint.

    Judges learn from all images that are not held out, one from each half, so each sees a part of the training set.
    """
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    by_class = [shuffled[labels.numpy()[shuffled] == digit] for digit in range(10)]
    place = np.empty(len(labels), dtype=np.int64)  # an image's place within its class
    for members in by_class:
        place[members] = np.arange(len(members))
    order = np.lexsort((labels.numpy(), place))
    train, holdout = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
    rest = np.setdiff1d(order, holdout)
    halves = [rest[place[rest] % 2 == parity] for parity in (0, 1)]
    return [np.sort(train), np.sort(holdout), *halves]


def _patch(photograph: str, row: int, column: int) -> torch.Tensor:
    """A 120 x 120 patch, grey, area-resized to 8 x 8 and stretched to [-1, 1], (1, 1, 8, 8)."""
    grey = Image.fromarray(load_sample_image(photograph)).convert("L")
    small = grey.crop((column, row, column + PATCH, row + PATCH)).resize((8, 8), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    low, high = pixels.min(), pixels.max()
    return torch.from_numpy(2 * (pixels - low) / max(high - low, 1) - 1).view(1, 1, 8, 8)


def _unlabelled(x: torch.Tensor, groups: torch.Tensor) -> Split:
    return Split(x, None, groups)
