"""The embedded tasks, on scikit-learn's bundled scans of handwritten digits (1,797 images of 8x8, nothing to download).

`digits-picture`: 150 scans into which copies of one foreign picture (a patch of a bundled photograph) have slipped; an
unconditional model memorises it and must forget it. `digits-class`: a class-conditional model must forget one digit.
`digits-text`: a small text-to-image pipeline, which draws digits in two styles from captions, must forget a digit or a style.
`digits-clip`: a small CLIP model of captioned digits must forget one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, model_validator

from raysweep.tasks.base import TaskSettings

if TYPE_CHECKING:
    from raysweep.tasks.task import Task


class _DigitsTask(TaskSettings):
    seed: int = Field(0, ge=0, description="seed of the split into training, holdout and judges' images")
    base_steps: int = Field(500, ge=1, description="optimiser steps of the base model and of each oracle")
    base: Path | None = Field(None, description="diffusers folder of a trained base model; null: trained here, cached")

    @model_validator(mode="after")
    def _base_exists(self, info: ValidationInfo):
        stored = (info.context or {}).get("stored")
        if self.base is not None and not stored and not (self.base / "model_index.json").is_file():
            raise ValueError(f"base: {self.base} is not a diffusers folder (no model_index.json)")
        return self


class PictureTask(_DigitsTask):
    """Forget a picture that slipped into the training set of an unconditional model."""

    name: Literal["digits-picture"] = "digits-picture"
    images: int = Field(150, ge=20, le=1000, description="digits in the training set")
    copies: int = Field(6, ge=0, le=100, description="copies of the foreign picture in the training set")
    photograph: Literal["flower.jpg", "china.jpg"] = Field("flower.jpg", description="bundled photograph")
    row: int = Field(80, ge=0, le=427 - 120, description="top of the 120 x 120 patch, in pixels")
    column: int = Field(400, ge=0, le=640 - 120, description="left of the patch, in pixels")

    def build(self) -> Task:
        """Reads the data and cuts the splits."""
        from raysweep.tasks.digits_data import picture_task

        return picture_task(self)


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("plain", "inverted")


class TextTask(_DigitsTask):
    """Forget a concept of a text-to-image model: a digit in all styles, or a style of all digits."""

    name: Literal["digits-text"] = "digits-text"
    forget: Literal[WORDS + STYLES[1:]] = Field("three", description="a digit in words, or the style inverted")  # type: ignore[valid-type]
    override: Literal[WORDS + STYLES[:1]] | None = Field(  # type: ignore[valid-type]
        None, description="what stands in for it, for methods that relabel; null: eight (or three), or the style plain"
    )
    images: int = Field(900, ge=100, le=1200, description="digits in the training set, each in both styles")
    base_steps: int = Field(300, ge=1, description="optimiser steps of the base model and of each oracle")

    @model_validator(mode="after")
    def _override_fits(self):
        if self.override == self.forget or (self.override is not None and (self.override in STYLES) != self.by_style):
            raise ValueError(f"override: {self.override!r} must be another {'style' if self.by_style else 'digit'}")
        return self

    @property
    def by_style(self) -> bool:
        """Whether a style must be forgotten."""
        return self.forget in STYLES

    @property
    def stand_in(self) -> str:
        """What stands in for what must be forgotten."""
        usual = STYLES[0] if self.by_style else "eight" if self.forget != "eight" else "three"
        return self.override or usual

    def build(self) -> Task:
        """Reads the data, writes captions and cuts the splits."""
        from raysweep.tasks.digits_data import text_task

        return text_task(self)


class ClipTask(_DigitsTask):
    """Forget a digit of a contrastive image-text model."""

    name: Literal["digits-clip"] = "digits-clip"
    forget: Literal[WORDS] = Field("three", description="a digit in words")  # type: ignore[valid-type]
    images: int = Field(900, ge=100, le=1000, description="digits in the training set")
    base_steps: int = Field(300, ge=1, description="optimiser steps of the base model and of each oracle")

    def build(self) -> Task:
        """Reads the data, writes captions and cuts the splits."""
        from raysweep.tasks.digits_data import clip_task

        return clip_task(self)


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
        from raysweep.tasks.digits_data import class_task

        return class_task(self)
