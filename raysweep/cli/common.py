"""Exit codes, errors, paths and output that several verbs share."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO

import click

if TYPE_CHECKING:
    from raysweep.cli.display import Display
    from raysweep.config.schema import Sweep
    from raysweep.rundir import RunDir

OK, FAILED, BAD_INPUT, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

P = ParamSpec("P")


def reports_errors(verb: Callable[P, int]) -> Callable[P, None]:
    """Decorates a verb: exits with the code that it returns, and prints errors that users can fix as one sentence."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from raysweep.config.schema import ConfigError
        from raysweep.registry import RegistryError
        from raysweep.search.spaces import SpaceError
        from raysweep.storage.files import StoreError
        from raysweep.storage.places import PlaceError, check_home

        try:
            check_home()
            code = verb(*args, **kwargs)
        except (ConfigError, PlaceError, SpaceError, RegistryError) as error:
            click.echo("\n".join(f"error: {line}" for line in str(error).splitlines()), err=True)
            code = BAD_INPUT
        except StoreError as error:
            click.echo(f"error: {error}", err=True)
            code = FAILED
        except KeyboardInterrupt:
            click.echo("Interrupted. Run the same command again to resume.", err=True)
            code = INTERRUPTED
        sys.exit(code)

    return wrapped


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides libraries' messages to developers, and prints every other warning once, on standard error.

    Warnings about how a model's folder was read are addressed to users and printed as plain sentences; others with file and
    line, as Python prints them. On exit everything is as before.
    """
    logger = logging.getLogger("ray")
    level = logger.level
    shown: set[str] = set()  # Python's own record is lost whenever a library changes the filters

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        plain = category.__name__ in ("ReadOtherwise", "OlderName")  # by name: the module of one imports torch
        text = f"warning: {message}\n" if plain else warnings.formatwarning(message, category, filename, lineno, line)
        if text not in shown:
            click.echo(text, err=True, nl=False)
        shown.add(text)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.showwarning = show
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def run_display(mode: str | None = None) -> Iterator[Display]:
    """Displays what the engine does in the block; a run that fails there ends the command with its reason and exit code 1."""
    from raysweep.cli.display import Display
    from raysweep.engine.cluster import RunFailed

    with Display(mode) as display:
        try:
            yield display
        except RunFailed as error:
            display.say("failed", str(error))
            if display.mode == "none":
                click.echo(f"error: {error}", err=True)
            raise SystemExit(FAILED) from error


def load_sweep(config: str | None, overrides: tuple[str, ...], absent: bool = False) -> Sweep:
    """The sweep of the arguments CONFIG and key=value; CONFIG may be a file, a preset or itself a key=value.

    absent: accept paths of data and models that do not exist, as a plan does.
    """
    from raysweep.config.reader import load

    if config is not None and "=" in config:
        overrides, config = (config, *overrides), None
    return load(None if config is None else config_path(config), overrides, absent)


def config_path(name: str) -> Path:
    """The file of a config, named by its path or as a preset."""
    from raysweep.config import presets

    return presets.file_of(name)


def open_run(name: str) -> RunDir:
    """A run, named by its directory or below ./runs; raises ConfigError if it is neither."""
    from raysweep.rundir import RunDir

    return RunDir.open(name)


def require_absent(path: Path, noun: str = "place") -> None:
    """Raises ConfigError if something exists at a path that a verb is about to write."""
    from raysweep.config.schema import ConfigError

    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another {noun}")


def short_path(path: Path) -> str:
    """The path relative to the working directory if it lies below it."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def read_front(folder: RunDir) -> dict[str, Any]:
    """The content of a run's front.json; empty if the run has none."""
    content: dict[str, Any] = json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}
    return content


def print_json(data: Any) -> None:
    """Prints data for machines."""
    click.echo(json.dumps(data, indent=2))


def print_warnings(sweep: Sweep) -> None:
    """Prints warnings about settings that are valid but probably mistakes."""
    for text in sweep.warnings:
        click.echo(f"warning: {text}", err=True)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints measurements, one a line: name, value, number of units, interval, and what limits it or why there is none."""
    for row in rows:
        name = f"{row['check']}.{row['metric']}" + (f" - {row['paired_with']}" if row["paired_with"] else "")
        if row["status"] != "ok":
            click.echo(f"  {name:<34} {row['status']}: {row['reason']}")
            continue
        interval = ""
        if row["lo"] is not None:
            interval = f"95 % interval {row['lo']:.3g} to {row['hi']:.3g} ({row['interval']})"
        limits = "; ".join(filter(None, (interval, row["reason"])))
        click.echo(f"  {name:<34} {row['value']:>9.4g}  n={row['n']:<5} {limits}".rstrip())
