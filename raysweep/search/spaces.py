"""Search spaces: distributions over a method's hyperparameters, and the points that are tried first; both are validated.

A YAML file has `method`, `fixed` (values of every trial), `space` (name -> one of the distributions below, optionally
with `when`), and `enqueue` (points with their `source`, and with the `kind` of task that they are for, unless they suit all
kinds). A method of another package has the same content as its attribute `space`.
    {log: [a, b]}  {uniform: [a, b]}  {int: [a, b]}  {logint: [a, b]}  {choice: [x, y, ...]}
    {choice: from_model}   the choices that the method offers for the prepared base model (SLUG's layers)
    when: {other: value}   the parameter exists only if `other` has `value`; `other` must come earlier in the file

These files suit the embedded models. `spaces.METHOD` of a sweep overrides them key by key, unless it has `released`:
    released: sfd/cifar10  start from a released setting (see `raysweep.search.released`): it is the first point, and gives every
                           value that the sweep neither sets nor searches
    released: null         no setting was released: start from the method's defaults
A point may also be `{released: NAME, ...}`: that setting with the listed values replaced. If a value differs from the
released one, the point's source says so; `because` (name -> reason, or one reason for all) says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from pydantic import ValidationError

import search_spaces
from raysweep.registry import resolve, suggest
from raysweep.search.released import ReleasedError, Setting, Stated, converted, shown
from raysweep.search.released import setting as released_setting

KINDS = ("log", "uniform", "int", "logint", "choice")
FROM_MODEL = "from_model"


class SpaceError(ValueError):
    """A search space is wrong; the message says where and what would be valid."""


class Suggests(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...


@dataclass(frozen=True)
class Parameter:
    """One searched hyperparameter.

    kind: one of `KINDS`; values: (low, high), inclusive, or the choices; when: values of other hyperparameters with which alone
    it exists.
    """

    name: str
    kind: str
    values: tuple[Any, ...]
    when: dict[str, Any]

    def ask(self, trial: Suggests, prefix: str) -> Any:
        """Draws a value; the study knows the parameter as `prefix.name`."""
        key = f"{prefix}.{self.name}"
        if self.kind == "choice":
            return trial.suggest_categorical(key, list(self.values))
        low, high = self.values
        if self.kind in ("int", "logint"):
            return trial.suggest_int(key, low, high, log=self.kind == "logint")
        return trial.suggest_float(key, low, high, log=self.kind == "log")

    @property
    def open(self) -> bool:
        """Whether its choices are unknown until the method has been prepared."""
        return self.values == (FROM_MODEL,)

    def exists(self, chosen: dict[str, Any]) -> bool:
        """Whether the parameter exists, given the values chosen so far."""
        return all(chosen.get(k) == v for k, v in self.when.items())

    def contains(self, value: Any) -> bool:
        """Whether a value is a choice or within the bounds; always, if the choices are unknown yet."""
        if self.open:
            return True
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class Point:
    """Settings that are tried before any sampling, their source, and the kind of task that they are for (None: any)."""

    source: str
    values: dict[str, Any]
    kind: str | None = None
    stated: dict[str, Stated] = field(default_factory=dict)  # hyperparameter -> its released value
    unused: dict[str, str] = field(default_factory=dict)  # hyperparameter -> why the released setting has none
    because: dict[str, str] = field(default_factory=dict)  # hyperparameter -> why it differs from the release


@dataclass(frozen=True)
class Space:
    """The search space of one method; released: the name of the setting that gives `fixed` its values, if any."""

    method: str
    fixed: dict[str, Any]
    parameters: tuple[Parameter, ...]
    points: tuple[Point, ...]
    released: str | None = None

    def ask(self, trial: Suggests, point: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a trial: fixed values, then drawn ones, then those of `point`."""
        searched = {p.name for p in self.parameters}
        chosen = self.fixed | {k: v for k, v in point.items() if k not in searched}
        for p in self.parameters:
            if p.exists(chosen):
                chosen[p.name] = p.ask(trial, self.method)
        return chosen | point

    def resolved(self, choices: Callable[[str], list[Any]]) -> Space:
        """This space with open choices filled in: choices(name) lists what the prepared model offers."""
        parameters = tuple(replace(p, values=tuple(choices(p.name))) if p.open else p for p in self.parameters)
        return replace(self, parameters=parameters)

    def variants(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """All combinations of values that the hyperparameters `names` can have in this space; names that the space omits are omitted.

        Raises SpaceError for a range: every value in it would have to be prepared.
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
        combinations = [dict(zip(keys, chosen, strict=True)) for chosen in product(*(values[k] for k in keys))]
        first = {k: values[k][0] for k in keys}
        for point in self.points:
            of_point = first | {k: v for k, v in point.values.items() if k in names}
            if of_point not in combinations:
                combinations.append(of_point)
        return combinations


def load(method: str, overrides: dict[str, Any] | None = None, kind: str | None = None) -> Space:
    """Reads the space of a method and applies a sweep's overrides.

    Args:
        method: its name in the registry.
        overrides: hyperparameter -> distribution, or plain value, which is then fixed; `enqueue`: points to try first, instead of
            the file's; `released`: the setting to start from, instead of the file; `because`: see the module.
        kind: the kind of task; points for another kind are left out. None: all points.

    Raises:
        SpaceError: an unknown hyperparameter, an inverted range, or a value that the method refuses.
    """
    overrides = dict(overrides or {})
    enqueued, because = overrides.pop("enqueue", None), overrides.pop("because", {})
    if enqueued is not None and not (isinstance(enqueued, list) and all(isinstance(entry, dict) for entry in enqueued)):
        raise SpaceError(f"spaces.{method}.enqueue: must be a list of settings, each with its source")
    label, data = f"spaces.{method}", dict[str, Any]()
    setting: Setting | None = None
    name: str | None = None
    if "released" not in overrides:
        label, data = _embedded(method)
    elif (name := overrides.pop("released")) is not None:
        setting = _released(f"{label}.released", method, name)
        data = {"fixed": converted(setting.values)}
    if because and setting is None:
        raise SpaceError(
            f"spaces.{method}.because: says why values differ from a released setting; name it by `released`"
        )
    fixed, space = dict(data.get("fixed") or {}), dict(data.get("space") or {})
    for key, value in overrides.items():
        label = f"spaces.{method}"
        (space if isinstance(value, dict) else fixed)[key] = value
        (fixed if isinstance(value, dict) else space).pop(key, None)
    valid = sorted(resolve("method", method).Hyperparameters.model_fields)
    for key in (*fixed, *space):
        if key not in valid:
            raise SpaceError(f"{label}.{key}: not a hyperparameter of {method}{suggest(key, valid)}")
    parameters = tuple(_parameter(label, key, value) for key, value in space.items())
    points = []
    if setting is not None:
        plain = {k for k, v in overrides.items() if not isinstance(v, dict)}
        points = [
            _stated(label, setting, i, {k: fixed[k] for k in plain}, because) for i in range(1 + len(setting.also))
        ]
    overridden = () if enqueued is not None else tuple(overrides)
    not_released = fixed if setting is None else {k: v for k, v in fixed.items() if k in overrides}
    for entry in enqueued if enqueued is not None else data.get("enqueue") or []:
        if kind is None or entry.get("kind", kind) == kind:
            points.append(_point(label, method, entry, not_released, overridden))
    result = Space(method, fixed, parameters, tuple(points), name)
    _check(label, result)
    result.variants(getattr(resolve("method", method), "prepared_by", ()))
    return result


def _embedded(method: str) -> tuple[str, dict[str, Any]]:
    """(label for messages, data) of the method's space for the embedded models."""
    try:
        return f"search_spaces/{method}.yaml", search_spaces.read(method)
    except FileNotFoundError as error:
        space = getattr(resolve("method", method), "space", None)
        if space is None:
            raise SpaceError(f"search_spaces/{method}.yaml: missing: {method!r} has no search space") from error
        return f"methods.{method}.space", space


def _released(label: str, method: str, name: Any) -> Setting:
    if not isinstance(name, str):
        raise SpaceError(f"{label}: must be the name of a released setting, or null, not {name!r}")
    try:
        setting = released_setting(name)
    except ReleasedError as error:
        raise SpaceError(f"{label}: {error}") from error
    if setting.method != method:
        raise SpaceError(f"{label}: {name} is a setting of {setting.method}, not of {method}")
    return setting


def _point(label: str, method: str, entry: dict[str, Any], fixed: dict[str, Any], overridden: Sequence[str]) -> Point:
    """An entry of `enqueue`, without the values that the sweep overrides.

    A `released` entry has the values of that setting, replaced by `fixed` and then by those of the entry.
    """
    keys = ("source", "kind", "released", "because", *overridden)
    values = {k: v for k, v in entry.items() if k not in keys}
    if entry.get("released") is None:
        return Point(entry.get("source", ""), values, entry.get("kind"))
    setting = _released(f"{label}: enqueue", method, entry["released"])
    point = _stated(label, setting, 0, fixed | values, entry.get("because") or {})
    return replace(point, kind=entry.get("kind"), values={k: v for k, v in point.values.items() if k not in overridden})


def _stated(label: str, setting: Setting, index: int, replaced: dict[str, Any], because: Any) -> Point:
    """A point of a released setting with some values replaced; its source names each that differs from the release."""
    stated = setting.points()[index]
    values = converted(stated) | replaced
    differs = [k for k in values if k not in stated or values[k] != stated[k].converted]
    notes = [f"{k} {shown(values[k])}" + (f" ({shown(stated[k].converted)})" if k in stated else "") for k in differs]
    reasons = because if isinstance(because, dict) else dict.fromkeys(differs, str(because))
    unknown = [k for k in reasons if k not in values]
    if unknown:
        raise SpaceError(
            f"{label}: because: {unknown[0]} is not a value that is set here{suggest(unknown[0], differs)}"
        )
    more = setting.also[index - 1] if index else {}
    title = setting.title + "".join(f", {k} {shown(v.converted)}" for k, v in more.items())
    source = title + (f"; but {', '.join(notes)}" if notes else "")
    return Point(source, values, None, stated, setting.unused, {k: v for k, v in reasons.items() if k in differs})


def _parameter(label: str, name: str, value: Any) -> Parameter:
    kinds = [k for k in value if k != "when"] if isinstance(value, dict) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise SpaceError(f"{label}.{name}: must be one of {', '.join(f'{{{k}: [...]}}' for k in KINDS)}, not {value!r}")
    kind, values = kinds[0], value[kinds[0]]
    if kind == "choice" and values == FROM_MODEL:
        values = [FROM_MODEL]
    if not isinstance(values, list) or not values:
        raise SpaceError(f"{label}.{name}: {kind} takes a list, not {values!r}")
    if kind != "choice":
        _check_range(f"{label}.{name}", kind, values)
    return Parameter(name, kind, tuple(values), dict(value.get("when") or {}))


def _check_range(label: str, kind: str, ends: list[Any]) -> None:
    """Raises SpaceError unless the ends are two finite numbers in order, of the kind's type, and above 0 for a log scale."""
    if len(ends) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends):
        raise SpaceError(f"{label}: {kind} takes two numbers [low, high], not {ends!r}")
    if not all(math.isfinite(v) for v in ends):
        raise SpaceError(f"{label}: the ends of a range are finite numbers, not {ends!r}")
    if ends[0] > ends[1]:
        raise SpaceError(f"{label}: the range is inverted: [{ends[0]}, {ends[1]}]")
    if kind.startswith("log") and ends[0] <= 0:
        raise SpaceError(f"{label}: a logarithmic range starts above 0, not at {ends[0]}")
    if kind.endswith("int") and not all(isinstance(v, int) for v in ends):
        raise SpaceError(f"{label}: {kind} takes whole numbers, not {ends!r}")


