"""Verbs to start from: init, ls, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from raysweep.cli.common import FAILED, OK, print_json, reports_errors, require_absent


@click.command()
@click.argument("name")
@click.option(
    "--task", type=click.Choice(["digits-picture", "digits-class"]), default="digits-picture", show_default=True
)
@reports_errors
def init(name: str, task: str) -> int:
    """Write NAME.yaml, a commented config with every setting at its default."""
    from raysweep.cli.listing import commented_config
    from raysweep.config.schema import NAME, ConfigError
    from raysweep.storage.files import write_bytes

    path = Path(f"{name}.yaml")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: a name has 1 to 64 letters, digits, '.', '_' or '-'")
    require_absent(path, "name")
    write_bytes(path, commented_config(name, task).encode())
    click.echo(f"{path}: check it with `raysweep validate {path}`, run it with `raysweep run {path}`")
    return OK


@click.command(name="ls")
@click.argument("kind", type=click.Choice(["methods", "evaluators", "spaces", "tasks", "presets", "runs"]))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@reports_errors
def list_(kind: str, name: str | None, as_json: bool) -> int:
    """List methods, evaluators, spaces, tasks, presets or runs.

    `raysweep ls spaces NAME`, with the name of a preset, a config or a method, lists every point that is tried first: each
    hyperparameter with its value and source.
    """
    from raysweep.cli.listing import first_points, listing
    from raysweep.config.schema import ConfigError
    from raysweep.rundir import STORAGE
    from raysweep.search.released import shown

    if name is not None and kind != "spaces":
        raise ConfigError(f"ls {kind}: takes no name; `raysweep ls spaces NAME` does")
    rows = listing(kind, STORAGE) if name is None else first_points(name)
    if as_json:
        print_json(rows)
        return OK
    for row in rows:
        first, *rest = (_cell(column, value) for column, value in row.items() if column != "values")
        click.echo(f"{first:<18} " + "  ".join(filter(None, rest)))
        for hyperparameter, origin in row.get("values", {}).items():
            value = "-" if origin["searched"] else shown(origin["value"])
            click.echo(f"    {hyperparameter:<20} {value:<14} {origin['from']}")
    return OK


def _cell(column: str, value: object) -> str:
    """A value in a line of text; a truth value as the name of its column, or nothing."""
    if isinstance(value, bool):
        return column if value else ""
    return str(value)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@reports_errors
def doctor(as_json: bool) -> int:
    """Check this machine: Python, packages, torch, memory, disk, /dev/shm, temporary files, ports, installs, Ray's token."""
    from raysweep.cli.doctor import examine

    findings = examine()
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{finding.level:<5} {finding.name:<12} {finding.text}")
    return FAILED if any(finding.level == "fail" for finding in findings) else OK
