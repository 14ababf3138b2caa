"""The rows of `raysweep ls`, and the commented config of `raysweep init`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import search_spaces
from raysweep.config import presets
from raysweep.config.reader import load as load_config
from raysweep.config.reader import validate
from raysweep.config.schema import ConfigError
from raysweep.registry import PluginError, external, names, resolve, unserved
from raysweep.rundir import list_runs
from raysweep.search.released import shown
from raysweep.search.spaces import Parameter, Point, Space, SpaceError, load
from raysweep.storage.places import absolute


def listing(kind: str, storage: Path) -> list[dict[str, Any]]:
    """One row of plain data per item of a kind (methods, evaluators, tasks, spaces, presets, runs), the name first.

    storage: the folder of the runs.
    """
    if kind == "methods":
        return [_row(_method, name) for name in names("method")]
    if kind == "evaluators":
        return [_row(_evaluator, name) for name in names("evaluator")]
    if kind == "tasks":
        return [_row(_task, name) for name in names("task")]
    if kind == "spaces":
        return [_row(_space, name) for name in _searchable()]
    if kind == "presets":
        return [_preset(name) for name in presets.names()]
    return [
        {"name": run.path.name, "state": run.read_manifest()["state"], "path": str(run.path)}
        for run in list_runs(storage)
    ]


def first_points(name: str) -> list[dict[str, Any]]:
    """Every point that a preset, a config (by its path) or a method tries first, each hyperparameter with value and source.

    Raises:
        ConfigError: the name is none of these.
        SpaceError: a search space is wrong.
    """
    path = presets.path_of(name) if name in presets.names() else Path(name)
    if path.is_file():
        sweep = load_config(path, (), absent=True)
        kind = getattr(sweep.task, "kind", None)
        spaces = [load(method, sweep.spaces.get(method), kind) for method in sweep.methods]
    elif name in _searchable():
        spaces = [load(name)]
    else:
        valid = ", ".join([*presets.names(), *_searchable()])
        raise ConfigError(f"{name!r}: not a preset, a config or a method; valid: {valid}")
    return [
        {"name": space.method, "source": point.source, "values": origins(space, point)}
        for space in spaces
        for point in space.points
    ]


def origins(space: Space, point: Point) -> dict[str, dict[str, Any]]:
    """Hyperparameter -> its value at a point of a space and the value's source; the value is None if it is searched."""
    method = resolve("method", space.method)
    ranges = {p.name: p for p in space.parameters}
    start = {p.name: p.values[0] for p in space.parameters if not p.when and not p.open}
    values = method.Hyperparameters(**(space.fixed | start | point.values)).model_dump()
    rows = {}
    for name, value in values.items():
        searched = name not in point.values and name in ranges and ranges[name].exists(space.fixed | point.values)
        origin = _searched(ranges[name]) if searched else _origin(space, point, name, value)
        rows[name] = {"value": None if searched else value, "searched": searched, "from": origin}
    return rows


def _searched(parameter: Parameter) -> str:
    return f"searched: {parameter.kind} [{', '.join(shown(v) for v in parameter.values)}]"


def _origin(space: Space, point: Point, name: str, value: Any) -> str:
    stated = point.stated.get(name)
    if stated is not None and (
        value == stated.converted or (isinstance(value, tuple) and list(value) == stated.converted)
    ):
        return str(stated)
    if stated is not None:
        return f"{point.because.get(name, 'set here')}; released: {shown(stated.converted)} ({stated})"
    if name in point.values:
        return "this point"
    if name in space.fixed:
        return "fixed in the space"
    return f"default; {point.unused[name]}" if name in point.unused else "default of the method"


def _searchable() -> list[str]:
    """Methods that have a search space, built in or from another package."""
    return sorted({*search_spaces.names(), *external("method")})


def _row(describe: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a name, or the reason why another package's extension of that name cannot be used."""
    try:
        return describe(name)
    except (PluginError, SpaceError) as error:
        return {"name": name, "fault": str(error)}


def _task(name: str) -> dict[str, Any]:
    about = (resolve("task", name).__doc__ or "").strip()
    return {"name": name, "about": about, "external": name in external("task")}


def _method(name: str) -> dict[str, Any]:
    method = resolve("method", name)
    return {
        "name": name,
        "source": method.source,
        "needs": "needs " + (", ".join(sorted(f"{n} images" for n in method.needs)) or "no data"),
        "forgets": "forgets " + " or ".join(sorted(method.kinds)),
        "families": ", ".join(family for family in names("family") if not unserved(method, family)),
        "cost": f"{method.forwards_per_step:g} forward passes of a batch per step",
        "external": name in external("method"),
    }


def _evaluator(name: str) -> dict[str, Any]:
    evaluator = resolve("evaluator", name)
    return {
        "name": name,
        "metrics": ", ".join(f"{m} ({d})" for m, d in evaluator.directions.items()),
        "needs": evaluator.needs,
        "cost": evaluator.cost,
        "controls": ", ".join(evaluator.controls),
        "kinds": ", ".join(sorted(evaluator.kinds)),
        "external": name in external("evaluator"),
    }


def _preset(name: str) -> dict[str, Any]:
    about = presets.about(name)
    inputs = "; ".join(f"{item.key}: {item.what}" for item in about.bring)
    return {"name": name, "title": about.title, "paper": about.paper, "bring": f"bring {inputs}"}


def _space(name: str) -> dict[str, Any]:
    space = load(name)
    searched = ", ".join(f"{p.name} {p.kind} {list(p.values)}" for p in space.parameters)
    return {"name": name, "searched": searched, "enqueued": f"{len(space.points)} points enqueued"}


def commented_config(name: str, task: str) -> str:
    """YAML of every setting at its default, each with its meaning as a comment."""
    sweep = validate({"name": name, "task": {"name": task}}, "init")
    lines = ["# A raysweep config: every setting at its default. Delete what you do not change.", ""]
    _write(lines, sweep, 0)
    return "\n".join(lines) + "\n"


def _write(lines: list[str], model: BaseModel, depth: int) -> None:
    pad = "  " * depth
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if isinstance(field.default, Path) and value == absolute(field.default):
            value = field.default  # relative, as a user writes it
        about = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{key}:{about}")
            _write(lines, value, depth + 1)
        else:
            plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump(plain, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            lines.append(f"{pad}{key}: {text}{about}")
