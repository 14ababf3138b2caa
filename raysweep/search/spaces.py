"""Search spaces, checked: distributions over a method's hyperparameters, and the points that are tried first.

A YAML file has `method`, `fixed` (values of every trial), `space` (name -> one of the distributions below, optionally
with `when`), and `enqueue` (points with their `source`, and with the `kind` of task that they are for, if not for all). A method from another package has the same as its attribute `space`.
    {log: [a, b]}  {uniform: [a, b]}  {int: [a, b]}  {logint: [a, b]}  {choice: [x, y, ...]}
    {choice: from_model}   what the method offers for the prepared base model (SLUG's layers)
    when: {other: value}   the parameter exists only where `other` took `value`; `other` stands earlier in the file

These files are for the embedded models. A sweep's own space (`spaces.METHOD`) changes them, unless it says `released`:
    released: sfd/cifar10  every value is that of a released setting (see `raysweep.search.released`), which is the first point; what
                           stands beside it is searched or set instead
    released: null         no setting was released: the method's defaults, and what stands beside it
A point may be `{released: NAME, ...}` as well: it has every value of that setting but for those beside it. Where a value
differs from the released one, the point's source says so; `because` (name -> reason, or one reason for all) says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import optuna
from pydantic import ValidationError

import search_spaces
from raysweep.registry import resolve, suggest
from raysweep.search.released import ReleasedError, Setting, Stated, here, shown
from raysweep.search.released import setting as released_setting

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

    def exists(self, chosen: dict[str, Any]) -> bool:
        """Whether the parameter exists beside these values."""
        return all(chosen.get(k) == v for k, v in self.when.items())

    def contains(self, value: Any) -> bool:
        if self.open:
            return True
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class Point:
    """Settings tried before any sampling, where they come from, and the kind of task that they are for (None: any)."""

    source: str
    values: dict[str, Any]
    kind: str | None = None
    stated: dict[str, Stated] = field(default_factory=dict)  # hyperparameter -> what a released setting states of it
    unused: dict[str, str] = field(default_factory=dict)  # hyperparameter -> why that setting does not give it
    because: dict[str, str] = field(default_factory=dict)  # hyperparameter -> why it differs from that


@dataclass(frozen=True)
class Space:
    """The space of one method; released: the name of the setting whose values are `fixed`, if any."""

    method: str
    fixed: dict[str, Any]
    parameters: tuple[Parameter, ...]
    points: tuple[Point, ...]
    released: str | None = None

    def ask(self, trial: optuna.Trial, point: dict[str, Any]) -> dict[str, Any]:
        """Hyperparameters of a trial: `point`'s where it has them, else suggested, on top of the fixed ones."""
        searched = {p.name for p in self.parameters}
        chosen = self.fixed | {k: v for k, v in point.items() if k not in searched}
        for p in self.parameters:
            if p.exists(chosen):
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
    settings to be tried first, instead of the file's; `released`: what to start from instead of the file.

    `kind` leaves out the points that are for another kind of task.

    Raises:
        SpaceError: an unknown hyperparameter, an inverted range, or a value that the method refuses.
    """
    overrides = dict(overrides or {})
    enqueued, because = overrides.pop("enqueue", None), overrides.pop("because", {})
    if enqueued is not None and not (isinstance(enqueued, list) and all(isinstance(entry, dict) for entry in enqueued)):
        raise SpaceError(f"spaces.{method}.enqueue: must be a list of settings, each with its source")
    where, data = f"spaces.{method}", dict[str, Any]()
    setting: Setting | None = None
    name: str | None = None
    if "released" not in overrides:
        where, data = _embedded(method)
    elif (name := overrides.pop("released")) is not None:
        setting = _released(f"{where}.released", method, name)
        data = {"fixed": here(setting.values)}
    if because and setting is None:
        raise SpaceError(
            f"spaces.{method}.because: says why values differ from a released setting; name it by `released`"
        )
    fixed, space = dict(data.get("fixed") or {}), dict(data.get("space") or {})
    for key, value in overrides.items():
        where = f"spaces.{method}"
        (space if isinstance(value, dict) else fixed)[key] = value
        (fixed if isinstance(value, dict) else space).pop(key, None)
    valid = sorted(resolve("method", method).Hyperparameters.model_fields)
    for key in (*fixed, *space):
        if key not in valid:
            raise SpaceError(f"{where}.{key}: not a hyperparameter of {method}{suggest(key, valid)}")
    parameters = tuple(_parameter(where, key, value) for key, value in space.items())
    points = []
    if setting is not None:
        plain = {k for k, v in overrides.items() if not isinstance(v, dict)}
        points = [
            _stated(where, setting, i, {k: fixed[k] for k in plain}, because) for i in range(1 + len(setting.also))
        ]
    taken = () if enqueued is not None else tuple(overrides)
    own = fixed if setting is None else {k: v for k, v in fixed.items() if k in overrides}  # what no release has set
    for entry in enqueued if enqueued is not None else data.get("enqueue") or []:
        if kind is None or entry.get("kind", kind) == kind:
            points.append(_point(where, method, entry, own, taken))
    result = Space(method, fixed, parameters, tuple(points), name)
    _check(where, result)
    result.variants(getattr(resolve("method", method), "prepared_by", ()))
    return result


def _embedded(method: str) -> tuple[str, dict[str, Any]]:
    """(what to call it, data) of the space for the embedded models."""
    try:
        return f"search_spaces/{method}.yaml", search_spaces.read(method)
    except FileNotFoundError as error:
        own = getattr(resolve("method", method), "space", None)
        if own is None:
            raise SpaceError(f"search_spaces/{method}.yaml: missing: {method!r} has no search space") from error
        return f"methods.{method}.space", own


def _released(where: str, method: str, name: Any) -> Setting:
    if not isinstance(name, str):
        raise SpaceError(f"{where}: must be the name of a released setting, or null, not {name!r}")
    try:
        found = released_setting(name)
    except ReleasedError as error:
        raise SpaceError(f"{where}: {error}") from error
    if found.method != method:
        raise SpaceError(f"{where}: {name} is a setting of {found.method}, not of {method}")
    return found


def _point(where: str, method: str, entry: dict[str, Any], fixed: dict[str, Any], taken: Sequence[str]) -> Point:
    """An entry of `enqueue`, without the values that a sweep has set itself; one of a released setting has every other value of
    that, but for those that are fixed."""
    values = {k: v for k, v in entry.items() if k not in ("source", "kind", "released", "because") and k not in taken}
    if entry.get("released") is None:
        return Point(entry.get("source", ""), values, entry.get("kind"))
    setting = _released(f"{where}: enqueue", method, entry["released"])
    point = _stated(where, setting, 0, fixed | values, entry.get("because") or {})
    return replace(point, kind=entry.get("kind"), values={k: v for k, v in point.values.items() if k not in taken})


def _stated(where: str, setting: Setting, which: int, instead: dict[str, Any], because: Any) -> Point:
    """A point of a released setting, with some values of one's own; its source names each that differs from the release."""
    stated = setting.points()[which]
    values = here(stated) | instead
    differs = [k for k in values if k not in stated or values[k] != stated[k].here]
    notes = [f"{k} {shown(values[k])}" + (f" ({shown(stated[k].here)})" if k in stated else "") for k in differs]
    reasons = because if isinstance(because, dict) else dict.fromkeys(differs, str(because))
    unknown = [k for k in reasons if k not in values]
    if unknown:
        raise SpaceError(
            f"{where}: because: {unknown[0]} is not a value that is set here{suggest(unknown[0], differs)}"
        )
    more = setting.also[which - 1] if which else {}
    title = setting.title + "".join(f", {k} {shown(v.here)}" for k, v in more.items())
    source = title + (f"; but {', '.join(notes)}" if notes else "")
    return Point(source, values, None, stated, setting.unused, {k: v for k, v in reasons.items() if k in differs})


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
        values = space.fixed | start | point.values
        for name, value in point.values.items():
            if name in by_name and by_name[name].exists(values) and not by_name[name].contains(value):
                raise SpaceError(f"{place}: {name} = {value!r} is outside of the space")
        _accepts(model, place, values, None)


def _accepts(model: Any, place: str, values: dict[str, Any], only: str | None) -> None:
    try:
        model(**values)
    except ValidationError as error:
        for e in error.errors():
            if only is None or not e["loc"] or e["loc"][0] == only:
                name = ".".join(map(str, e["loc"]))
                shown = f"{name}: " if name and name != only else ""
                raise SpaceError(f"{place}: {shown}{e['msg'].removeprefix('Value error, ')}") from error
