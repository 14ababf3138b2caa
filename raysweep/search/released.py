"""Reads and validates the tables of `search_spaces/released/`: hyperparameters as papers and released code state them.

A table has `paper`, `code` (name of a repository -> its address and commit), `settings` and `presets`. A setting is one way
in which the authors ran one method. It gives every hyperparameter of the method a value, so that nothing silently takes a
default:
    values: {lr: [1.0e-5, "configs/a.yml, optim.lr"]}                  the value, and where the source states it
            {guidance: {value: 2.0, plus: 1, at: "...", why: "..."}}   in other units; raysweep's is value * times + plus
            {beta2: [0.999, "not stated: PyTorch's default"]}          a default that the source relies on
    unused: {eta: "no effect with mode: fixed"}                        a hyperparameter that must not be set
    also: [{lam: [1.0, "figure 6"]}]                                   further points: only the values that differ
`presets` holds, by preset, what its source states of base model, data and sampler (dotted setting -> value).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import search_spaces
from raysweep.registry import resolve, suggest


class ReleasedError(ValueError):
    """A table of released values is wrong, or no setting has that name; the message says where and what would be valid."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stated(_Part):
    """One value as its source states it, in the source's units."""

    value: Any = Field(description="the value in the source's units")
    at: str = Field(
        min_length=1, description="where it is stated: file and key or line, or section or table of the paper"
    )
    times: float | None = Field(None, description="factor from the source's units to raysweep's; null: 1")
    plus: float | None = Field(None, description="added after the factor; null: 0")
    why: str = Field("", description="why the units differ, or another remark; required with `times` or `plus`")

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, data: Any) -> Any:
        return {"value": data[0], "at": data[1]} if isinstance(data, list) and len(data) == 2 else data

    @model_validator(mode="after")
    def _units_are_explained(self) -> Self:
        if (self.times is not None or self.plus is not None) and not self.why:
            raise ValueError("why: other units need a reason")
        return self

    @property
    def converted(self) -> Any:
        """The value in raysweep's units."""
        if self.times is None and self.plus is None:
            return self.value
        value = self.value * (1 if self.times is None else self.times) + (self.plus or 0)
        return int(value) if isinstance(self.value, int) and float(value).is_integer() else float(f"{value:.10g}")

    def __str__(self) -> str:
        units = "" if self.converted == self.value else f"{shown(self.value)} there; "
        return f"{units}{self.at}" + (f" ({self.why})" if self.why else "")


class Setting(_Part):
    """The hyperparameters with which the authors ran one method on one task."""

    title: str = Field(min_length=1, description="whose setting it is, and for which data")
    method: str = Field(description="name of the method in raysweep")
    values: dict[str, Stated] = Field(description="hyperparameter -> value")
    unused: dict[str, str] = Field(default_factory=dict, description="hyperparameter -> why it must not be set")
    also: tuple[dict[str, Stated], ...] = Field((), description="further points of the source: the values that differ")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        valid = resolve("method", self.method).Hyperparameters.model_fields
        mentioned = [*self.values, *self.unused]
        unknown = sorted({*mentioned, *(k for more in self.also for k in more)} - set(valid))
        if unknown:
            raise ValueError(f"{unknown[0]}: not a hyperparameter of {self.method}{suggest(unknown[0], sorted(valid))}")
        missing = sorted(set(valid) - set(mentioned))
        if missing:
            raise ValueError(f"{', '.join(missing)}: neither among values nor unused, so left to a default silently")
        if len(set(mentioned)) < len(mentioned):
            raise ValueError("a hyperparameter is among values and unused")
        return self

    def points(self) -> list[dict[str, Stated]]:
        """The values of each point, the main one first."""
        return [self.values, *(self.values | more for more in self.also)]


class Table(_Part):
    """The values that one paper and its code state."""

    paper: str
    code: dict[str, str] = Field(description="short name of a repository -> its address and the commit that was read")
    shared: Any = Field(None, description="values that several settings use through YAML anchors")
    settings: dict[str, Setting]
    presets: dict[str, dict[str, Stated]] = Field(default_factory=dict)


@cache
def table(name: str) -> Table:
    """A table by its file's stem. Raises ReleasedError for an invalid one, FileNotFoundError if there is none."""
    try:
        return Table.model_validate(search_spaces.released(name))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ReleasedError(f"search_spaces/released/{name}.yaml: {key}: {message}") from error


def setting(name: str) -> Setting:
    """The setting named `TABLE/SETTING`. Raises ReleasedError if there is none."""
    stem, _, key = str(name).partition("/")
    found = table(stem).settings.get(key) if stem in search_spaces.tables() else None
    if found is None:
        known = sorted(f"{t}/{key}" for t in search_spaces.tables() for key in table(t).settings)
        raise ReleasedError(f"{name!r} is not a released setting{suggest(str(name), known)}")
    return found


def converted(values: dict[str, Stated]) -> dict[str, Any]:
    """The values in raysweep's units."""
    return {name: stated.converted for name, stated in values.items()}


def shown(value: Any) -> str:
    """A value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
