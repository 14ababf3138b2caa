"""What the settings of every task have, raysweep's and other packages'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from raysweep.tasks.task import Task


class TaskSettings(BaseModel):
    """Settings of a task, which are checked as they are read, and `build`, which makes the task of them.

    A task of another package is a subclass with `name: Literal["NAME"] = "NAME"` under the entry point NAME. One that is given
    a base model without a recipe for oracles sets `base_steps` to 0; `warnings` (a property, tuple of texts) tells people what
    works and is still unwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int = Field(0, ge=0, description="seed of the splits, and of the training of base and oracles")

    def build(self) -> Task:
        """Reads the data and cuts the splits; raises ValueError, with a message for people, if that cannot be done."""
        raise NotImplementedError


class StoredTask(TaskSettings):
    """The settings of a task whose package is not installed, as a run left them: enough to read the run."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def build(self) -> Task:
        """Raises ValueError: without its package the data of a task cannot be read."""
        raise ValueError(f"{self.name!r} is a task of a package that is not installed here; install it")
