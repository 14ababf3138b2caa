"""Sections of a sweep's settings: how it is searched and trained, and with which resources."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from raysweep.registry import names, suggest
from raysweep.settings import ASIDE
from raysweep.storage.places import Place
from raysweep.tasks.unions import tag


class Section(BaseModel):
    """Frozen settings without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_stored(info: ValidationInfo) -> bool:
    """Whether a config is read back from a run: packages and files that it names may be missing."""
    return bool((info.context or {}).get("stored"))


class OlderName(UserWarning):
    """A config uses the older name of a setting, and is read as the message says."""


class SearchConfig(Section):
    """Settings of the search over hyperparameters."""

    trials: int = Field(36, ge=1, description="number of trials, shared equally between the methods")
    sampler: str = Field("tpe", description="sampler of hyperparameters: tpe, random, or one of another package")
    window: int | Literal["auto"] = Field(
        "auto",
        description="trials suggested ahead of results: a suggestion sees the results of all trials but the (window - 1) before it and "
        "waits for them, so that it depends neither on the number of workers nor on their order; auto: from the cluster that the run "
        "starts on, at most half of the trials, and kept when the run is resumed",
    )
    asynchronous: bool = Field(
        False,
        description="suggest from whatever has ended and never wait: keeps all slots busy, but the trials then depend on the number and "
        "the speed of workers, and the same config and seed give another search each time",
    )
    seed: int = Field(0, ge=0, description="seed of the sampler and of every trial")
    min_validity: float = Field(
        0.2, ge=0, le=1, description="constraint of the search: smallest share of valid samples of a candidate, 0 to 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _batches(cls, data: Any) -> Any:
        """Reads `batch` as the window that had as many trials under way: a batch and the one before it."""
        if not isinstance(data, dict) or not isinstance(batch := data.get("batch"), int) or batch < 1:
            return data
        if "window" in data:
            raise ValueError("batch: is an older name of window, which is given as well; leave batch out")
        warnings.warn(
            f"search.batch={batch} is read as search.window={2 * batch}; name the window", OlderName, stacklevel=2
        )
        return {key: value for key, value in data.items() if key != "batch"} | {"window": 2 * batch}

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if value not in names("sampler") and not is_stored(info):
            raise ValueError(f"{value!r} is not a sampler{suggest(value, names('sampler'))}")
        return value

    @field_validator("window", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"must be a whole number from 1, or auto, not {value!r}")
        return value

    @model_validator(mode="after")
    def _waits(self) -> Self:
        if self.asynchronous and self.window != "auto":
            raise ValueError(
                "asynchronous: suggestions wait for nothing, so there is no window; leave search.window out"
            )
        return self


class LoRA(Section):
    """Low-rank adapters on the attention of a text-to-image U-Net or transformer, merged before the audit (needs the extra `lora`)."""

    rank: int = Field(4, ge=1, description="rank of the adapters")
    alpha: int = Field(4, ge=1, description="scale of the adapters, times the rank")


class TrainConfig(Section):
    """Settings of the training of trials."""

    executor: Annotated[Literal["warm", "isolated"], ASIDE] = Field(
        "warm",
        description="warm: long-lived workers that train one trial after another; isolated: fresh workers for each trial",
    )
    workers: Annotated[int, ASIDE] = Field(1, ge=1, le=512, description="data-parallel workers per trial, 1 to 512")
    modules: tuple[str, ...] = Field(
        (),
        description="text-to-image models: the modules whose weights may change (unet or transformer, text_encoder, ...); empty: all",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of forward and backward passes; weights and their updates always use fp32"
    )
    lora: LoRA | None = Field(
        None, description="text-to-image models: train low-rank adapters instead of the weights; null: the weights"
    )
    budget_s: Annotated[float, ASIDE] = Field(600, gt=0, description="seconds after which a trial counts as hung")
    checkpoint_s: Annotated[float, ASIDE] = Field(
        60, gt=0, description="seconds between the checkpoints of a running trial"
    )


class ExpectedNodes(Section):
    """Nodes of one role that a cluster will have."""

    nodes: int = Field(ge=1, description="number of nodes")
    cpus: float = Field(gt=0, description="CPUs of each")
    gpus: float = Field(0, ge=0, description="GPUs of each")


class Expected(Section):
    """Nodes that a cluster will have, by role."""

    train: ExpectedNodes | None = Field(None, description="nodes that train, labelled role=train")
    audit: ExpectedNodes | None = Field(None, description="nodes that audit, labelled role=audit")
    any: ExpectedNodes | None = Field(None, description="nodes that do both")


class ResourceConfig(Section):
    """CPUs and GPUs of train workers and auditors; null: chosen from the cluster (see `raysweep run --dry-run`)."""

    cpus_per_worker: float | None = Field(None, gt=0, description="CPUs per train worker")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs per train worker")
    gpus_per_auditor: float | None = Field(
        None, gt=0, description="GPUs per auditor; more than 1 for a vision-language model that does not fit on one GPU"
    )
    slots: int | None = Field(None, ge=1, description="number of trials trained at the same time")
    auditors: int | None = Field(None, ge=1, description="number of auditors")
    cpus: int | None = Field(None, ge=1, description="CPUs of the local Ray instance; null: all cores")
    expect: (
        Annotated[
            Annotated[Place, Tag(tag("launcher file"))] | Annotated[Expected, Tag(tag("roles"))],
            Discriminator(lambda value: tag("launcher file" if isinstance(value, str | Path) else "roles")),
        ]
        | None
    ) = Field(
        None,
        description="nodes to plan for and to ask the autoscaler for: a launcher file, such as cluster.yaml, or by role, such as "
        "{train: {nodes: 3, cpus: 192, gpus: 8}, audit: {nodes: 1, cpus: 192, gpus: 8}}; null: the nodes that have joined at the start",
    )
    wait_s: float = Field(1800, ge=0, description="seconds to wait until the first of the expected nodes can work")


class CandidatesConfig(Section):
    """Which candidates a run keeps on disk. The others keep their settings, results and hash; `raysweep remake` makes them again."""

    keep: Literal["all", "front", "audited"] = Field(
        "audited",
        description="all: every candidate; audited: those that the final audit measures; front: of those, when the run is complete, the "
        "members of the front and the recommended one",
    )
