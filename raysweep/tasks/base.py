"""The base class of all tasks' settings, raysweep's and other packages'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from raysweep.tasks.task import Task


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
