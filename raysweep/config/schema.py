"""The configuration of a sweep: pydantic models, read from YAML, overridden by key=value, frozen, no unknown keys."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raysweep.config import presets
from raysweep.registry import EVALUATORS, UnknownName, attacks, checks_by_weights, names, resolve, suggest
from raysweep.settings import ASIDE, BUDGET, TIMEOUT, asides
from raysweep.storage.places import Place
from raysweep.storage.seeds import derive_seed
from raysweep.storage.texts import dump_yaml
from raysweep.tasks.base import StoredTask, TaskSettings
from raysweep.tasks.digits import PictureTask

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ConfigError(ValueError):
    """A mistake of the user's in a configuration; the message says where, what, and what would be valid."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Aims(Protocol):
    """The metrics that a task's objectives are made of."""

    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def quality(self) -> str: ...
    @property
    def validity(self) -> str: ...


class Tier(_Model):
    """What one tier of the audit measures, and on which seeds."""

    seed: int = Field(ge=0, description="seed of every random draw of the tier; tiers must differ")
    judge: Literal["probe", "audit"] = Field(description="the judge, each trained on its own images")
    checks: tuple[str, ...] | None = Field(None, description="evaluators, by name; null: what the objectives need")
    groups: int = Field(10, ge=2, le=100, description="groups of the jackknife")
    samples: int = Field(200, ge=20, description="samples of the retained content")
    class_samples: int = Field(60, ge=10, description="samples under the forgotten label")
    noises: int = Field(40, ge=2, description="noise draws of a reconstruction")
    injection_t: int = Field(600, ge=1, description="step to which a reconstruction is noised")
    injection_steps: int = Field(12, ge=1, description="steps of a reconstruction")
    loss_noises: int = Field(10, ge=2, description="noises of the loss bank")
    loss_images: int = Field(4, ge=1, description="images per split for denoising losses")
    timesteps: int = Field(10, ge=1, description="equally spaced steps of a denoising loss")
    membership_t: tuple[int, ...] = Field(
        (20, 50, 100, 200, 300), min_length=1, description="grid of steps of membership inference"
    )
    membership_noises: int = Field(4, ge=1, description="noises per image and step of the membership score")
    membership_images: int = Field(100, ge=2, description="images per population of membership inference")
    relearn_steps: tuple[int, ...] = Field((5,), min_length=1, description="optimiser steps of relearning, each tried")
    inversion_steps: int = Field(150, ge=1, description="optimiser steps of the inversion of a class embedding")
    recall_t: tuple[int, ...] = Field(
        (100, 250, 400, 600, 800), min_length=1, description="steps of the reconstruction curve"
    )
    recall_noises: int = Field(6, ge=2, description="noise draws per image and step of the reconstruction curve")
    recall_images: int = Field(20, ge=1, description="images per population of the reconstruction curve")
    likelihood_steps: int = Field(20, ge=2, description="steps of the likelihood's solver")
    likelihood_probes: int = Field(5, ge=1, description="random directions per image of the likelihood's divergence")
    weights: dict[Literal["sscd", "clip", "dino", "inception", "classifier", "detector"], Place] = Field(
        default_factory=dict, description="files of outside networks; each adds the checks that it serves"
    )
    strips: int = Field(0, ge=0, le=32, description="samples kept as pictures for the report")
    full_fidelity: bool = Field(True, description="KID, precision and recall besides the Frechet distance")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the network's passes when images are drawn; losses and scores of given images are fp32"
    )

    @field_validator("checks")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        valid = names("evaluator")
        for name in value or ():
            if name not in valid and not _is_stored(info):
                raise ValueError(f"{name!r} is not an evaluator{suggest(name, valid)}")
        return value

    @model_validator(mode="after")
    def _enough_units(self, info: ValidationInfo):
        for brought, path in self.weights.items():
            if not path.exists() and not (info.context or {}).get("absent") and not _is_stored(info):
                raise ValueError(f"weights.{brought}: {path} does not exist")
        for name in self.checks or ():
            key = checks_by_weights().get(name)
            if key is not None and key not in self.weights:
                raise ValueError(f"checks: {name!r} needs weights.{key}")
        for key in ("samples", "class_samples", "noises", "loss_noises"):
            if getattr(self, key) < self.groups:
                raise ValueError(f"{key}: {getattr(self, key)} units cannot form {self.groups} groups of the jackknife")
        return self

    def checks_for(self, task: Aims) -> tuple[str, ...]:
        """The checks of this tier on a task: the configured ones, or those that its objectives are made of."""
        needed = dict.fromkeys(metric.split(".")[0] for metric in (*task.views, task.quality, task.validity))
        chosen = self.checks if self.checks is not None else tuple(needed)
        brought = (name for name, key in checks_by_weights().items() if key in self.weights)
        return tuple(dict.fromkeys((*chosen, *brought)))

    @property
    def digest(self) -> str:
        """Hash of every setting, and of what the weights' files hold."""
        settings = self.model_dump_json(exclude={"weights"}) + self.weights_digest
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def weights_digest(self) -> str:
        """Hash of the contents of all weights' files."""
        return ",".join(f"{key}={_digest_of_files(path)}" for key, path in sorted(self.weights.items()))

    def sizes(self) -> dict[str, Any]:
        """The numbers that evaluators read."""
        return self.model_dump(exclude={"seed", "checks", "groups", "strips"})


