"""The commented config that `raysweep init` writes, and what it finds out about a user's model and data for it.

A draft has every setting with its meaning. What only the user knows is a question in a comment above its setting; a required setting
without a value is commented out, so `raysweep validate` names what is still missing.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter

from raysweep.config.schema import ConfigError, Sweep
from raysweep.models.folders import NETWORK, is_hub_id, read_json
from raysweep.records import Family
from raysweep.registry import resolve, unserved
from raysweep.storage.places import absolute
from raysweep.tasks.base import TaskSettings
from raysweep.tasks.digits import PictureTask
from raysweep.tasks.labels import class_order, in_order
from raysweep.tasks.records import NAMED, SourceError, Tally
from raysweep.tasks.sources import TORCHVISION, Source

LOOKED_AT = 20_000  # records of a source that are looked at, without opening their images
SHOWN = 20  # labels that a question lists
WIDTH = 110  # characters of a line of a question
LABELS, CAPTIONS = ("label", "labels", "class"), ("text", "caption", "prompt")  # usual names of Parquet columns


@dataclass
class Draft:
    """A config that its user will complete. values, task: settings that are known; questions: dotted setting -> a question."""

    kind: type[TaskSettings]
    values: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The config as YAML."""
        lines = ["# A raysweep config with every setting. Delete what you do not change."]
        if self.questions:
            lines.append("# QUESTION marks what could not be found out.")
        lines.append("")
        for key, setting in Sweep.model_fields.items():
            if key == "task":
                lines.append(f"task:{_comment(setting.description)}")
                self._write(lines, self.kind, self.task, "task.", 1)
            else:
                self._setting(lines, key, setting, self.values, "", 0)
        return "\n".join(lines) + "\n"

    def _write(
        self, lines: list[str], kind: type[BaseModel], values: Mapping[str, Any], prefix: str, depth: int
    ) -> None:
        for key, setting in kind.model_fields.items():
            self._setting(lines, key, setting, values, prefix, depth)

    def _setting(
        self, lines: list[str], key: str, setting: Any, values: Mapping[str, Any], prefix: str, depth: int
    ) -> None:
        pad, about = "  " * depth, _comment(setting.description)
        question = self.questions.get(f"{prefix}{key}")
        if question:
            lines += [f"{pad}# {line}" for line in textwrap.wrap(f"QUESTION: {question}", WIDTH)]
        if key not in values and setting.is_required():
            lines.append(f"{pad}# {key}: needed{about}")
            return
        value = values[key] if key in values else setting.get_default(call_default_factory=True)
        if isinstance(setting.default, Path) and value == absolute(setting.default):
            value = setting.default  # relative, as a user writes it
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{key}:{about}")
            self._write(lines, type(value), dict(value), f"{prefix}{key}.", depth + 1)
        else:
            plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            shown = yaml.safe_dump(plain, default_flow_style=True, width=1000, sort_keys=False, allow_unicode=True)
            lines.append(f"{pad}{key}: {shown.strip().removesuffix('...').strip()}{about}")


def _comment(description: str | None) -> str:
    return f"  # {description}" if description else ""


def of_task(name: str, task: str) -> Draft:
    """The draft of a sweep on a task, by its name; settings that the task needs and that have no default are left to the user."""
    draft = Draft(resolve("task", task), {"name": name}, {"name": task})
    if draft.kind is PictureTask or any(setting.is_required() for setting in draft.kind.model_fields.values()):
        return draft  # the default methods are made for the one, and the other cannot be built yet
    built = draft.kind.model_validate(draft.task).build()
    _choose_methods(draft, built.family, built.kind)
    return draft


def of_model(name: str, model: str, train: str | None, holdout: str | None) -> Draft:
    """The draft of a sweep on a user's own model and images, from what is seen of them.

    Raises ConfigError for a folder that holds no model of a known family, and for images that cannot be read.
    """
    draft = Draft(resolve("task", "images"), {"name": name}, {"name": "images"})
    draft.task["base"] = model
    family, classes = _look_at_model(Path(model))
    record: Family = resolve("family", family)
    seen = _look_at_source("task.train", train, draft, "the images that the model was trained on, or a part of them")
    _look_at_source("task.holdout", holdout, draft, "images of the same kinds that the model was never trained on")
    by_caption = "caption" in record.conditions
    unlabelled = seen is not None and not seen.labels
    kind = "points" if unlabelled or not (by_caption or classes) else "concept" if by_caption else "class"
    draft.task["kind"] = kind
    if kind != "points" or classes:
        draft.questions["task.kind"] = "must a whole class or concept be forgotten, or single images (points)?"
    _ask_what_to_forget(draft, kind, seen)
    if classes:
        labels = (
            () if seen is None or "torchvision" in draft.task["train"] else class_order(in_order(seen.labels), set())
        )
        order = ", ".join(f"{k} {label}" for k, label in enumerate(labels))
        draft.questions["task.classes"] = (
            f"the labels in the order of the model's class indices; it has {classes}. If this is empty, "
            f"{'they are: ' + order if order else 'the source decides'}."
        )
    if kind == "concept":
        _ask_for_prompts(draft, seen)
    _ask_for_oracles(draft, record)
    _choose_methods(draft, family, kind)
    return draft


@dataclass
class _Seen:
    """What is seen of a source: how many records have which label, how many have a caption, and the first names."""

    labels: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    count: int = 0
    keys: list[str] = field(default_factory=list)


