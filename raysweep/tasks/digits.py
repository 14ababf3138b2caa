"""The embedded tasks, on scikit-learn's bundled scans of handwritten digits (1,797 images of 8x8, nothing to download).

`digits-picture`: 150 scans into which copies of one foreign picture (a patch of a bundled photograph) have slipped; an
unconditional model memorises it and must forget it. `digits-class`: a class-conditional model must forget one digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.datasets import load_digits, load_sample_image

from raysweep.tasks.task import Split, Task, concat

PHOTOGRAPHS = {"china.jpg": (427, 640), "flower.jpg": (427, 640)}
PATCH = 120

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


class _DigitsTask(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="seed of the split into training, holdout and judges' images")
    base_steps: int = Field(900, ge=1, description="optimiser steps of the base model and of each oracle")
    base: Path | None = Field(None, description="diffusers folder of a trained base model; null: trained here, cached")

    @model_validator(mode="after")
    def _base_exists(self):
        if self.base is not None and not (self.base / "model_index.json").is_file():
            raise ValueError(f"base: {self.base} is not a diffusers folder (no model_index.json)")
        return self


class PictureTask(_DigitsTask):
    """Forget a picture that slipped into the training set of an unconditional model."""

    name: Literal["digits-picture"] = "digits-picture"
    images: int = Field(150, ge=20, le=1000, description="digits in the training set")
    copies: int = Field(6, ge=0, le=100, description="copies of the foreign picture in the training set")
    photograph: Literal["flower.jpg", "china.jpg"] = Field("flower.jpg", description="bundled photograph")
    row: int = Field(80, ge=0, le=427 - PATCH, description="top of the 120 x 120 patch, in pixels")
    column: int = Field(400, ge=0, le=640 - PATCH, description="left of the patch, in pixels")

    def build(self) -> Task:
        """Reads the data and cuts the splits."""
        digits, labels = _digits()
        train, holdout, judge_a, judge_b = _stratified(labels, (self.images, 300), self.seed)
        picture = _patch(self.photograph, self.row, self.column)
        forget = _unlabelled(picture.repeat(self.copies, 1, 1, 1), torch.full((self.copies,), 10))
        retain = _unlabelled(digits[train], labels[train])
        return Task(
            name=self.name,
            kind="points",
            model={"unet": _UNET, "scheduler": _SCHEDULER, "null_label": None},
            recipe={"steps": self.base_steps},
            splits={
                "forget": forget,
                "retain": retain,
                "train": concat(retain, forget),
                "holdout": _unlabelled(digits[holdout], labels[holdout]),
                "forget_holdout": self._other_patches(),
                "judge_probe": _unlabelled(digits[judge_a], labels[judge_a]),
                "judge_audit": _unlabelled(digits[judge_b], labels[judge_b]),
            },
            views=("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate"),
            quality="fidelity.frechet",
            base=None if self.base is None else str(self.base),
        )

    def _other_patches(self) -> Split:
        """Patches of the same photographs on a grid, none overlapping the forgotten one: its matched holdout."""
        patches = []
        for name, (height, width) in PHOTOGRAPHS.items():
            for row in range(0, height - PATCH + 1, 50):
                for column in range(0, width - PATCH + 1, 50):
                    same = name == self.photograph
                    if not (same and abs(row - self.row) < PATCH and abs(column - self.column) < PATCH):
                        patches.append(_patch(name, row, column))
        return _unlabelled(torch.cat(patches), torch.full((len(patches),), 10)).distinct()


class ClassTask(_DigitsTask):
    """Forget one digit of a class-conditional model."""

    name: Literal["digits-class"] = "digits-class"
    forget: int = Field(3, description="the digit to forget")
    override: int = Field(8, description="the digit that stands in for it, for methods that relabel")
    images: int = Field(900, ge=100, le=1200, description="digits in the training set")

    @model_validator(mode="after")
    def _digits_exist(self):
        for key in ("forget", "override"):
            if getattr(self, key) not in range(10):
                raise ValueError(f"{key}: class {getattr(self, key)} is not in the data; valid: 0 to 9")
        if self.forget == self.override:
            raise ValueError(f"override: must differ from the forgotten class {self.forget}")
        return self

    def build(self) -> Task:
        """Reads the data and cuts the splits."""
        digits, labels = _digits()
        train, holdout, judge_a, judge_b = _stratified(labels, (self.images, 300), self.seed)

        def labelled(index: np.ndarray) -> Split:
            return Split(digits[index], labels[index], labels[index])

        is_forget = labels.numpy() == self.forget
        forget, retain = labelled(train[is_forget[train]]), labelled(train[~is_forget[train]])
        return Task(
            name=self.name,
            kind="class",
            model={"unet": _UNET | {"num_class_embeds": 11}, "scheduler": _SCHEDULER, "null_label": 10},
            recipe={"steps": self.base_steps},
            splits={
                "forget": forget,
                "retain": retain,
                "train": concat(retain, forget),
                "holdout": labelled(holdout[~is_forget[holdout]]),
                "forget_holdout": labelled(holdout[is_forget[holdout]]),
                "judge_probe": labelled(judge_a),
                "judge_audit": labelled(judge_b),
            },
            views=("classifier.recognised", "classifier.leak", "relearning.recognised"),
            quality="fidelity.frechet",
            sampling={"steps": 10, "guidance": 1.5},
            forget_class=self.forget,
            override_class=self.override,
            base=None if self.base is None else str(self.base),
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