def _probe() -> Tier:
    return Tier(seed=1, judge="probe", full_fidelity=False)


def _audit() -> Tier:
    left_out = {*attacks(), *checks_by_weights(), *(n for n, check in EVALUATORS.items() if check.costly)}
    left_out.remove("relearning")  # a view of tasks about a class
    return Tier(
        seed=2, judge="audit", checks=tuple(sorted(set(EVALUATORS) - left_out)), groups=20, samples=800,
        class_samples=200, noises=60, loss_noises=20, loss_images=10, strips=8,
    )  # fmt: skip


def _durability() -> Tier:
    return Tier(
        seed=3, judge="audit", checks=attacks(), groups=10, class_samples=100, noises=40, relearn_steps=(5, 25),
        full_fidelity=False,
    )  # fmt: skip


class AuditConfig(_Model):
    """The two tiers, and how many candidates the second one re-measures."""

    probe: Tier = Field(default_factory=_probe, description="cheap tier that steers the search")
    audit: Tier = Field(default_factory=_audit, description="full tier for front candidates, base and oracle")
    durability: Tier = Field(default_factory=_durability, description="attacks on the finalists, base and oracles")
    top: int = Field(
        8, ge=1, description="at most this many candidates are audited, but always the best of each method"
    )
    rounds: int = Field(
        2,
        ge=1,
        le=50,
        description="audits on fresh seeds, at most, of candidates whose place on the front is uncertain",
    )
    finalists: int = Field(3, ge=0, description="at most this many of the audited are attacked, the best first")
    require: dict[str, str] = Field(
        default_factory=dict, description="what a recommended candidate must show: check.metric -> '>= x' or '<= x'"
    )
    attempts: Annotated[int, ASIDE] = Field(3, ge=1, description="tries per audit before it is recorded as failed")
    timeout_s: Annotated[float, ASIDE] = Field(600, gt=0, description="seconds after which an audit counts as hung")

    def checks_for(self, task: Aims) -> tuple[str, ...]:
        """The checks of all tiers on a task, each once."""
        return tuple(dict.fromkeys(n for t in (self.probe, self.audit, self.durability) for n in t.checks_for(task)))

    def round(self, number: int) -> tuple[str, Tier]:
        """(name, tier) of the audit's first or a later round, which has seeds of its own and keeps no pictures."""
        if number == 1:
            return "audit", self.audit
        seed = derive_seed("audit round", self.audit.seed, number)
        return f"audit-{number}", self.audit.model_copy(update={"seed": seed, "strips": 0})

    @model_validator(mode="after")
    def _apart(self):
        if len({self.probe.seed, self.audit.seed, self.durability.seed}) < 3:
            raise ValueError(
                f"probe.seed {self.probe.seed}, audit.seed {self.audit.seed} and durability.seed {self.durability.seed} "
                "overlap: search, audit and attacks must differ"
            )
        if self.probe.judge == self.audit.judge:
            raise ValueError(f"probe.judge and audit.judge are both {self.audit.judge!r}: search and audit must differ")
        return self


class SearchConfig(_Model):
    """How hyperparameters are explored."""

    trials: int = Field(36, ge=1, description="trials in all, shared equally between the methods")
    sampler: Literal["tpe", "random"] = Field("tpe", description="Optuna sampler")
    batch: int = Field(
        6, ge=1, description="trials suggested at once, from the results of all batches but the one that runs meanwhile"
    )
    seed: int = Field(0, ge=0, description="seed of the sampler and, through it, of every trial")
    min_validity: float = Field(0.2, ge=0, le=1, description="constraint: share of valid samples a candidate must keep")


