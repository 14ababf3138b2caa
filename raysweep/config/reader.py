"""From YAML and key=value to a sweep: presets' parts, overrides, and one sentence for every mistake."""

from __future__ import annotations

import json
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

    absent: what a preset at paper scale names need not be there yet.

    Raises:
        ConfigError: one message for every mistake, with file, key and line.
    """
    text, where = "", "built-in default"
    if path is not None:
        where = str(path)
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
        raise ConfigError(f"{where}{line}: not valid YAML: {_problem(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, not {type(data).__name__}")
    try:
        data = json.loads(json.dumps(data, default=str))  # what aliases share would change together
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: keys must be text or numbers, and nothing may hold itself ({error})") from error
    _scale(data, overrides, where, text)
    set_by_hand = [_override(data, item) for item in overrides]
    sweep = validate(data, where, text, set_by_hand, absent and data.get("scale") == "paper")
    for method in sweep.methods if sweep.scale == "paper" else ():
        if "released" not in sweep.spaces.get(method, {}):
            raise ConfigError(
                f"{where}: spaces.{method}.released: missing; the paper's experiment starts from a released setting by its name, "
                "or from the method's defaults (null), never from the space for the embedded models"
            )
    return sweep


def _scale(data: dict[str, Any], overrides: tuple[str, ...], where: str, text: str) -> None:
    """Takes the parts of a preset out of `data`, and at `scale=tiny` sets what that changes."""
    about, tiny, asked = data.pop("about", None), data.pop("tiny", None), dict[str, Any]()
    for item in overrides:
        _override(asked, item)
    scale = asked.get("scale", data.get("scale"))
    if (about is None) != (tiny is None):
        there, lacking = ("tiny", "about") if about is None else ("about", "tiny")
        raise ConfigError(f"{where}: {there}: a preset has the parts about and tiny, and {lacking} is missing")
    if about is None or tiny is None:
        if asked.get("preset", data.get("preset")) is not None and scale is None:
            raise ConfigError(
                f"{where}: preset: says of a resolved config which preset it was, and has a scale beside it; to run a preset give its "
                "name: raysweep run NAME"
            )
        if (
            data.get("preset") is not None
        ):  # a resolved config, as reports print it: its scale is in its settings already
            if scale != data.get("scale"):
                raise ConfigError(
                    f"{where}: scale: this is {data['preset']} as it ran at scale {data.get('scale')}; for another scale run "
                    f"the preset itself: raysweep run {data['preset']} scale={scale}"
                )
            return
        if scale is not None:
            raise ConfigError(f"{where}: scale: only presets have one (`raysweep ls presets`)")
        return
    try:
        presets.About.model_validate(about)
        data |= {"preset": data.get("name"), "scale": scale or "paper"}
        if data["scale"] == "tiny":
            data["name"] = f"{data.get('name')}-tiny"
            cache = asked.get("cache", data.get("cache"))
            methods = asked.get("methods", data.get("methods"))
            if not isinstance(methods, list) or not methods:
                raise ConfigError(f"{where}: methods: must be a list of methods (`raysweep ls methods`)")
            for key, value in presets.settings(tiny, len(methods), None if cache is None else Path(cache)).items():
                _put(data, key, value, f"tiny.set.{key}")
    except presets.PresetError as error:
        raise ConfigError(f"{where}: {error}") from error
    except ValidationError as error:
        lines, part = _line_numbers(text), error.title.lower()
        root = presets.About if part == "about" else presets.Tiny
        raise ConfigError("\n".join(_explain(e, where, lines, [], root, (part,)) for e in error.errors())) from error


def validate(
    data: dict[str, Any],
    where: str,
    text: str = "",
    set_by_hand: list[str] | None = None,
    absent: bool = False,
    stored: bool = False,
) -> Sweep:
    """Builds a `Sweep` from plain data; `text` is the YAML source that line numbers are looked up in.

    stored: of a run, and so valid when that began; what takes the libraries of training, or its models, to check is then left out.
    """
    data = json.loads(json.dumps(data, default=str))
    if isinstance(data.get("task"), str):
        data["task"] = {"name": data["task"]}
    if isinstance(data.get("task"), dict):
        data["task"].setdefault("name", "digits-picture")
        if data["task"]["name"] not in names("task") and not stored:
            raise ConfigError(
                f"{where}: task.name: {data['task']['name']!r} is not a task{suggest(data['task']['name'], names('task'))}"
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
            "\n".join(_explain(e, where, lines, set_by_hand or [], task=task) for e in error.errors())
        ) from error


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _override(data: dict[str, Any], item: str) -> str:
    """Sets `a.b=value` in nested `data`, the value parsed as YAML; returns the dotted key."""
    key, found, raw = item.partition("=")
    if not found or not all(key.split(".")):
        raise ConfigError(f"{item!r}: an override has the form key=value, for example search.trials=12")
    try:
        value = load_yaml(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{item!r}: the value is not valid YAML: {_problem(error)}") from error
    _put(data, key, value, item)
    return key


def _put(data: dict[str, Any], key: str, value: Any, item: str) -> None:
    """Sets a dotted key of nested `data`, in which a number is a place in a list; `item` names it in a message."""
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if isinstance(node, list):
            node = node[_place(node, parent, item)]
        else:
            if isinstance(node.get(parent), str) and parent == "task":
                node[parent] = {"name": node[parent]}
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"{item!r}: {parent} is a single value and has no keys below it")
    node[_place(node, last, item) if isinstance(node, list) else last] = value


def _place(values: list[Any], part: str, item: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise ConfigError(f"{item!r}: {part!r} is no place in a list of {len(values)}, which count from 0")
    return int(part)


def _explain(
    error: Any,
    where: str,
    lines: dict[str, int],
    set_by_hand: list[str],
    root: type[BaseModel] | None = None,
    above: tuple[str, ...] = (),
    task: str = "",
) -> str:
    """One sentence for one pydantic error: place, key, what is wrong, what would be valid. root: the model, at the keys `above`;
    task: the name of the task whose settings stand below `task`."""
    path = [str(p) for p in (*above, *error["loc"]) if not str(p).startswith(OPEN)]
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key{suggest(path[-1], _valid_keys(root or Sweep, error['loc'][:-1], task))}"
    place = where
    if any(key == k or key.startswith(k + ".") or k.startswith(key + ".") for k in set_by_hand):
        place = "command line"
    else:
        line = next((lines[k] for k in (key, ".".join(path[:-1])) if k in lines), None)
        place = f"{where}:{line}" if line else where
    given = error.get("input")
    if error["type"] == "string_type" and isinstance(given, int | float):
        message = "must be text; YAML reads this as a number or a truth value unless it stands in quotes"
    shown = (
        f" (got {given!r})" if isinstance(given, str | int | float | bool) and error["type"] != "value_error" else ""
    )
    return f"{place}: {key + ': ' if key else ''}{message}{shown}"


def _valid_keys(root: type[BaseModel], loc: tuple[Any, ...], task: str) -> list[str]:
    """Field names of the model at `loc` below a root, in which `task` holds the settings of the task of that name."""
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
        own = next((m.tag for m in rest if isinstance(m, Tag)), None)
        return {tag if own is None else own: model for tag, model in _models(kind).items()}
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
