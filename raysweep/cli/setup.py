"""Verbs to start from: init, ls, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from raysweep.cli.common import FAILED, OK, print_json, reports_errors, require_absent


@click.command()
@click.argument("name")
@click.argument("model", required=False)
@click.argument("train", required=False)
@click.argument("holdout", required=False)
@click.option("--task", default=None, help="A task of `raysweep ls tasks`; without MODEL digits-picture, else images.")
@reports_errors
def init(name: str, model: str | None, train: str | None, holdout: str | None, task: str | None) -> int:
    """Write NAME.yaml, a commented config with every setting.

    \b
    raysweep init mine                                          the embedded task
    raysweep init mine --task images                            every setting of a task
    raysweep init mine MODEL_DIR TRAIN_IMAGES HOLDOUT_IMAGES    a config that fits the model and the images

    MODEL is the folder of the model that must forget, TRAIN and HOLDOUT are a folder of pictures, Parquet files, tar shards or a
    dataset of torchvision: images that the model was trained on, and others of the same kinds. What cannot be found out is a question in a comment.
    """
    from raysweep.cli import draft as drafts
    from raysweep.config.schema import NAME, ConfigError
    from raysweep.storage.files import write_bytes

    path = Path(f"{name}.yaml")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: a name has 1 to 64 letters, digits, '.', '_' or '-'")
    require_absent(path, "name")
    if model is None:
        draft = drafts.of_task(name, task or "digits-picture")
    elif task not in (None, "images"):
        raise ConfigError(f"--task {task}: a model of your own belongs to the task `images`")
    else:
        draft = drafts.of_model(name, model, train, holdout)
    write_bytes(path, draft.text().encode())
    if draft.questions:
        click.echo(f"{path}: answer the questions in it, about {', '.join(draft.questions)}")
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
    from raysweep.cli.tables import print_table
    from raysweep.config.schema import ConfigError
    from raysweep.rundir import STORAGE

    if name is not None and kind != "spaces":
        raise ConfigError(f"ls {kind}: takes no name; `raysweep ls spaces NAME` does")
    rows = listing(kind, STORAGE) if name is None else first_points(name)
    if as_json:
        print_json(rows)
        return OK
    if not rows:
        click.echo(f"no {kind}" + (f" in {STORAGE}" if kind == "runs" else ""))
    elif name is None:
        print_table(rows)
    else:
        for row in rows:
            click.echo(f"{row['name']}  {row['source']}".rstrip())
            values = [
                {"name": n, "value": "-" if v["searched"] else v["value"], "from": v["from"]}
                for n, v in row["values"].items()
            ]
            print_table(values)
    return OK


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
