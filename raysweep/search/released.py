"""Reads and checks the tables of `search_spaces/released/`: the values that papers and released code state.

A table has `paper`, `code` (name of a repository -> its address and commit), `settings` and `presets`. A setting is one
way in which the authors ran one method; it gives a value to every hyperparameter of the method, so that nothing is left to a
default:
    values: {lr: [1.0e-5, "configs/a.yml, optim.lr"]}                  value, and where the source states it
            {guidance: {value: 2.0, plus: 1, at: "...", why: "..."}}   in other units: here it is value * times + plus
            {beta2: [0.999, "not stated: PyTorch's default"]}          a stated default
    unused: {eta: "no effect with mode: fixed"}                        a hyperparameter that must not be given
    also: [{lam: [1.0, "figure 6"]}]                                   further points: what differs in them
`presets` holds, for each preset, what its source states of the base model, the data and the sampler (dotted setting -> value).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import search_spaces
from raysweep.registry import resolve, suggest


class ReleasedError(ValueError):
    """A table of released values is wrong, or has no setting of a name; the message says where and what would be valid."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stated(_Part):
    """One value as its source has it, in the source's units."""

    value: Any = Field(description="what the source states")
    at: str = Field(min_length=1, description="where: file and key or line, or section or table of the paper")
    times: float | None = Field(None, description="factor between the source's units and those of raysweep")
    plus: float | None = Field(None, description="what is then added")
    why: str = Field("", description="why units differ, or what else a reader must know")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"value": data[0], "at": data[1]} if isinstance(data, list) and len(data) == 2 else data

    @model_validator(mode="after")
    def _explained(self):
        if (self.times is not None or self.plus is not None) and not self.why:
            raise ValueError("why: other units need a reason")
        return self

    @property
    def here(self) -> Any:
        """The value in the units of raysweep."""
        if self.times is None and self.plus is None:
            return self.value
        value = self.value * (1 if self.times is None else self.times) + (self.plus or 0)
        return int(value) if isinstance(self.value, int) and float(value).is_integer() else float(f"{value:.10g}")

    def __str__(self) -> str:
        units = "" if self.here == self.value else f"{shown(self.value)} there; "
        return f"{units}{self.at}" + (f" ({self.why})" if self.why else "")


class Setting(_Part):
    """The values with which the authors ran one method on one task."""

    title: str = Field(min_length=1, description="whose setting it is, and for what")
    method: str = Field(description="the method of raysweep")
    values: dict[str, Stated] = Field(description="hyperparameter -> value")
    unused: dict[str, str] = Field(default_factory=dict, description="hyperparameter -> why it must not be given")
    also: tuple[dict[str, Stated], ...] = Field((), description="further points that the source names")

    @model_validator(mode="after")
    def _whole(self):
        valid = resolve("method", self.method).Hyperparameters.model_fields
        told = [*self.values, *self.unused]
        unknown = sorted({*told, *(k for more in self.also for k in more)} - set(valid))
        if unknown:
            raise ValueError(f"{unknown[0]}: not a hyperparameter of {self.method}{suggest(unknown[0], sorted(valid))}")
        missing = sorted(set(valid) - set(told))
        if missing:
            raise ValueError(f"{', '.join(missing)}: neither among values nor unused, so left to a default silently")
        if len(set(told)) < len(told):
            raise ValueError("a hyperparameter is among values and unused")
        return self

    def points(self) -> list[dict[str, Stated]]:
        """The values of each point of this setting, the main one first."""
        return [self.values, *(self.values | more for more in self.also)]


class Table(_Part):
    """The values that one paper and its code state."""

    paper: str
    code: dict[str, str] = Field(description="short name -> address and commit of what was read")
    shared: Any = Field(None, description="values that settings share by YAML's anchors")
    settings: dict[str, Setting]
    presets: dict[str, dict[str, Stated]] = Field(default_factory=dict)


@lru_cache(maxsize=1)
def tables() -> dict[str, Table]:
    """Name of a file -> its table. Raises ReleasedError."""
    read = {}
    for name, data in search_spaces.released().items():
        try:
            read[name] = Table.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(p) for p in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise ReleasedError(f"search_spaces/released/{name}.yaml: {key}: {message}") from error
    return read


def setting(name: str) -> Setting:
    """The setting `table/name`. Raises ReleasedError if there is none."""
    known = {f"{table}/{key}": one for table, data in tables().items() for key, one in data.settings.items()}
    if name not in known:
        raise ReleasedError(f"{name!r} is not a released setting{suggest(str(name), sorted(known))}")
    return known[name]


def here(values: dict[str, Stated]) -> dict[str, Any]:
    """The values in the units of raysweep."""
    return {name: stated.here for name, stated in values.items()}


def shown(value: Any) -> str:
    """A value as people write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
