"""Search spaces, checked: distributions over a method's hyperparameters, and the points that are tried first.

A YAML file has `method`, `fixed` (values of every trial), `space` (name -> one of the distributions below, optionally
with `when`), and `enqueue` (points with their `source`, and with the `kind` of task that they are for, if not for all). A method from another package has the same as its attribute `space`.
    {log: [a, b]}  {uniform: [a, b]}  {int: [a, b]}  {logint: [a, b]}  {choice: [x, y, ...]}
    {choice: from_model}   what the method offers for the prepared base model (SLUG's layers)
    when: {other: value}   the parameter exists only where `other` took `value`; `other` stands earlier in the file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import optuna
from pydantic import ValidationError

import search_spaces
from raysweep.registry import resolve, suggest

KINDS = ("log", "uniform", "int", "logint", "choice")
FROM_MODEL = "from_model"


class SpaceError(ValueError):
    """A search space is wrong; the message says where and what would be valid."""


@dataclass(frozen=True)
class Parameter:
    """One searched hyperparameter: a kind of distribution, its bounds or choices, and when it exists."""

    name: str
    kind: str
    values: tuple[Any, ...]
    when: dict[str, Any]

    def ask(self, trial: optuna.Trial, prefix: str) -> Any:
        """Suggests a value; the study knows the parameter as `prefix.name`."""
        key = f"{prefix}.{self.name}"
        if self.kind == "choice":
            return trial.suggest_categorical(key, list(self.values))
        low, high = self.values
        if self.kind in ("int", "logint"):
            return trial.suggest_int(key, low, high, log=self.kind == "logint")
        return trial.suggest_float(key, low, high, log=self.kind == "log")

    @property
    def open(self) -> bool:
        """Whether its choices are known only once the method has been prepared."""
        return self.values == (FROM_MODEL,)

    def contains(self, value: Any) -> bool:
        if self.open:
            return True
        return value in self.values if self.kind == "choice" else self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class Point:
    """Settings tried before any sampling, where they come from, and the kind of task that they are for (None: any)."""

    source: str
    values: dict[str, Any]
    kind: str | None = None


@dataclass(frozen=True)
class Space:
    """The space of one method."""

    method: str
    fixed: dict[str, Any]
    parameters: tuple[Parameter, ...]
    points: tuple[Point, ...]

    def ask(self, trial: optuna.Trial, point: dict[str, Any]) -> dict[str, Any]:
        """Hyperparameters of a trial: `point`'s where it has them, else suggested, on top of the fixed ones."""
        chosen = dict(self.fixed)
        for p in self.parameters:
            if all(chosen.get(k) == v for k, v in p.when.items()):
                chosen[p.name] = p.ask(trial, self.method)
        return chosen | point

    def resolved(self, choices: Callable[[str], list[Any]]) -> Space:
        """The space with the choices that the model offers filled in."""
        parameters = tuple(replace(p, values=tuple(choices(p.name))) if p.open else p for p in self.parameters)
        return replace(self, parameters=parameters)

    def variants(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Every combination of values that the hyperparameters `names` take in this space, where it sets them.

        Raises SpaceError for a range: each value of it would have to be prepared.
        """
        values: dict[str, list[Any]] = {k: [self.fixed[k]] for k in names if k in self.fixed}
        for p in self.parameters:
            if p.name in names and p.kind != "choice":
                raise SpaceError(
                    f"search_spaces/{self.method}.yaml.{p.name}: decides what is prepared, so it must be fixed or a choice"
                )
            if p.name in names:
                values[p.name] = list(p.values)
        keys = [k for k in names if k in values]
        found = [dict(zip(keys, combination, strict=True)) for combination in product(*(values[k] for k in keys))]
        for point in self.points:
            start = {k: values[k][0] for k in keys}
            mine = start | {k: v for k, v in point.values.items() if k in names}
            found += [] if mine in found else [mine]
        return found


def load(method: str, overrides: dict[str, Any] | None = None, kind: str | None = None) -> Space:
    """Reads the space of a method, with a sweep's overrides: a distribution, or a plain value that is then fixed; `enqueue`: the
    settings to be tried first, instead of the file's.

    `kind` leaves out the points that are for another kind of task.

    Raises:
        SpaceError: an unknown hyperparameter, an inverted range, or a value that the method refuses.
    """
    where = f"search_spaces/{method}.yaml"
    try:
        data = search_spaces.read(method)
    except FileNotFoundError as error:
        where, own = f"methods.{method}.space", getattr(resolve("method", method), "space", None)
        if own is None:
            raise SpaceError(f"search_spaces/{method}.yaml: missing: {method!r} has no search space") from error
        data = own
    fixed, space = dict(data.get("fixed") or {}), dict(data.get("space") or {})
    overrides = dict(overrides or {})
    enqueued = overrides.pop("enqueue", None)
    if enqueued is not None:
        if not isinstance(enqueued, list) or not all(isinstance(entry, dict) for entry in enqueued):
            raise SpaceError(f"spaces.{method}.enqueue: must be a list of settings, each with its source")
        data = data | {"enqueue": enqueued}
    for name, value in overrides.items():
        where = f"spaces.{method}"
        (space if isinstance(value, dict) else fixed)[name] = value
        (fixed if isinstance(value, dict) else space).pop(name, None)
    valid = sorted(resolve("method", method).Hyperparameters.model_fields)
    for name in (*fixed, *space):
        if name not in valid:
            raise SpaceError(f"{where}.{name}: not a hyperparameter of {method}{suggest(name, valid)}")
    parameters = tuple(_parameter(where, name, value) for name, value in space.items())
    points = []
    for entry in data.get("enqueue") or []:
        taken = () if enqueued is not None else overrides
        values = {k: v for k, v in entry.items() if k not in ("source", "kind") and k not in taken}
        if kind is None or entry.get("kind", kind) == kind:
            points.append(Point(entry.get("source", ""), values, entry.get("kind")))
    result = Space(method, fixed, parameters, tuple(points))
    _check(where, result)
    result.variants(getattr(resolve("method", method), "prepared_by", ()))
    return result


def _parameter(where: str, name: str, value: Any) -> Parameter:
    kinds = [k for k in value if k != "when"] if isinstance(value, dict) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise SpaceError(f"{where}.{name}: must be one of {', '.join(f'{{{k}: [...]}}' for k in KINDS)}, not {value!r}")
    kind, given = kinds[0], value[kinds[0]]
    if kind == "choice" and given == FROM_MODEL:
        given = [FROM_MODEL]
    if not isinstance(given, list) or not given:
        raise SpaceError(f"{where}.{name}: {kind} takes a list, not {given!r}")
    if kind != "choice":
        if len(given) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
            raise SpaceError(f"{where}.{name}: {kind} takes two numbers [low, high], not {given!r}")
        if not all(math.isfinite(v) for v in given):
            raise SpaceError(f"{where}.{name}: the ends of a range are finite numbers, not {given!r}")
        if given[0] > given[1]:
            raise SpaceError(f"{where}.{name}: the range is inverted: [{given[0]}, {given[1]}]")
        if kind.startswith("log") and given[0] <= 0:
            raise SpaceError(f"{where}.{name}: a logarithmic range starts above 0, not at {given[0]}")
        if kind.endswith("int") and not all(isinstance(v, int) for v in given):
            raise SpaceError(f"{where}.{name}: {kind} takes whole numbers, not {given!r}")
    return Parameter(name, kind, tuple(given), dict(value.get("when") or {}))


def _check(where: str, space: Space) -> None:
    """Has the method itself accept the ends of every range, every choice, and every enqueued point."""
    model = resolve("method", space.method).Hyperparameters
    start = {p.name: p.values[0] for p in space.parameters if not p.when and not p.open}
    for p in space.parameters:
        for value in () if p.open else p.values:
            conditions = dict(p.when.items())
            _accepts(model, f"{where}.{p.name}", space.fixed | start | conditions | {p.name: value}, p.name)
    by_name = {p.name: p for p in space.parameters}
    for point in space.points:
        place = f"{where}: enqueue ({point.source})"
        for name, value in point.values.items():
            if name in by_name and not by_name[name].contains(value):
                raise SpaceError(f"{place}: {name} = {value!r} is outside of the space")
        _accepts(model, place, space.fixed | start | point.values, None)


def _accepts(model: Any, place: str, values: dict[str, Any], only: str | None) -> None:
    try:
        model(**values)
    except ValidationError as error:
        for e in error.errors():
            if only is None or not e["loc"] or e["loc"][0] == only:
                name = ".".join(map(str, e["loc"]))
                shown = f"{name}: " if name and name != only else ""
                raise SpaceError(f"{place}: {shown}{e['msg'].removeprefix('Value error, ')}") from error