class LoRA(_Model):
    """Low-rank adapters on the attention of a text-to-image U-Net, merged before the audit (needs the extra `lora`)."""

    rank: int = Field(4, ge=1, description="rank of the adapters")
    alpha: int = Field(4, ge=1, description="their scale times the rank")


class TrainConfig(_Model):
    """How trials are trained."""

    executor: Annotated[Literal["warm", "isolated"], ASIDE] = Field(
        "warm", description="long-lived worker groups, or one per trial"
    )
    workers: Annotated[int, ASIDE] = Field(1, ge=1, le=512, description="data-parallel workers per trial")
    modules: tuple[str, ...] = Field(
        (),
        description="text-to-image models: the modules whose weights may change (unet, text_encoder, ...); empty: all",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the passes of a trial's training; weights and their updates are fp32 in either case"
    )
    lora: LoRA | None = Field(None, description="text-to-image models: train low-rank adapters instead of weights")
    budget_s: Annotated[float, ASIDE] = Field(600, gt=0, description="seconds after which a trial counts as hung")
    checkpoint_s: Annotated[float, ASIDE] = Field(
        60, gt=0, description="seconds between the checkpoints of a running trial"
    )


class ResourceConfig(_Model):
    """What one worker takes; null: chosen from the cluster (see `raysweep run --dry-run`)."""

    cpus_per_worker: float | None = Field(None, gt=0, description="CPUs per train worker")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs per train worker")
    gpus_per_auditor: float | None = Field(
        None, gt=0, description="GPUs per auditor; several for a vision-language model that one does not hold"
    )
    slots: int | None = Field(None, ge=1, description="trials trained at the same time")
    auditors: int | None = Field(None, ge=1, description="audit actors")
    cpus: int | None = Field(None, ge=1, description="CPUs of the local Ray instance; null: all cores")


class Sweep(_Model):
    """One sweep: a task, the methods that compete on it, and how they are searched, trained and audited."""

    name: Annotated[str, ASIDE] = Field(
        "digits-picture", description="name of the run; becomes a part of its directory"
    )
    task: SerializeAsAny[TaskSettings] = Field(default_factory=PictureTask)
    methods: tuple[str, ...] = Field(
        ("finetune", "neggrad", "graddiff", "rgd", "siss", "siss_no_is"), min_length=1, description="methods, by name"
    )
    spaces: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="overrides of search_spaces/<method>.yaml"
    )
    oracles: int = Field(2, ge=1, le=20, description="retrained models, each with a seed of its own")
    oracle_models: tuple[Place, ...] = Field(
        (), description="diffusers folders of retrained models; empty: trained here"
    )
    search: SearchConfig = Field(default_factory=SearchConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    resources: Annotated[ResourceConfig, ASIDE] = Field(default_factory=ResourceConfig)
    preset: Annotated[str | None, ASIDE] = Field(
        None, description="the paper's experiment that this is (`raysweep ls presets`)"
    )
    scale: Annotated[presets.Scale | None, ASIDE] = Field(
        None, description="paper, or tiny: on miniatures of its models and data"
    )
    storage: Annotated[Place, ASIDE] = Field(
        Path("runs"), validate_default=True, description="folder of run directories; shared by all nodes of a cluster"
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
            if not _is_stored(info):
                raise
            kind = StoredTask
        return kind.model_validate(value, context=info.context)

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        valid = names("method")
        for name in value:
            if name not in valid and not _is_stored(info):
                raise ValueError(f"{name!r} is not a method{suggest(name, valid)}")
            if name == "retrain":
                raise ValueError("'retrain' is the oracle of every sweep and not searched; set `oracles` for its seeds")
        if len(set(value)) != len(value):
            raise ValueError("a method is listed twice")
        return value

    @model_validator(mode="after")
    def _consistent(self):
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
        """What works and is still unwise, for people."""
        return list(getattr(self.task, "warnings", ()))

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain data."""
        return self.model_dump(mode="json")

    def recipe(self) -> str:
        """Every setting as YAML, which reads as this sweep again."""
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
        """The limits of time that end a trial, by setting: one that failed by such a limit is tried again under a wider one."""
        return {BUDGET: self.train.budget_s, TIMEOUT: self.audit.timeout_s}


def _is_stored(info: ValidationInfo) -> bool:
    """Whether a config is that of a run, which may be read where its packages and files are not."""
    return bool((info.context or {}).get("stored"))


def _digest_of_files(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return _digest_of_contents(path, tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@lru_cache(maxsize=64)
def _digest_of_contents(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files by name and content, read once as long as they do not change."""
    found = hashlib.sha256()
    for file, _, size in files:
        found.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]
