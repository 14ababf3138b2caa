"""What the shell offers to complete: presets, settings, runs and trials (see README, "Commands")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    import click
    from pydantic import BaseModel


def configs(context: click.Context, argument: click.Parameter, begun: str) -> list[CompletionItem]:
    """Presets, files, and the settings that may stand in place of a config."""
    from raysweep.config import presets

    known = [CompletionItem(name) for name in presets.names() if name.startswith(begun)]
    return [*known, *settings(context, argument, begun), CompletionItem(begun, type="file")]


def settings(context: click.Context, argument: click.Parameter, begun: str) -> list[CompletionItem]:
    """Dotted settings, each with its description, up to the equals sign; of tasks those of every task of this package."""
    from raysweep.config.schema import Sweep
    from raysweep.registry import TASKS, resolve

    if "=" in begun:
        return []
    keys = dict(_keys(Sweep, ""))
    if begun.startswith("task."):
        keys |= {key: about for task in TASKS for key, about in _keys(resolve("task", task), "task.")}
    return [CompletionItem(f"{key}=", help=about) for key, about in keys.items() if key.startswith(begun)]


def runs(context: click.Context, argument: click.Parameter, begun: str) -> list[CompletionItem]:
    """The runs below ./runs, by name, and folders."""
    from raysweep.rundir import STORAGE, list_runs

    names = [run.path.name for run in list_runs(STORAGE)]
    return [*(CompletionItem(n) for n in names if n.startswith(begun)), CompletionItem(begun, type="dir")]


def trials(context: click.Context, argument: click.Parameter, begun: str) -> list[CompletionItem]:
    """The trials of the run that was named which made a candidate; runs, if none was named yet."""
    from raysweep.config.schema import ConfigError
    from raysweep.models.folders import CARD
    from raysweep.rundir import RunDir

    named = context.params.get("run") or next(iter(context.params.get("subjects") or ()), None)
    if named is None:
        return runs(context, argument, begun)
    try:
        folder = RunDir.open(named)
    except ConfigError:
        return []
    return [
        CompletionItem(p.parent.name)
        for p in sorted(folder.candidates.glob(f"*/{CARD}"))
        if p.parent.name.startswith(begun)
    ]


def _keys(kind: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """The dotted settings of a section and of the sections in it, each with its description."""
    from pydantic import BaseModel

    for name, field in kind.model_fields.items():
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""
