"""The configuration of a sweep: pydantic models, read from YAML, overridden by key=value, frozen, no unknown keys."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from raysweep.config import presets
from raysweep.config.sections import ResourceConfig, SearchConfig, Section, TrainConfig, is_stored
from raysweep.registry import EVALUATORS, UnknownName, attacks, checks_by_weights, names, resolve, suggest
from raysweep.settings import ASIDE, BUDGET, TIMEOUT, asides
from raysweep.storage.files import digest_of_files
from raysweep.storage.places import Place
from raysweep.storage.seeds import derive_seed
from raysweep.storage.texts import dump_yaml
from raysweep.tasks.base import HasObjectives, StoredTask, TaskSettings
from raysweep.tasks.digits import PictureTask

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ConfigError(ValueError):
    """A configuration is invalid; the message says where, what is wrong, and what would be valid."""


class Tier(Section):
    """One tier of the audit: its checks, sample sizes and seeds."""

    seed: int = Field(ge=0, description="seed of every random draw of the tier; tiers must differ")
    judge: Literal["probe", "audit"] = Field(
        description="the judge (classifier of this task's images) that is used; the two learn from disjoint images"
    )
    checks: tuple[str, ...] | None = Field(
        None, description="evaluators, by name (`raysweep ls evaluators`); null: those that the objectives need"
    )
    groups: int = Field(10, ge=2, le=100, description="groups of units that the jackknife leaves out in turn, 2 to 100")
    samples: int = Field(200, ge=20, description="samples of the retained content, at least `groups`")
    class_samples: int = Field(60, ge=10, description="samples of the forgotten class or concept, at least `groups`")
    noises: int = Field(40, ge=2, description="noise draws per reconstruction, at least `groups`")
    injection_t: int = Field(600, ge=1, description="diffusion timestep to which an image is noised for reconstruction")
    injection_steps: int = Field(12, ge=1, description="sampler steps of a reconstruction")
    loss_noises: int = Field(10, ge=2, description="noise draws per image of a denoising loss, at least `groups`")
    loss_images: int = Field(4, ge=1, description="images per split of denoising losses")
    timesteps: int = Field(10, ge=1, description="number of equally spaced diffusion timesteps of a denoising loss")
    membership_t: tuple[int, ...] = Field(
        (20, 50, 100, 200, 300), min_length=1, description="diffusion timesteps at which membership is scored"
    )
    membership_noises: int = Field(4, ge=1, description="noise draws per image and timestep of the membership score")
    membership_images: int = Field(
        100, ge=2, description="images per population (forgotten, held out) of membership inference"
    )
    relearn_steps: tuple[int, ...] = Field(
        (5,), min_length=1, description="optimiser steps after which relearning is measured, each value in turn"
    )
    inversion_steps: int = Field(
        150,
        ge=1,
        description="optimiser steps of the inversion attack, which searches for an embedding of the forgotten class",
    )
    recall_t: tuple[int, ...] = Field(
        (100, 250, 400, 600, 800), min_length=1, description="diffusion timesteps of the reconstruction curve"
    )
    recall_noises: int = Field(6, ge=2, description="noise draws per image and timestep of the reconstruction curve")
    recall_images: int = Field(20, ge=1, description="images per population of the reconstruction curve")
    likelihood_steps: int = Field(20, ge=2, description="steps of the ODE solver of the likelihood")
    likelihood_probes: int = Field(
        5, ge=1, description="random directions per image that estimate the divergence in the likelihood"
    )
    weights: dict[Literal["sscd", "clip", "dino", "inception", "classifier", "detector"], Place] = Field(
        default_factory=dict, description="files of external networks, by kind; each adds the checks that need it"
    )
    strips: int = Field(0, ge=0, le=32, description="samples saved as pictures for the report, 0 to 32")
    full_fidelity: bool = Field(True, description="measure KID, precision and recall besides the Frechet distance")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the network when images are generated; losses and scores always use fp32"
    )

    @field_validator("checks")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        valid = names("evaluator")
        for name in value or ():
            if name not in valid and not is_stored(info):
                raise ValueError(f"{name!r} is not an evaluator{suggest(name, valid)}")
        return value

    @model_validator(mode="after")
    def _enough_units(self, info: ValidationInfo) -> Self:
        for kind, path in self.weights.items():
            if not path.exists() and not (info.context or {}).get("absent") and not is_stored(info):
                raise ValueError(f"weights.{kind}: {path} does not exist")
        for name in self.checks or ():
            key = checks_by_weights().get(name)
            if key is not None and key not in self.weights:
                raise ValueError(f"checks: {name!r} needs weights.{key}")
        for key in ("samples", "class_samples", "noises", "loss_noises"):
            if getattr(self, key) < self.groups:
                raise ValueError(f"{key}: {getattr(self, key)} units cannot form {self.groups} groups of the jackknife")
        return self

    def checks_for(self, task: HasObjectives) -> tuple[str, ...]:
        """The checks of this tier: the configured ones, or those that the task's objectives need; then those of `weights`."""
        needed = dict.fromkeys(metric.split(".")[0] for metric in (*task.views, task.quality, task.validity))
        chosen = self.checks if self.checks is not None else tuple(needed)
        by_weights = (name for name, key in checks_by_weights().items() if key in self.weights)
        return tuple(dict.fromkeys((*chosen, *by_weights)))

    @property
    def digest(self) -> str:
        """Hash of every setting and of the contents of the weights' files."""
        settings = self.model_dump_json(exclude={"weights"}) + self.weights_digest
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def weights_digest(self) -> str:
        """Hash of the contents of all weights' files."""
        return ",".join(f"{key}={digest_of_files(path)}" for key, path in sorted(self.weights.items()))

    def sizes(self) -> dict[str, Any]:
        """The settings that evaluators read."""
        return self.model_dump(exclude={"seed", "checks", "groups", "strips"})


