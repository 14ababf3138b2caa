"""The embedded tasks, on scikit-learn's bundled scans of handwritten digits (1,797 images of 8x8, nothing to download).

`digits-picture`: copies of one foreign picture (a patch of a bundled photograph) have slipped into 150 scans; an unconditional
model memorises it and must forget it. `digits-class`: a class-conditional model must forget one digit. `digits-text`: a small
text-to-image pipeline, which draws digits in two styles from captions, must forget a digit or a style. `digits-clip`: a small
CLIP model of captioned digits must forget one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from raysweep.tasks.base import OBJECTIVES, TaskSettings
from raysweep.tasks.digits_models import CLIP, SCHEDULER, STYLES, TEXT, UNET, WORDS

if TYPE_CHECKING:
    from raysweep.tasks.task import Task


class _DigitsTask(TaskSettings):
    seed: int = Field(0, ge=0, description="seed of the split into training, holdout and judges' images")
    base_steps: int = Field(500, ge=1, description="optimiser steps of the base model and of each oracle")
    base: Path | None = Field(
        None, description="diffusers folder of a trained base model; null: train one here and cache it"
    )

    @model_validator(mode="after")
    def _base_exists(self, info: ValidationInfo) -> Self:
        stored = (info.context or {}).get("stored")
        if self.base is not None and not stored and not (self.base / "model_index.json").is_file():
            raise ValueError(f"base: {self.base} is not a diffusers folder (no model_index.json)")
        return self

    @property
    def _base_folder(self) -> str | None:
        return None if self.base is None else str(self.base)


class PictureTask(_DigitsTask):
    """Forget a picture that slipped into the training set of an unconditional model."""

    name: Literal["digits-picture"] = "digits-picture"
    images: int = Field(150, ge=20, le=1000, description="number of scans in the training set")
    copies: int = Field(6, ge=0, le=100, description="copies of the foreign picture in the training set")
    photograph: Literal["flower.jpg", "china.jpg"] = Field(
        "flower.jpg", description="bundled photograph, a patch of which is the foreign picture"
    )
    row: int = Field(80, ge=0, le=427 - 120, description="top of the patch of 120 x 120 pixels, in pixels")
    column: int = Field(400, ge=0, le=640 - 120, description="left edge of the patch, in pixels")

    def build(self) -> Task:
        """Reads the data and cuts the splits."""
        from raysweep.tasks.digits_data import picture_splits
        from raysweep.tasks.task import Task

        return Task(
            name=self.name,
            kind="points",
            model={"unet": UNET, "scheduler": SCHEDULER, "null_label": None},
            recipe={"steps": self.base_steps},
            splits=picture_splits(self.photograph, self.row, self.column, self.images, self.copies, self.seed),
            **vars(OBJECTIVES["points"]),
            base=self._base_folder,
            sensitive=False,
        )


class TextTask(_DigitsTask):
    """Forget a concept of a text-to-image model: a digit in all styles, or a style of all digits."""

    name: Literal["digits-text"] = "digits-text"
    forget: Literal[WORDS + STYLES[1:]] = Field("three", description="a digit in words, or the style inverted")  # type: ignore[valid-type]
    override: Literal[WORDS + STYLES[:1]] | None = Field(  # type: ignore[valid-type]
        None,
        description="the concept that replaces it, for methods that relabel: a digit, or the style plain; null: eight (three if "
        "eight is forgotten), or plain",
    )
    images: int = Field(900, ge=100, le=1200, description="number of scans in the training set, each in both styles")
    base_steps: int = Field(300, ge=1, description="optimiser steps of the base model and of each oracle")

    @model_validator(mode="after")
    def _override_fits(self) -> Self:
        if self.override == self.forget or (self.override is not None and (self.override in STYLES) != self.by_style):
            raise ValueError(f"override: {self.override!r} must be another {'style' if self.by_style else 'digit'}")
        return self

    @property
    def by_style(self) -> bool:
        """Whether a style must be forgotten."""
        return self.forget in STYLES

    @property
    def stand_in(self) -> str:
        """The concept that replaces the forgotten one."""
        usual = STYLES[0] if self.by_style else "eight" if self.forget != "eight" else "three"
        return self.override or usual

    def build(self) -> Task:
        """Reads the data, writes captions and cuts the splits."""
        from raysweep.tasks.digits_data import text_splits
        from raysweep.tasks.task import Task

        names = STYLES if self.by_style else WORDS
        forget_class = names.index(self.forget)
        splits, prompts = text_splits(forget_class, self.by_style, self.images, self.seed)
        return Task(
            name=self.name,
            kind="concept",
            model=TEXT,
            recipe={"steps": self.base_steps, "batch_size": 48, "ema": 0.98},
            splits=splits | {name: split for name, (split, _) in prompts.items()},
            **vars(OBJECTIVES["class"]),
            sampling={"steps": 8, "guidance": 3.0},
            forget_class=forget_class,
            override_class=names.index(self.stand_in),
            base=self._base_folder,
            sensitive=False,
            family="text-ddpm",
            class_names=tuple(f"{name} digit" if self.by_style else f"digit {name}" for name in names),
            texts={name: texts for name, (_, texts) in prompts.items()},
        )


class ClipTask(_DigitsTask):
    """Forget a digit of a contrastive image-text model."""

    name: Literal["digits-clip"] = "digits-clip"
    forget: Literal[WORDS] = Field("three", description="the digit to forget, in words")  # type: ignore[valid-type]
    images: int = Field(900, ge=100, le=1000, description="number of scans in the training set")
    base_steps: int = Field(300, ge=1, description="optimiser steps of the base model and of each oracle")

    def build(self) -> Task:
        """Reads the data, writes captions and cuts the splits."""
        from raysweep.tasks.digits_data import clip_splits
        from raysweep.tasks.task import Task

        forget_class = WORDS.index(self.forget)
        splits, prompts = clip_splits(forget_class, self.images, self.seed)
        return Task(
            name=self.name,
            kind="concept",
            model=CLIP,
            recipe={"steps": self.base_steps, "batch_size": 128, "lr": 2e-3, "weight_decay": 0.05},
            splits=splits | {name: split for name, (split, _) in prompts.items()},
            **vars(OBJECTIVES["contrastive"]),
            sampling={},
            forget_class=forget_class,
            base=self._base_folder,
            sensitive=False,
            family="clip",
            class_names=tuple(f"digit {word}" for word in WORDS),
            texts={name: texts for name, (_, texts) in prompts.items()},
        )


class ClassTask(_DigitsTask):
    """Forget one digit of a class-conditional model."""

    name: Literal["digits-class"] = "digits-class"
    forget: int = Field(3, description="the digit to forget, 0 to 9")
    override: int = Field(8, description="the digit that replaces it, 0 to 9, for methods that relabel")
    images: int = Field(900, ge=100, le=1200, description="number of scans in the training set")

    @model_validator(mode="after")
    def _digits_exist(self) -> Self:
        for key in ("forget", "override"):
            if getattr(self, key) not in range(10):
                raise ValueError(f"{key}: class {getattr(self, key)} is not in the data; valid: 0 to 9")
        if self.forget == self.override:
            raise ValueError(f"override: must differ from the forgotten class {self.forget}")
        return self

    def build(self) -> Task:
        """Reads the data and cuts the splits."""
        from raysweep.tasks.digits_data import class_splits
        from raysweep.tasks.task import Task

        return Task(
            name=self.name,
            kind="class",
            model={"unet": UNET | {"num_class_embeds": 11}, "scheduler": SCHEDULER, "null_label": 10},
            recipe={"steps": self.base_steps},
            splits=class_splits(self.forget, self.images, self.seed),
            **vars(OBJECTIVES["class"]),
            sampling={"steps": 10, "guidance": 1.5},
            forget_class=self.forget,
            override_class=self.override,
            base=self._base_folder,
            sensitive=False,
            class_names=tuple(f"handwritten {word}" for word in WORDS),
        )
