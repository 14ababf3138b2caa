"""Sections of a sweep's settings: how it is searched and trained, and with which resources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from raysweep.registry import names, suggest
from raysweep.settings import ASIDE


class Section(BaseModel):
    """Frozen settings without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_stored(info: ValidationInfo) -> bool:
    """Whether a config is read back from a run: packages and files that it names may be missing."""
    return bool((info.context or {}).get("stored"))


class SearchConfig(Section):
    """Settings of the search over hyperparameters."""

    trials: int = Field(36, ge=1, description="number of trials, shared equally between the methods")
    sampler: str = Field("tpe", description="sampler of hyperparameters: tpe, random, or one of another package")
    batch: int = Field(
        6,
        ge=1,
        description="trials suggested at once, from the results of all batches but the previous one, which is still running",
    )
    seed: int = Field(0, ge=0, description="seed of the sampler and of every trial")
    min_validity: float = Field(
        0.2, ge=0, le=1, description="constraint of the search: smallest share of valid samples of a candidate, 0 to 1"
    )

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if value not in names("sampler") and not is_stored(info):
            raise ValueError(f"{value!r} is not a sampler{suggest(value, names('sampler'))}")
        return value


class LoRA(Section):
    """Low-rank adapters on the attention of a text-to-image U-Net, merged before the audit (needs the extra `lora`)."""

    rank: int = Field(4, ge=1, description="rank of the adapters")
    alpha: int = Field(4, ge=1, description="scale of the adapters, times the rank")


class TrainConfig(Section):
    """Settings of the training of trials."""

    executor: Annotated[Literal["warm", "isolated"], ASIDE] = Field(
        "warm",
        description="warm: long-lived worker groups that train one trial after another; isolated: one group per trial",
    )
    workers: Annotated[int, ASIDE] = Field(1, ge=1, le=512, description="data-parallel workers per trial, 1 to 512")
    modules: tuple[str, ...] = Field(
        (),
        description="text-to-image models: the modules whose weights may change (unet, text_encoder, ...); empty: all",
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


class CandidatesConfig(Section):
    """Which candidates a run keeps on disk. The others keep their settings, results and hash; `raysweep remake` makes them again."""

    keep: Literal["all", "front", "audited"] = Field(
        "audited",
        description="all: every candidate; audited: those that the final audit measures; front: of those, when the run is complete, the "
        "members of the front and the recommended one",
    )