def _probe() -> Tier:
    return Tier(seed=1, judge="probe", full_fidelity=False)


def _audit() -> Tier:
    left_out = {*attacks(), *checks_by_weights(), *(n for n, check in EVALUATORS.items() if check.costly)}
    left_out.remove("relearning")  # a view of tasks about a class
    return Tier(
        seed=2,
        judge="audit",
        checks=tuple(sorted(set(EVALUATORS) - left_out)),
        groups=20,
        samples=800,
        class_samples=200,
        noises=60,
        loss_noises=20,
        loss_images=10,
        strips=8,
    )


def _durability() -> Tier:
    return Tier(
        seed=3,
        judge="audit",
        checks=attacks(),
        groups=10,
        class_samples=100,
        noises=40,
        relearn_steps=(5, 25),
        full_fidelity=False,
    )


class AuditConfig(Section):
    """The three tiers of checks, and how many candidates they measure."""

    probe: Tier = Field(default_factory=_probe, description="cheap checks of every candidate, which steer the search")
    audit: Tier = Field(default_factory=_audit, description="all checks, on candidates of the front, base and oracles")
    durability: Tier = Field(default_factory=_durability, description="attacks on the finalists, base and oracles")
    top: int = Field(
        8, ge=1, description="largest number of audited candidates; the best of each method is always audited"
    )
    rounds: int = Field(
        2,
        ge=1,
        le=50,
        description="largest number of audits, each on new seeds, of a candidate whose place on the front is uncertain, 1 to 50",
    )
    finalists: int = Field(
        3, ge=0, description="largest number of audited candidates that are attacked, the best first"
    )
    require: dict[str, str] = Field(
        default_factory=dict, description="requirements on the recommended model: check.metric -> '>= x' or '<= x'"
    )
    attempts: Annotated[int, ASIDE] = Field(
        3, ge=1, description="how often an audit is tried before it is recorded as failed"
    )
    timeout_s: Annotated[float, ASIDE] = Field(600, gt=0, description="seconds after which an audit counts as hung")

    def checks_for(self, task: HasObjectives) -> tuple[str, ...]:
        """The checks of all tiers on a task, each once."""
        return tuple(dict.fromkeys(n for t in (self.probe, self.audit, self.durability) for n in t.checks_for(task)))

    def round(self, number: int) -> tuple[str, Tier]:
        """(name, tier) of a round of the audit, counted from 1; later rounds have new seeds and save no pictures."""
        if number == 1:
            return "audit", self.audit
        seed = derive_seed("audit round", self.audit.seed, number)
        return f"audit-{number}", self.audit.model_copy(update={"seed": seed, "strips": 0})

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len({self.probe.seed, self.audit.seed, self.durability.seed}) < 3:
            raise ValueError(
                f"probe.seed {self.probe.seed}, audit.seed {self.audit.seed} and durability.seed {self.durability.seed} "
                "overlap: search, audit and attacks must differ"
            )
        if self.probe.judge == self.audit.judge:
            raise ValueError(f"probe.judge and audit.judge are both {self.audit.judge!r}: search and audit must differ")
        return self


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
        2,
        ge=1,
        le=20,
        description="number of oracles, models retrained without the forget set from different seeds, 1 to 20",
    )
    oracle_models: tuple[Place, ...] = Field(
        (), description="folders of retrained models; empty: train the oracles here"
    )
    search: SearchConfig = Field(default_factory=SearchConfig, description="how hyperparameters are searched")
    train: TrainConfig = Field(default_factory=TrainConfig, description="how trials are trained")
    audit: AuditConfig = Field(default_factory=AuditConfig, description="how candidates are measured")
    resources: Annotated[ResourceConfig, ASIDE] = Field(
        default_factory=ResourceConfig, description="CPUs and GPUs of workers and auditors"
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

    @property
    def warnings(self) -> list[str]:
        """Non-fatal problems, to display."""
        texts = list(getattr(self.task, "warnings", ()))
        count = len(self.oracle_models) or self.oracles
        if count == 1:
            key = "oracle_models" if self.oracle_models else "oracles"
            texts.append(
                f"{key}: one oracle alone does not show how far oracles differ from each other; two or more do"
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
        """Hash of all settings that a result can depend on."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def limits(self) -> dict[str, float]:
        """The time limits that end a trial, in seconds, by setting; a trial that hit one is tried again if it is raised."""
        return {BUDGET: self.train.budget_s, TIMEOUT: self.audit.timeout_s}
