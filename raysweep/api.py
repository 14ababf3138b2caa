"""The Python API: what `import raysweep` offers. Ray is imported by `run` and `audit` alone, torch by what needs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from raysweep.auditing.card import Card
    from raysweep.config.schema import Sweep
    from raysweep.engine.events import Events
    from raysweep.results.run import Run
    from raysweep.tasks.task import Task


def run(
    config: str | Path | Sweep | None = None,
    overrides: Mapping[str, Any] | None = None,
    events: Events | None = None,
) -> Run:
    """Runs a sweep to its report, or resumes it, as `raysweep run` does.

    config: a YAML file, the name of a preset, a `Sweep`, or None for the embedded sweep. overrides: dotted keys, such as
    {"search.trials": 12}. events: receives what happens (`raysweep.engine.events.Events`); None ignores it.

    Raises `raysweep.config.schema.ConfigError` for bad input or if this process is connected to Ray already,
    `raysweep.engine.cluster.RunFailed` if the run cannot end with a front, and KeyboardInterrupt, or during the search
    `raysweep.engine.attempt.Interrupted`, if a signal stopped it; the same call then resumes.
    """
    from raysweep.engine.events import Silent
    from raysweep.engine.run import run_sweep
    from raysweep.results.run import Run

    return Run(run_sweep(_sweep(config, overrides), events or Silent()).folder.path)


def open_run(folder: str | Path) -> Run:
    """A run that exists, by its directory or by its name below ./runs; raises ConfigError if there is none."""
    from raysweep.results.run import Run
    from raysweep.rundir import RunDir

    return Run(RunDir.open(folder).path)


def audit(
    model: str | Path,
    config: str | Path | Sweep | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    oracles: Sequence[str | Path] = (),
    events: Events | None = None,
) -> Card:
    """Audits a model's folder on the task of a config next to base and oracles, as `raysweep audit` does; its audit card.

    base, oracles: folders of models; by default the config's, or trained here. Raises ConfigError and RunFailed.
    """
    from raysweep.engine.audit_model import audit_model
    from raysweep.engine.events import Silent

    more: dict[str, Any] = dict(overrides or {})
    if base is not None:
        more["task.base"] = str(base)
    if oracles:
        more["oracle_models"] = [str(oracle) for oracle in oracles]
    _, card = audit_model(Path(model), _sweep(config, more), events or Silent())
    return card


def load_task(config: str | Path | Sweep | None = None, overrides: Mapping[str, Any] | None = None) -> Task:
    """The task of a config, with its data; None: the embedded one. Raises ConfigError if its data cannot be read."""
    from raysweep.config.schema import ConfigError

    settings = _sweep(config, overrides).task
    try:
        return settings.build()
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error


def load_model(folder: str | Path) -> Any:
    """The model in a folder of any family (docs/models.md), as a handle; raises ValueError, saying what is wrong with it."""
    from raysweep.models import families

    return families.load(folder)


def unlearn(
    model: Any,
    task: Task,
    method: str,
    *,
    seed: int = 0,
    prepared: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    **hyperparameters: Any,
) -> Any:
    """Applies a method to a model in this process, without Ray; a new model, and `model` stays as it was.

    "retrain" makes an oracle by the task's recipe: it trains new weights of the model's architecture on the retained data.
    seed: of data order, noise and time steps; a trial with the same seed and hyperparameters gives the same weights.
    prepared: what the method computes once per base (`raysweep.train.unlearning.prepare`); None computes it now.
    progress: called every few steps with (steps done, steps in all, the method's first diagnostic).
    hyperparameters: as `raysweep ls spaces METHOD` lists them; the others keep their defaults.

    Raises UnknownName for a method that does not exist, ValueError for hyperparameters that are not valid or a method that
    cannot serve the task or the model, `methods.base.Diverged` if the training diverges.
    """
    from raysweep.train import unlearning

    return unlearning.unlearn(
        model, task, method, hyperparameters, seed=seed, prepared=prepared, progress=progress
    ).model


def measure(
    model: Any,
    task: Task,
    checks: Sequence[str] = (),
    *,
    base: Any = None,
    oracles: Sequence[Any] = (),
    judge: torch.nn.Module | None = None,
    cache: str | Path | None = None,
    **sizes: Any,
) -> pa.Table:
    """Runs checks on a model in this process, without Ray: one row per metric, with the columns of `columns("metrics")`.

    checks: names of `raysweep ls evaluators`; () for those of the full audit. base, oracles: models to compare with; checks that
    need them are skipped otherwise, with the reason in their row. judge: the classifier that tells classes apart and gives
    features; None reads the audit's from the cache, or trains it. cache: its folder; None for the usual one. sizes: settings of
    `audit.audit`, such as samples=200 or seed=7. Without a seed it is drawn afresh at each call, with the diffusion timesteps and
    the numbers of sampling steps; the table's metadata `settings` (JSON) contain those in force, which give the same numbers again.

    Raises ConfigError for checks or sizes that are not valid, and for an oracle that is the model, the base or another oracle.
    """
    from raysweep.auditing import measuring

    return measuring.measure_model(model, task, checks, base=base, oracles=oracles, judge=judge, cache=cache, **sizes)


def columns(table: str) -> dict[str, str]:
    """Column -> description, of the tables "trials", "front", "rows", "scores" and "metrics"."""
    from raysweep.storage.schemas import describe

    return describe(table)


def _sweep(config: str | Path | Sweep | None, overrides: Mapping[str, Any] | None) -> Sweep:
    from raysweep.config import presets, reader
    from raysweep.config.schema import Sweep

    if isinstance(config, Sweep):
        return reader.changed(config, overrides) if overrides else config
    return reader.load(None if config is None else presets.file_of(str(config)), reader.assignments(overrides or {}))