def _check(label: str, space: Space) -> None:
    """Raises SpaceError unless the method accepts the ends of every range, every choice and every enqueued point."""
    model = resolve("method", space.method).Hyperparameters
    start = {p.name: p.values[0] for p in space.parameters if not p.when and not p.open}
    for p in space.parameters:
        for value in () if p.open else p.values:
            _check_values(model, f"{label}.{p.name}", space.fixed | start | p.when | {p.name: value}, p.name)
    by_name = {p.name: p for p in space.parameters}
    for point in space.points:
        point_label = f"{label}: enqueue ({point.source})"
        values = space.fixed | start | point.values
        for name, value in point.values.items():
            if name in by_name and by_name[name].exists(values) and not by_name[name].contains(value):
                raise SpaceError(f"{point_label}: {name} = {value!r} is outside of the space")
        _check_values(model, point_label, values, None)


def _check_values(model: Any, label: str, values: dict[str, Any], only: str | None) -> None:
    """Raises SpaceError if the method's settings refuse these values; only: the one hyperparameter whose errors count."""
    try:
        model(**values)
    except ValidationError as error:
        for e in error.errors():
            if only is None or not e["loc"] or e["loc"][0] == only:
                name = ".".join(map(str, e["loc"]))
                prefix = f"{name}: " if name and name != only else ""
                raise SpaceError(f"{label}: {prefix}{e['msg'].removeprefix('Value error, ')}") from error
