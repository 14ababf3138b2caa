"""Reads a sweep from YAML and key=value overrides, presets included; every mistake becomes a message of one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from raysweep.config import presets
from raysweep.config.schema import AuditConfig, ConfigError, Sweep
from raysweep.registry import names, resolve, suggest
from raysweep.storage.texts import TextError, load_yaml, read_text
from raysweep.tasks.unions import OPEN


def load(path: Path | None, overrides: tuple[str, ...] = (), absent: bool = False) -> Sweep:
    """Reads a sweep from YAML (None: the embedded default) and applies overrides such as `search.trials=12`.

    absent: the files that a preset at paper scale names need not exist yet.

    Raises:
        ConfigError: a message per mistake, with file, key and line.
    """
    text, source = "", "built-in default"
    if path is not None:
        source = str(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            text = read_text(path)
        except TextError as error:
            raise ConfigError(str(error)) from error
    try:
        data = load_yaml(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {_problem(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be a mapping of keys, not {type(data).__name__}")
    try:
        data = json.loads(
            json.dumps(data, default=str)
        )  # a copy: YAML aliases share objects, which would change together
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: keys must be text or numbers, and nothing may hold itself ({error})") from error
    _expand_preset(data, overrides, source, text)
    set_by_hand = [_override(data, item) for item in overrides]
    sweep = validate(data, source, text, set_by_hand, absent and data.get("scale") == "paper")
    for method in sweep.methods if sweep.scale == "paper" else ():
        if "released" not in sweep.spaces.get(method, {}):
            raise ConfigError(
                f"{source}: spaces.{method}.released: missing; the paper's experiment starts from a released setting by its name, "
                "or from the method's defaults (null), never from the space for the embedded models"
            )
    return sweep


def assignments(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides by dotted key in the form that `load` takes, key=value. Raises ConfigError for a value that is not plain data."""
    try:
        return tuple(f"{key}={json.dumps(value, default=_plain)}" for key, value in overrides.items())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"overrides: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} is not plain data: a number, a text, a truth value, or lists and mappings of these")


def changed(sweep: Sweep, overrides: Mapping[str, Any]) -> Sweep:
    """A sweep with some settings changed, by dotted key; raises ConfigError."""
    data = sweep.resolved()
    return validate(data, "overrides", set_by_hand=[_override(data, item) for item in assignments(overrides)])


def _expand_preset(data: dict[str, Any], overrides: tuple[str, ...], source: str, text: str) -> None:
    """Removes the parts `about` and `tiny` of a preset from `data`, and at `scale=tiny` applies the settings of `tiny`."""
    about, tiny, overridden = data.pop("about", None), data.pop("tiny", None), dict[str, Any]()
    for item in overrides:
        _override(overridden, item)
    scale = overridden.get("scale", data.get("scale"))
    if about is None and tiny is None:
        _check_not_a_preset(data, overridden, scale, source)
        return
    if about is None or tiny is None:
        present, missing = ("tiny", "about") if about is None else ("about", "tiny")
        raise ConfigError(f"{source}: {present}: a preset has the parts about and tiny, and {missing} is missing")
    try:
        presets.About.model_validate(about)
        data |= {"preset": data.get("name"), "scale": scale or "paper"}
        if data["scale"] == "tiny":
            data["name"] = f"{data.get('name')}-tiny"
            cache = overridden.get("cache", data.get("cache"))
            methods = overridden.get("methods", data.get("methods"))
            if not isinstance(methods, list) or not methods:
                raise ConfigError(f"{source}: methods: must be a list of methods (`raysweep ls methods`)")
            for key, value in presets.settings(tiny, len(methods), None if cache is None else Path(cache)).items():
                _put(data, key, value, f"tiny.set.{key}")
    except presets.PresetError as error:
        raise ConfigError(f"{source}: {error}") from error
    except ValidationError as error:
        lines, part = _line_numbers(text), error.title.lower()
        root = presets.About if part == "about" else presets.Tiny
        raise ConfigError("\n".join(_explain(e, source, lines, [], root, (part,)) for e in error.errors())) from error


def _check_not_a_preset(data: dict[str, Any], overridden: dict[str, Any], scale: Any, source: str) -> None:
    """Raises ConfigError if a config that is not a preset sets `preset` or `scale` by itself.

    A resolved config of a preset, as reports print it, has both; its settings are already those of its scale.
    """
    preset = data.get("preset")
    if overridden.get("preset", preset) is not None and scale is None:
        raise ConfigError(
            f"{source}: preset: records which preset a resolved config was, together with its scale; to run a preset give its "
            "name: raysweep run NAME"
        )
    if preset is not None and scale != data.get("scale"):
        raise ConfigError(
            f"{source}: scale: this is {preset} as it ran at scale {data.get('scale')}; for another scale run the preset itself: "
            f"raysweep run {preset} scale={scale}"
        )
    if preset is None and scale is not None:
        raise ConfigError(f"{source}: scale: only presets have one (`raysweep ls presets`)")


