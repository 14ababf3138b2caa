"""Prompts of a concept task: from JSON or CSV files, from a grid of slots, or from several of these.

Each prompt belongs to a class, what it asks for, which is one of the labels of the task's images; it may name a member of a
second domain, too, such as a style besides an object. Files may be those of others:
the columns are named (I2P: `prompt: prompt, label: categories`), or one class is said for all (`labelled: nude`). A grid is a template with slots, as in the restricted-gradient
paper (arXiv:2412.07808: moods x activities x places x times); two sets of prompts are disjoint if some slot's levels are.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import string
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator

from raysweep.tasks.kinds import by_key, tag


class PromptError(ValueError):
    """A set of prompts that is missing or unreadable; the message names it, and says what it should be."""


class _Prompts(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def rows(self) -> list[tuple[str, str, str | None]]:
        """(prompt, class, label of the second domain), in the order of the source, repeated ones once."""


class PromptFile(_Prompts):
    """A CSV file with a header, or a JSON list of objects."""

    file: Path = Field(description="path of the file; .csv, or .json")
    prompt: str = Field("prompt", description="column of prompts")
    label: str = Field("label", description="column of classes")
    labelled: str | None = Field(None, description="the class of all of them, where no column says it")
    other: str | None = Field(None, description="column of labels of a second domain")

    def rows(self) -> list[tuple[str, str, str | None]]:
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise PromptError(f"{self.file}: {error.strerror or error}") from error
        if self.file.suffix == ".csv":
            rows: Any = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            try:
                rows = json.loads(text)
            except json.JSONDecodeError as error:
                raise PromptError(f"{self.file}:{error.lineno}: not valid JSON: {error.msg}") from error
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            raise PromptError(
                f"{self.file}: must be a list of objects such as {{{self.prompt!r}: ..., {self.label!r}: ...}}"
            )
        found: dict[tuple[str, str, str | None], None] = {}
        label = self.label if self.labelled is None else None
        for number, row in enumerate(rows, 1):
            missing = [c for c in (self.prompt, label, self.other) if c is not None and not row.get(c)]
            if missing:
                there = ", ".join(k for k in row if k)
                raise PromptError(f"{self.file}: row {number} has no {missing[0]!r}; its columns: {there}")
            other = None if self.other is None else str(row[self.other]).strip()
            own = self.labelled or str(row[self.label]).strip()
            found[(str(row[self.prompt]).strip(), own, other)] = None
        return list(found)


class PromptGrid(_Prompts):
    """A template and the levels of its slots; every combination is a prompt."""

    template: str = Field(description="text with slots in braces, for example: a {mood} painting of {subject}")
    slots: dict[str, tuple[str, ...]] = Field(description="slot -> its levels")
    label: str = Field(description="the slot whose level is the class")
    classes: dict[str, str] = Field(
        default_factory=dict, description="level -> class, where it is not the level itself"
    )
    other: str | None = Field(None, description="the slot whose level is the label of a second domain")

    @model_validator(mode="after")
    def _slots_fit(self):
        named = {name for _, name, _, _ in string.Formatter().parse(self.template) if name}
        if named != set(self.slots):
            odd = sorted(named ^ set(self.slots))
            raise ValueError(f"template and slots differ in {', '.join(odd)}")
        for name in filter(None, (self.label, self.other)):
            if name not in self.slots:
                raise ValueError(f"{name!r} is not a slot; there are: {', '.join(self.slots)}")
        unknown = sorted(set(self.classes) - set(self.slots[self.label]))
        if unknown:
            raise ValueError(f"classes: {', '.join(unknown)}: not a level of {self.label!r}")
        if not all(self.slots.values()):
            raise ValueError("slots: a slot has no level")
        return self

    def rows(self) -> list[tuple[str, str, str | None]]:
        names = list(self.slots)
        found: dict[tuple[str, str, str | None], None] = {}
        for levels in itertools.product(*self.slots.values()):
            at = dict(zip(names, levels, strict=True))
            other = None if self.other is None else at[self.other]
            own = self.classes.get(at[self.label], at[self.label])
            found[(self.template.format(**at), own, other)] = None
        return list(found)


PromptSet = Annotated[
    Annotated[PromptFile, Tag(tag("file"))] | Annotated[PromptGrid, Tag(tag("template"))], by_key("file", "template")
]


class PromptMix(_Prompts):
    """Several sets of prompts, such as a file for the forgotten class and a grid for the others."""

    mix: tuple[PromptSet, ...] = Field(min_length=1, description="the sets")

    def rows(self) -> list[tuple[str, str, str | None]]:
        return list(dict.fromkeys(row for part in self.mix for row in part.rows()))


Prompts = Annotated[
    Annotated[PromptFile, Tag(tag("file"))]
    | Annotated[PromptGrid, Tag(tag("template"))]
    | Annotated[PromptMix, Tag(tag("mix"))],
    by_key("file", "template", "mix"),
]
