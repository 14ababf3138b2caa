"""Verbs that read and write models and their images: export, remake, patch, convert, draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raysweep.cli import completion
from raysweep.cli.common import OK, load_sweep, open_run, read_front, reports_errors, require_absent, run_display

if TYPE_CHECKING:
    from raysweep.rundir import RunDir
    from raysweep.tasks.drawing import Cluster, Drawing


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.argument("trial", shell_complete=completion.trials)
@click.argument("out")
@click.option("--delta", "as_delta", is_flag=True, help="Write only the tensors that changed, as one file OUT.")
@reports_errors
def export(run: str, trial: str, out: str, as_delta: bool) -> int:
    """Copy a candidate, with a model card, as a folder that its model family's library loads; its hash is checked.

    Warns if the run does not recommend the candidate, or recommends it with reservations; the model card also says so. TRIAL may also be
    base or oracle-0, oracle-1, ..., whose folders other sweeps and audits take as task.base, oracle_models, --base and --oracle.
    """
    from raysweep.context import Context
    from raysweep.export import delta, modelcard
    from raysweep.models.folders import CARD
    from raysweep.storage.files import StoreError, write_folder, write_json

    folder, target = open_run(run), Path(out)
    require_absent(target)
    if trial == "base" or trial.startswith("oracle-"):
        return _export_anchor(folder, trial, target, as_delta)
    source = _candidate(folder, trial)
    model, card = _loaded(source), json.loads((source / CARD).read_text())
    expected, digest = card["outcome"]["digest"], model.digest
    if digest != expected:
        raise StoreError(f"{source}: the weights hash to {digest}, but the card says {expected}; not exported")
    _warn_of_standing(folder, trial)
    if as_delta:
        header = delta.write(target, Path(Context.load(str(folder.path)).base), source)
        click.echo(f"{target}  {header['tensors']} tensors, {header['bytes'] / 1e6:.2f} MB")
        return OK

    def fill(temporary: Path) -> None:
        model.save(temporary)
        write_json(temporary / CARD, card)
        modelcard.write(folder, card, temporary)

    write_folder(target, fill)
    click.echo(str(target))
    return OK


def _export_anchor(folder: RunDir, name: str, target: Path, as_delta: bool) -> int:
    """Copies the base or an oracle of a run; its hash is checked."""
    from raysweep.config.schema import ConfigError
    from raysweep.registry import suggest
    from raysweep.results.run import Run
    from raysweep.storage.files import StoreError, write_folder

    run = Run(folder.path)
    anchors = {anchor.name: anchor for anchor in (run.base, *run.oracles)}
    if name not in anchors:
        raise ConfigError(f"{folder.path}: no {name!r}{suggest(name, sorted(anchors))}")
    if as_delta:
        raise ConfigError(f"--delta: {name} is not made from another model")
    anchor = anchors[name]
    model = _loaded(anchor.folder)
    if model.digest != anchor.digest:
        raise StoreError(
            f"{anchor.folder}: the weights hash to {model.digest}, and the run used {anchor.digest}; not exported"
        )
    write_folder(target, model.save)
    click.echo(str(target))
    return OK


def _candidate(folder: RunDir, trial: str) -> Path:
    """The folder of a candidate; raises ConfigError if the run has none of this name."""
    from raysweep.config.schema import ConfigError
    from raysweep.models.folders import CARD
    from raysweep.registry import suggest

    if not (folder.candidates / trial / CARD).is_file():
        candidates = sorted(p.parent.name for p in folder.candidates.glob(f"*/{CARD}"))
        raise ConfigError(f"{folder.path}: no candidate {trial!r}{suggest(trial, candidates)}")
    return folder.candidates / trial


def _loaded(folder: Path) -> Any:
    """The model in a folder; raises ConfigError, saying what is wrong with the folder."""
    from raysweep.config.schema import ConfigError
    from raysweep.models.families import load

    try:
        return load(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@click.command()
@click.argument("run", shell_complete=completion.runs)
@click.argument("trial", shell_complete=completion.trials)
@reports_errors
def remake(run: str, trial: str) -> int:
    """Make a candidate again whose weights were dropped (`candidates.keep`), from its recorded settings and seeds.

    On a CPU the result is the same bit for bit, with the same versions of all packages. A result with another hash replaces nothing:
    it is kept beside the candidates, and the exit code is 1. The next attempt at the run drops what it does not need again.
    """
    from raysweep.engine.remake import remake_candidate
    from raysweep.storage.files import StoreError

    with run_display() as display:
        made = remake_candidate(open_run(run), trial, display)
    if not made.is_same:
        raise StoreError(made.difference)
    click.echo(f"{made.folder}  the same model as before, hash {made.digest}")
    return OK


def _warn_of_standing(folder: RunDir, trial: str) -> None:
    """Prints a warning unless the run recommends the trial without reservations."""
    standing = read_front(folder).get("standing", {}).get(trial, "not audited: only the search has seen it")
    if standing != "recommended":
        click.echo(f"warning: {trial} is {standing}", err=True)


@click.command()
@click.argument("delta_file")
@click.argument("model_dir")
@click.argument("out_dir")
@click.option("--revert", is_flag=True, help="Take the delta back: from the candidate to the base.")
@reports_errors
def patch(delta_file: str, model_dir: str, out_dir: str, revert: bool) -> int:
    """Apply a delta of `export --delta` to the base model it was made from; hashes are checked before and after."""
    from raysweep.export import delta

    require_absent(Path(out_dir), "folder")
    digest = delta.apply(Path(delta_file), Path(model_dir), Path(out_dir), revert)
    click.echo(f"{out_dir}  {digest}")
    return OK


@click.command()
@click.argument("snapshot")
@click.argument("out_dir")
@reports_errors
def convert(snapshot: str, out_dir: str) -> int:
    """Convert a published EDM snapshot (.pkl) to a model folder; only its tensors are read, none of its code runs.

    \b
    raysweep convert edm-cifar10-32x32-cond-vp.pkl models/edm-cifar10-32x32-cond
    """
    from raysweep.config.schema import ConfigError
    from raysweep.models.snapshot import read
    from raysweep.storage.files import write_folder

    target = Path(out_dir)
    require_absent(target)
    try:
        model = read(Path(snapshot))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write_folder(target, model.save)
    config, count = model.net.config, sum(p.numel() for p in model.net.parameters())
    classes = f"{config.num_class_embeds} classes" if config.num_class_embeds else "no classes"
    click.echo(f"{target}  {config.sample_size} pixels, {classes}, {count / 1e6:.1f} M weights, hash {model.digest}")
    return OK


@click.command()
@click.argument("model_dir")
@click.argument("out_dir")
@click.option("--prompt", "prompts", multiple=True, help="Draw this prompt, in its own folder; may be repeated.")
@click.option("--for", "config", help="Draw the search prompts of this config or preset, in a folder per label.")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Images per folder.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the images' noise.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Steps of the sampler.")
@click.option("--guidance", type=click.FloatRange(0), default=7.5, show_default=True, help="Classifier-free guidance.")
@click.option(
    "--sort", is_flag=True, help="Sort one prompt's images into `memorised` and `other`, by k-means on pixels."
)
@reports_errors
def draw(
    model_dir: str,
    out_dir: str,
    prompts: tuple[str, ...],
    config: str | None,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    sort: bool,
) -> int:
    """Draw images with a text-to-image model, each with its prompt beside it: data for a task.

    \b
    raysweep draw models/sd21 data/characters --prompt "Mickey Mouse" --prompt "a dog" --count 500
    raysweep draw models/sd14 data/artists --for rgd-sd-artist
    raysweep draw models/sd14 data/memorised --prompt "CAPTION" --count 128 --sort
    """
    from raysweep.config.schema import ConfigError
    from raysweep.tasks import drawing

    target = Path(out_dir)
    require_absent(target)
    if sort and len(prompts) > 1:
        raise ConfigError("--sort: takes the images of one --prompt")
    if bool(prompts) == bool(config):
        raise ConfigError("say what to draw: --prompt or --for")
    try:
        folders = _prompts_by_folder(prompts, config)
        clusters = _draw_folders(model_dir, folders, drawing.Drawing(count, seed, steps, guidance), target, sort)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for cluster in clusters:
        click.echo(f"{target / cluster.name}  {cluster.images} images, {cluster.spread:.1f} of 255 from their mean")
    if clusters:
        click.echo("k-means always makes two groups: look whether the first is one picture, repeated")
    else:
        click.echo(f"{target}  {count} images in each of {len(folders)} folders")
    return OK


def _prompts_by_folder(prompts: tuple[str, ...], config: str | None) -> dict[str, list[str]]:
    """Folder -> prompts, of the options --prompt or of a config's search prompts."""
    from raysweep.config.schema import ConfigError
    from raysweep.tasks import drawing

    if config is None:
        return drawing.by_prompt(prompts)
    searched = getattr(load_sweep(config, (), absent=True).task, "search_prompts", None)
    if searched is None:
        raise ConfigError(f"{config}: has no task.search_prompts")
    return drawing.by_label(searched.rows())


def _draw_folders(
    model_dir: str, folders: dict[str, list[str]], settings: Drawing, target: Path, sort: bool
) -> list[Cluster]:
    """Writes the images of every folder below `target`; with `sort`, sorts those of the only folder, and returns both groups."""
    from raysweep.cli.display import Display
    from raysweep.config.schema import ConfigError
    from raysweep.models.families import load
    from raysweep.models.folders import located
    from raysweep.registry import resolve
    from raysweep.storage.files import write_folder
    from raysweep.tasks import drawing

    model = load(located(model_dir))
    if not resolve("family", model.family).text_to_image:
        raise ConfigError(f"{model_dir}: is a {model.family} model; prompts are for text-to-image models")
    model.to(drawing.device())
    clusters: list[Cluster] = []
    with Display() as display:

        def fill(temporary: Path) -> None:
            drawing.draw(model, folders, settings, temporary, lambda done, total: display.tick("images", done, total))
            if sort:
                clusters.extend(drawing.sort_in_two(temporary / next(iter(folders))))

        write_folder(target, fill)
    return clusters