def validate(
    data: dict[str, Any],
    source: str,
    text: str = "",
    set_by_hand: list[str] | None = None,
    absent: bool = False,
    stored: bool = False,
) -> Sweep:
    """Builds a `Sweep` from plain data.

    Args:
        data: nested settings.
        source: what messages begin with, such as the file.
        text: the YAML text in which the line numbers of messages are looked up.
        set_by_hand: dotted keys that were set on the command line.
        absent: files that the config names need not exist.
        stored: read back from a run: skips the checks that need training libraries or models.

    Raises:
        ConfigError: a message per mistake.
    """
    data = json.loads(json.dumps(data, default=str))
    if isinstance(data.get("task"), str):
        data["task"] = {"name": data["task"]}
    if isinstance(data.get("task"), dict):
        data["task"].setdefault("name", "digits-picture")
        if data["task"]["name"] not in names("task") and not stored:
            raise ConfigError(
                f"{source}: task.name: {data['task']['name']!r} is not a task{suggest(data['task']['name'], names('task'))}"
            )
    for tier in ("probe", "audit", "durability"):
        audit = data.get("audit")
        if isinstance(audit, dict) and isinstance(audit.get(tier), dict):
            audit[tier] = getattr(AuditConfig(), tier).model_dump(mode="json") | audit[tier]
    try:
        return Sweep.model_validate(data, context={"absent": absent, "stored": stored})
    except ValidationError as error:
        lines = _line_numbers(text)
        task = data["task"]["name"] if isinstance(data.get("task"), dict) else ""
        raise ConfigError(
            "\n".join(_explain(e, source, lines, set_by_hand or [], task=task) for e in error.errors())
        ) from error


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _override(data: dict[str, Any], item: str) -> str:
    """Sets `a.b=value` in nested `data`, the value parsed as YAML; returns the dotted key."""
    key, separator, raw = item.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"{item!r}: an override has the form key=value, for example search.trials=12")
    try:
        value = load_yaml(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{item!r}: the value is not valid YAML: {_problem(error)}") from error
    _put(data, key, value, item)
    return key


def _put(data: dict[str, Any], key: str, value: Any, item: str) -> None:
    """Sets a dotted key of nested `data`; a number in it is an index into a list. `item` begins messages."""
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if isinstance(node, list):
            node = node[_index(node, parent, item)]
        else:
            if isinstance(node.get(parent), str) and parent == "task":
                node[parent] = {"name": node[parent]}
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"{item!r}: {parent} is a single value and has no keys below it")
    node[_index(node, last, item) if isinstance(node, list) else last] = value


def _index(values: list[Any], part: str, item: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise ConfigError(f"{item!r}: {part!r} is not an index into a list of {len(values)}; the first index is 0")
    return int(part)


def _explain(
    error: Any,
    source: str,
    lines: dict[str, int],
    set_by_hand: list[str],
    root: type[BaseModel] | None = None,
    above: tuple[str, ...] = (),
    task: str = "",
) -> str:
    """One sentence for one pydantic error: file and line, key, what is wrong, what would be valid.

    root: the model that was validated (None: Sweep), at the keys `above`; task: name of the task whose settings are below `task`.
    """
    path = [str(p) for p in (*above, *error["loc"]) if not str(p).startswith(OPEN)]
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key{suggest(path[-1], _valid_keys(root or Sweep, error['loc'][:-1], task))}"
    if any(key == k or key.startswith(k + ".") or k.startswith(key + ".") for k in set_by_hand):
        location = "command line"
    else:
        line = next((lines[k] for k in (key, ".".join(path[:-1])) if k in lines), None)
        location = f"{source}:{line}" if line else source
    value = error.get("input")
    if error["type"] == "string_type" and isinstance(value, int | float):
        message = "must be text; YAML reads this as a number or a truth value unless it is quoted"
    is_shown = isinstance(value, str | int | float | bool) and error["type"] != "value_error"
    return f"{location}: {key + ': ' if key else ''}{message}{f' (got {value!r})' if is_shown else ''}"


def _valid_keys(root: type[BaseModel], loc: tuple[Any, ...], task: str) -> list[str]:
    """Names of the settings that are valid at `loc`, a pydantic error location below `root`; task: name of the sweep's task."""
    models: dict[str, type[BaseModel]] = {"": root}
    for part in loc:
        if part == "task":
            models = {"": resolve("task", task)}
        elif str(part).startswith(OPEN):
            models = {"": models[part]}
        elif not isinstance(part, int):
            models = _models(next(iter(models.values())).model_fields[part].annotation)
    return sorted(next(iter(models.values())).model_fields)


def _models(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of an annotation, by their tags in a union."""
    if get_origin(annotation) is Annotated:
        kind, *rest = get_args(annotation)
        outer = next((m.tag for m in rest if isinstance(m, Tag)), None)
        return {tag if outer is None else outer: model for tag, model in _models(kind).items()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    return {tag: model for part in get_args(annotation) for tag, model in _models(part).items()}


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line (from 1) of every mapping key in a YAML text."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path = f"{prefix}{key.value}"
                lines[path] = key.start_mark.line + 1
                walk(value, path + ".")
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[f"{prefix}{i}"] = value.start_mark.line + 1
                walk(value, f"{prefix}{i}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader) if text else None, "")
    return lines