def _look_at_model(folder: Path) -> tuple[str, int]:
    """(family, number of class indices or 0) of the model in a folder."""
    from raysweep.models.families import family_of

    if not folder.is_dir():
        more = "; download it, or write its id into task.base of a config of `raysweep init NAME --task images`"
        raise ConfigError(f"{folder}: no such folder{more if is_hub_id(str(folder)) else ''}")
    try:
        family = family_of(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = folder / "unet" / NETWORK[0]
    return family, int((read_json(config) if config.is_file() else {}).get("num_class_embeds") or 0)


def _look_at_source(key: str, place: str | None, draft: Draft, about: str) -> _Seen | None:
    """Sets a source of images, and returns what is seen in it; without one, asks for it."""
    name = key.split(".")[1]
    if place is None:
        draft.questions[key] = f"{about}, for example {{folder: DIR}}"
        return None
    settings = _source_of(Path(place), "test" if name == "holdout" else None)
    draft.task[name] = settings
    seen = _Seen()
    try:
        source: Any = TypeAdapter(Source).validate_python(settings)
        for record in islice(source.records(Tally()), LOOKED_AT):
            seen.count += 1
            seen.captions += record.caption is not None
            seen.labels.update([record.label] if record.label is not None else [])
            seen.keys += [record.key] if len(seen.keys) < NAMED else []
    except SourceError as error:
        raise ConfigError(str(error)) from error
    if not seen.count:
        raise ConfigError(f"{place}: holds no image")
    return seen


def _source_of(place: Path, split: str | None) -> dict[str, Any]:
    """The settings of the source at a place: a dataset of torchvision, Parquet files, tar shards, or a folder of pictures."""
    if not place.exists():
        raise ConfigError(f"{place}: no such file or folder")
    for name, folder in TORCHVISION.items():
        if (place / folder).is_dir():
            return {"torchvision": name, "root": str(place)} | ({"split": split} if split else {})
    if place.suffix == ".parquet" or (place.is_dir() and next(place.rglob("*.parquet"), None)):
        return {"parquet": str(place)} | _columns(place)
    shards = sorted(place.glob("*.tar")) if place.is_dir() else [place] if place.suffix == ".tar" else []
    if shards:
        sources = [{"shards": str(shard)} for shard in shards]
        return sources[0] if len(sources) == 1 else {"mix": sources}
    if not place.is_dir():
        raise ConfigError(f"{place}: is no folder, Parquet file or tar")
    below = any(entry.is_dir() and not entry.name.startswith(".") for entry in place.iterdir())
    return {"folder": str(place), "label": "parent" if below else None}


def _columns(place: Path) -> dict[str, str]:
    """The columns of labels and captions of Parquet files, by their usual names."""
    from pyarrow import ArrowException
    from pyarrow.dataset import dataset

    try:
        names = dataset(sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else str(place)).schema.names
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{place}: cannot be read as Parquet: {error}") from error
    found = {
        key: next((n for n in usual if n in names), None) for key, usual in (("label", LABELS), ("caption", CAPTIONS))
    }
    return {key: name for key, name in found.items() if name is not None}


def _ask_what_to_forget(draft: Draft, kind: str, seen: _Seen | None) -> None:
    labels = seen.labels if seen else Counter()
    if kind == "points":
        found = f" Its first names are {', '.join(seen.keys)}; {seen.count} were looked at." if seen else ""
        draft.task["forget"] = {"keys": []}
        draft.questions["task.forget"] = f"which images of `train` must be forgotten, by their names (keys)?{found}"
        return
    common = ", ".join(f"{label} ({count})" for label, count in labels.most_common(SHOWN))
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    draft.task["forget"] = {"labels": []}
    draft.questions["task.forget"] = "which label must be forgotten?" + (
        f" Its images have: {common}{more}." if common else ""
    )


def _ask_for_prompts(draft: Draft, seen: _Seen | None) -> None:
    labels = [label for label, _ in seen.labels.most_common(3)] if seen else []
    example = f'{{template: "a photo of {{thing}}", slots: {{thing: [{", ".join(labels or ["..."])}]}}, label: thing}}'
    draft.questions["task.search_prompts"] = f"prompts of every label, for training and search, for example {example}"
    draft.questions["task.audit_prompts"] = (
        "other prompts of every label, which the audit uses and the search never sees"
    )
    draft.questions["task.guidance"] = "the guidance that the model is used with (Stable Diffusion: 7.5)?"


def _ask_for_oracles(draft: Draft, family: Family) -> None:
    train = (
        " Or train them here: task.base_steps, the optimiser steps of the base's training, and task.recipe."
        if "retraining" in family.abilities
        else ""
    )
    draft.questions["oracle_models"] = (
        f"folders of at least 3 models retrained without what must be forgotten, from different seeds?{train}"
    )


def _choose_methods(draft: Draft, family: str, kind: str) -> None:
    """Those of the default methods that serve the model and the task, and what a contrastive model needs of their spaces."""
    record: Family = resolve("family", family)
    defaults = Sweep.model_fields["methods"].get_default()
    classes = {name: resolve("method", name) for name in defaults}
    draft.values["methods"] = [n for n, m in classes.items() if kind in m.kinds and not unserved(m, family)]
    if record.model_kind == "contrastive":  # its losses are bounded, so ascent needs no truncation
        draft.values["spaces"] = {n: {"trunc_elem_sq": None} for n in ("graddiff", "rgd")}
