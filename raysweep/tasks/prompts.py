"""Prompts of a concept task: from files, from a grid of slots, or from several of these.

Each prompt belongs to a class, which is a label of the task's images, and may have a label in a second domain, such as a style
besides an object. The columns of a file can be named (I2P: `prompt: prompt, label: categories`), or one class can be given to
all its prompts (`labelled: nude`). Published lists also state a seed and a guidance for each prompt, which the audit's check
`published` follows. A grid is a template with slots, as in the restricted-gradient paper (arXiv:2412.07808: moods x activities x
places x times); two grids are disjoint if the levels of a slot are.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from abc import ABC, abstractmethod
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator

from raysweep.storage.places import Place
from raysweep.storage.texts import TextError
from raysweep.tasks import textfiles
from raysweep.tasks.records import Name, SourceError, Tally, Unreadable, listed, plain
from raysweep.tasks.unions import by_key, tag

MOST_SEED = 2**63 - 1


class PromptRow(NamedTuple):
    """A prompt and its class. other: its label in a second domain. seed, guidance: those that its file states for it."""

    prompt: str
    label: str
    other: str | None = None
    seed: int | None = None
    guidance: float | None = None


class PromptError(ValueError):
    """A set of prompts is missing or unreadable; the message names it and says what would be valid."""


class _Prompts(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def rows(self, tally: Tally | None = None) -> list[PromptRow]:
        """The prompts in the order of the source, without repeats. The same prompt with another seed is no repeat.

        tally: counts what was left out. Raises PromptError for a file that is missing, unreadable, or has too many unusable rows.
        """

    @property
    def seeded(self) -> bool:
        """Whether prompts have seeds of their own."""
        return False


class PromptFile(_Prompts):
    """Prompts from a table with a header (CSV, TSV), JSON (objects, texts, or classes with their texts), JSON Lines, or text.

    A text file has one prompt per line; empty lines and lines that begin with # are ignored.
    """

    file: Place = Field(description="path of the file: .csv, .tsv, .json, .jsonl or .txt")
    format: textfiles.Format | None = Field(None, description="how to read the file; null: as its name ends")
    prompt: str = Field("prompt", description="column of the prompts")
    label: str = Field("label", description="column of the classes; unused with `labelled`")
    labelled: Name | None = Field(None, description="one class for all prompts, if no column has it")
    other: str | None = Field(None, description="column of labels in a second domain, such as style; null: none")
    filter: dict[str, str] = Field(
        default_factory=dict,
        description="column -> the value that a row must have in it, alone or in a list with commas; other rows are passed over",
    )
    seed: str | None = Field(
        None, description="column of seeds, with which the audit's check `published` draws each prompt once; null: none"
    )
    guidance: str | None = Field(
        None, description="column of the guidance with which `published` draws each prompt; null: the task's"
    )

    @model_validator(mode="after")
    def _guided_with_a_seed(self) -> Self:
        if self.guidance is not None and self.seed is None:
            raise ValueError(
                "guidance: needs `seed`, too: only prompts with their own seeds are drawn with their own guidance"
            )
        return self

    @property
    def seeded(self) -> bool:
        return self.seed is not None

    def __str__(self) -> str:
        return str(self.file)

    def rows(self, tally: Tally | None = None) -> list[PromptRow]:
        tally = Tally() if tally is None else tally
        rows: dict[PromptRow, None] = {}
        try:
            for location, row in textfiles.records(self.file, self.prompt, self.label, tally, self.format):
                tally.seen += 1
                try:
                    if not self._wanted(row):
                        tally.passed_over += 1
                        continue
                    new = self._row(row)
                except Unreadable as error:
                    tally.skip(str(error), location)
                    continue
                if new in rows:
                    tally.ignore("a prompt that is there already", location)
                rows[new] = None
            if tally.seen and tally.seen == tally.passed_over:
                wanted = ", ".join(f"{column}: {value}" for column, value in self.filter.items())
                raise SourceError(f"{self.file}: filter: no row has {wanted}")
            tally.check(self.file, "prompts")
        except (SourceError, TextError) as error:
            raise PromptError(str(error)) from error
        return list(rows)

    def _wanted(self, row: dict[str, Any]) -> bool:
        """Whether a row passes `filter`; raises Unreadable if it lacks a column of it."""
        return all(
            value in [part.strip() for part in str(_present(row, column)).split(",")]
            for column, value in self.filter.items()
        )

    def _row(self, row: dict[str, Any]) -> PromptRow:
        columns = (self.prompt, self.label if self.labelled is None else None, self.other)
        values: list[str] = []
        if None in row:
            raise Unreadable(
                "a row with more values than the header has columns (commas in a value need quotes around it)"
            )
        for column in columns:
            hint = "; `labelled` gives all prompts one class" if column == self.label else ""
            value = "" if column is None else _present(row, column, hint)
            if not isinstance(value, str | int) or (column == self.prompt and not isinstance(value, str)):
                raise Unreadable(f"a row whose {column!r} is no text")
            values.append(plain(str(value).strip()))
        prompt, label, other = values
        return PromptRow(
            prompt,
            self.labelled or label,
            None if self.other is None else other,
            None if self.seed is None else _seed_in(row, self.seed),
            None if self.guidance is None else _guidance_in(row, self.guidance),
        )


def _present(row: dict[str, Any], column: str, hint: str = "") -> Any:
    """The value of a column; raises Unreadable if the row has none, with the columns that it has, and `hint`."""
    value = row.get(column)
    if value is None or not str(value).strip():
        raise Unreadable(f"a row without {column!r} (it has: {listed(k for k in row if k)}{hint})")
    return value


def _seed_in(row: dict[str, Any], column: str) -> int:
    text = str(_present(row, column)).strip()
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > MOST_SEED:
        raise Unreadable(f"a row whose {column!r} is no seed, a whole number from 0 to 2^63 - 1")
    return int(text)


def _guidance_in(row: dict[str, Any], column: str) -> float:
    try:
        value = float(str(_present(row, column)))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise Unreadable(f"a row whose {column!r} is no guidance, a number from 0")
    return value


class PromptGrid(_Prompts):
    """A template and the levels of its slots; every combination is a prompt."""

    template: str = Field(description="text with slots in braces, for example: a {mood} painting of {subject}")
    slots: dict[str, tuple[str, ...]] = Field(description="slot -> its levels, the texts that fill it")
    label: str = Field(description="the slot whose level is the class")
    classes: dict[str, str] = Field(
        default_factory=dict, description="level -> class, for levels that are not the class"
    )
    other: str | None = Field(None, description="the slot whose level is the label in a second domain; null: none")

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
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

    def __str__(self) -> str:
        return repr(self.template)

    def rows(self, tally: Tally | None = None) -> list[PromptRow]:
        rows: dict[PromptRow, None] = {}
        for levels in itertools.product(*self.slots.values()):
            filled = dict(zip(self.slots, levels, strict=True))
            label = self.classes.get(filled[self.label], filled[self.label])
            other = None if self.other is None else plain(filled[self.other])
            rows[PromptRow(plain(self.template.format(**filled)), plain(label), other)] = None
        if tally is not None:
            tally.seen += len(rows)
        return list(rows)


PromptSet = Annotated[
    Annotated[PromptFile, Tag(tag("file"))] | Annotated[PromptGrid, Tag(tag("template"))], by_key("file", "template")
]


class PromptMix(_Prompts):
    """Several sets of prompts, such as a file for the forgotten class and a grid for the others."""

    mix: tuple[PromptSet, ...] = Field(min_length=1, description="files and grids, used one after the other")

    def __str__(self) -> str:
        return " and ".join(map(str, self.mix))

    @property
    def seeded(self) -> bool:
        return any(part.seeded for part in self.mix)

    def rows(self, tally: Tally | None = None) -> list[PromptRow]:
        return list(dict.fromkeys(row for part in self.mix for row in self._part(part, tally)))

    @staticmethod
    def _part(part: _Prompts, tally: Tally | None) -> list[PromptRow]:
        counts = Tally()  # of this part alone: it is refused if too many of its own rows are unusable
        rows = part.rows(counts)
        if tally is not None:
            tally.add(counts, f"{part}: ")
        return rows


Prompts = Annotated[
    Annotated[PromptFile, Tag(tag("file"))]
    | Annotated[PromptGrid, Tag(tag("template"))]
    | Annotated[PromptMix, Tag(tag("mix"))],
    by_key("file", "template", "mix"),
]
