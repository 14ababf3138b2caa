"""The configuration of a sweep: pydantic models, read from YAML, overridden by key=value, frozen, no unknown keys."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from raysweep.config import presets
from raysweep.config.sections import CandidatesConfig, ResourceConfig, SearchConfig, Section, TrainConfig, is_stored
from raysweep.config.tiers import AuditConfig, Drawn, Tier
from raysweep.registry import UnknownName, names, resolve, suggest
from raysweep.settings import ASIDE, BUDGET, ORACLES, TIMEOUT, asides
from raysweep.storage.places import Place
from raysweep.storage.texts import dump_yaml
from raysweep.tasks.base import StoredTask, TaskSettings
from raysweep.tasks.digits import PictureTask

__all__ = ["AuditConfig", "ConfigError", "Drawn", "Sweep", "Tier"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ConfigError(ValueError):
    """A configuration is invalid; the message says where, what is wrong, and what would be valid."""


class Sweep(Section):
    """One sweep: a task, the methods that compete on it, and how they are searched, trained and audited."""

    name: Annotated[str, ASIDE] = Field("digits-picture", description="name of the run, and of its directory")
    task: SerializeAsAny[TaskSettings] = Field(
        default_factory=PictureTask, description="the task: its name (`raysweep ls tasks`) and its settings"
    )
    methods: tuple[str, ...] = Field(
        ("finetune", "neggrad", "graddiff", "rgd", "siss", "siss_no_is"),
        min_length=1,
        description="the methods that compete, by name (`raysweep ls methods`)",
    )
    spaces: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="method -> overrides of search_spaces/METHOD.yaml"
    )
    oracles: int = Field(
        3,
        ge=1,
        le=50,
        description="number of oracles, models retrained without the forget set from different seeds, 1 to 50; fewer than 3 hardly show "
        "how much oracles differ, on which every interval depends",
    )
    oracle_models: tuple[Place, ...] = Field(
        (), description="folders of retrained models; empty: train the oracles here"
    )
    search: SearchConfig = Field(default_factory=SearchConfig, description="how hyperparameters are searched")
    train: TrainConfig = Field(default_factory=TrainConfig, description="how trials are trained")
    audit: AuditConfig = Field(default_factory=AuditConfig, description="how candidates are measured")
    candidates: Annotated[CandidatesConfig, ASIDE] = Field(
        default_factory=CandidatesConfig, description="which candidates are kept on disk"
    )
    resources: Annotated[ResourceConfig, ASIDE] = Field(
        default_factory=ResourceConfig, description="CPUs and GPUs of workers and auditors"
    )
    profile: Annotated[bool, ASIDE] = Field(
        False,
        description="print where the time of the run went, and write a time line of Ray's tasks; profile.parquet is always written",
    )
    preset: Annotated[str | None, ASIDE] = Field(
        None, description="the preset that a resolved config comes from (`raysweep ls presets`); set by raysweep"
    )
    scale: Annotated[presets.Scale | None, ASIDE] = Field(
        None, description="scale of a preset: paper, or tiny, with miniatures of its models and data"
    )
    storage: Annotated[Place, ASIDE] = Field(
        Path("runs"), validate_default=True, description="folder of run directories, on storage that all nodes share"
    )
    cache: Annotated[Place | None, ASIDE] = Field(
        None, description="folder of base models, oracles and judges; null: ~/.cache/raysweep"
    )

    @field_validator("name")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} must be 1 to 64 letters, digits, '.', '_' or '-', and start with one of the first two"
            )
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """The settings of the named task: raysweep's own, or another package's."""
        if not isinstance(value, dict | TaskSettings):
            raise ValueError(
                "must be the name of a task (`raysweep ls tasks`), or a mapping with `name` and its settings"
            )
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return value
        try:
            kind = resolve("task", value["name"])
        except UnknownName:
            if not is_stored(info):
                raise
            kind = StoredTask
        return kind.model_validate(value, context=info.context)

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        valid = names("method")
        for name in value:
            if name not in valid and not is_stored(info):
                raise ValueError(f"{name!r} is not a method{suggest(name, valid)}")
            if name == "retrain":
                raise ValueError("'retrain' is the oracle of every sweep and not searched; set `oracles` for its seeds")
        if len(set(value)) != len(value):
            raise ValueError("a method is listed twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.spaces:
            if name not in self.methods:
                raise ValueError(f"spaces.{name}: not among the methods of this sweep ({', '.join(self.methods)})")
        if self.search.trials % len(self.methods):
            raise ValueError(
                f"search.trials: {self.search.trials} cannot be shared equally by {len(self.methods)} methods; "
                f"use a multiple of {len(self.methods)}"
            )
        return self

    def with_drawn(self, drawn: Drawn) -> Sweep:
        """The sweep with what was drawn for its audits."""
        return self.model_copy(update={"audit": self.audit.with_drawn(drawn)})

    def with_window(self, window: int | None) -> Sweep:
        """The sweep with the window that `search.window: auto` came out as; None: the sweep itself."""
        if window is None or self.search.window != "auto":
            return self
        return self.model_copy(update={"search": self.search.model_copy(update={"window": window})})

    @property
    def warnings(self) -> list[str]:
        """Non-fatal problems, to display."""
        texts = list(getattr(self.task, "warnings", ()))
        count = len(self.oracle_models) or self.oracles
        if count < ORACLES:
            key = "oracle_models" if self.oracle_models else "oracles"
            texts.append(
                f"{key}: one oracle alone does not show how far oracles differ from each other, so no model can be shown to be like them; "
                f"{ORACLES} or more do"
                if count == 1
                else f"{key}: {count} oracles hardly show how far oracles differ from each other, so intervals are very wide; {ORACLES} or "
                "more give useful ones"
            )
        return texts

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain data."""
        return self.model_dump(mode="json")

    def recipe(self) -> str:
        """Every setting as YAML, from which the same sweep can be read."""
        return dump_yaml(self.resolved())

    def decisive(self) -> dict[str, Any]:
        """The settings that a result can depend on, as plain data: all but those marked `ASIDE`."""
        return self.model_dump(mode="json", exclude=asides(self))

    @property
    def digest(self) -> str:
        """Hash of all settings that a result can depend on; what is drawn when a run starts is not among them."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def limits(self) -> dict[str, float]:
        """The time limits that end a trial, in seconds, by setting; a trial that hit one is tried again if it is raised."""
        return {BUDGET: self.train.budget_s, TIMEOUT: self.audit.timeout_s}
