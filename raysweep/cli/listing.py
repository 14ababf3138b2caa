"""The rows of `raysweep ls`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import search_spaces
from raysweep.config import presets
from raysweep.config.reader import load as load_config
from raysweep.config.schema import ConfigError
from raysweep.registry import PluginError, external, names, resolve, unserved
from raysweep.rundir import list_runs
from raysweep.search.released import shown
from raysweep.search.spaces import Parameter, Point, Space, SpaceError, load


def listing(kind: str, storage: Path) -> list[dict[str, Any]]:
    """One row of plain data per item of a kind (methods, evaluators, tasks, spaces, presets, runs), the name first.

    Of a method, `images` are the splits that it reads, and `passes` the cost of a step in forward passes of one batch. An item that
    cannot be used has `fault`, the reason, instead of the other columns.
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
        "forgets": sorted(method.kinds),
        "images": sorted(method.needs),
        "families": [family for family in names("family") if not unserved(method, family)],
        "passes": method.forwards_per_step,
        "source": method.source,
        "external": name in external("method"),
    }


def _evaluator(name: str) -> dict[str, Any]:
    evaluator = resolve("evaluator", name)
    return {
        "name": name,
        "metrics": dict(evaluator.directions),
        "kinds": sorted(evaluator.kinds),
        "needs": evaluator.needs,
        "cost": evaluator.cost,
        "controls": list(evaluator.controls),
        "external": name in external("evaluator"),
    }


def _preset(name: str) -> dict[str, Any]:
    about = presets.about(name)
    inputs = {item.key: item.what for item in about.bring}
    return {"name": name, "title": about.title, "paper": about.paper, "bring": inputs}


def _space(name: str) -> dict[str, Any]:
    space = load(name)
    searched = {p.name: {"kind": p.kind, "values": list(p.values)} for p in space.parameters}
    return {"name": name, "searched": searched, "points": len(space.points)}
