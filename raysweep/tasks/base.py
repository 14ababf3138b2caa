"""The base class of all tasks' settings, and the metrics that raysweep's tasks minimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from raysweep.tasks.task import Task


class HasObjectives(Protocol):
    """A task, or another record of the metrics of its objectives (see `ObjectiveMetrics`)."""

    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def quality(self) -> str: ...
    @property
    def validity(self) -> str: ...


@dataclass(frozen=True)
class ObjectiveMetrics:
    """The metrics of a task's objectives, as CHECK.METRIC.

    views: the worst of them is the residue; quality: the metric behind the damage; validity: the share of valid samples.
    """

    views: tuple[str, ...]
    quality: str = "fidelity.frechet"
    validity: str = "classifier.validity"


# By what a diffusion model forgets (a concept counts as a class), or by the kind of contrastive model.
OBJECTIVES = {
    "points": ObjectiveMetrics(
        (
            "reconstruction.correlation",
            "denoising.forget_log_loss",
            "generation.rate",
            "altered.presence@mirror",
            "altered.presence@negative",
            "altered.presence@shift",
            "altered.presence@crop",
        )
    ),
    "class": ObjectiveMetrics(
        ("classifier.recognised", "classifier.leak", "relearning.presence", "denoising.unlabelled_log_loss")
    ),
    "contrastive": ObjectiveMetrics(
        ("contrast.recognised", "contrast.forget_similarity"), "contrast.retain_loss", "contrast.validity"
    ),
    "answers": ObjectiveMetrics(
        ("questions.forget_accuracy", "contrast.recognised"), "questions.retain_error", "questions.validity"
    ),
}


class TaskSettings(BaseModel):
    """Validated settings of a task; `build` makes the task from them.

    A task of another package is a subclass with `name: Literal["NAME"] = "NAME"`, registered under the entry point NAME. If its
    base model is given and has no recipe for oracles, it sets `base_steps` to 0. A property `warnings` (texts) may report
    settings that work but are unwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int = Field(0, ge=0, description="seed of the splits, and of the training of base and oracles")

    def build(self) -> Task:
        """Reads the data and cuts the splits; raises ValueError, with a message for users, if that cannot be done."""
        raise NotImplementedError


class StoredTask(TaskSettings):
    """Settings of a task whose package is not installed, as read back from a run: enough to show the run."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def build(self) -> Task:
        """Raises ValueError: a task's data cannot be read without its package."""
        raise ValueError(f"{self.name!r} is a task of a package that is not installed here; install it")
