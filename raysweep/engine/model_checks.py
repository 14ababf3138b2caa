"""Checks models that the user gives: that they load, fit the task, and can be compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysweep.config.schema import ConfigError, Sweep
from raysweep.models import families
from raysweep.models.identity import Identity, clashes
from raysweep.models.validation import check_serves
from raysweep.registry import resolve
from raysweep.tasks.task import Task


def check_model(path: str, task: Task, key: str = "task.base") -> Identity:
    """Identity of a model given by the user; raises ConfigError, naming `key`, if it does not load or fit the task."""
    return Identity.of(_loaded(path, task, key), path)


def check_distinct(oracles: Sequence[Identity], base: Identity | None, audited: Identity | None = None) -> None:
    """Raises ConfigError if an oracle is the same model as another one, the base or the audited model; see `clashes`."""
    problems = clashes(oracles, base, audited)
    if problems:
        raise ConfigError("\n".join(f"oracle_models: {problem}" for problem in problems))


def given_models(sweep: Sweep, task: Task) -> tuple[list[Identity], Identity | None]:
    """The oracles and the base that the user gives."""
    oracles = [Identity.read(str(folder.absolute())) for folder in sweep.oracle_models]
    return oracles, Identity.read(task.given_base) if task.given_base else None


def _loaded(path: str, task: Task, key: str) -> Any:
    try:
        model = families.load(path)
    except ValueError as error:
        raise ConfigError(str(error) if key == path else f"{key}: {error}") from error
    check_fits(model, path, task, key)
    return model


def check_fits(model: Any, path: str, task: Task, key: str = "task.base") -> None:
    """Raises ConfigError, naming `key` and `path`, unless a model fits the task and its network accepts the task's conditions."""
    if model.family != task.family:
        raise ConfigError(
            f"{key}: {path} is a {model.family} model, and the task {task.name} is about {task.family} models"
        )
    shape = tuple(task.splits["forget"].x.shape[1:])
    if model.image_shape != shape:
        raise ConfigError(f"{key}: {path} makes images of shape {model.image_shape}, but the task's are {shape}")
    labelled = task.splits["forget"].cond is not None
    if resolve("family", task.family).null_labels and (model.null_label is not None) != labelled:
        raise ConfigError(f"{key}: {path} must be {'class-conditional' if labelled else 'unconditional'}")
    try:
        check_serves(model, task, path)
    except ValueError as error:
        raise ConfigError(str(error) if key == path else f"{key}: {error}") from error


def check_latents(path: str, base: Any, key: str) -> None:
    """Raises ConfigError, naming `key`, if the latents of a model cannot be compared with those of `base`."""
    if base.latent:
        _check_same_latents(families.load(path), path, base, key)


def _check_same_latents(model: Any, path: str, base: Any, key: str) -> None:
    if not base.same_encoder(model):
        raise ConfigError(
            f"{path if key == path else f'{key}: {path}'} has another autoencoder than the base, so their latents cannot be "
            "compared: use the base's folder vae in all models"
        )


def check_oracles(sweep: Sweep, task: Task, base: Any = None) -> dict[str, Identity]:
    """The oracles given by the user; raises ConfigError if one does not load, fit, or match the base, or is no model of its own.

    Oracles must share the base's architecture; otherwise differences are not due to forgetting alone.
    base: a model of the task's architecture, if one is loaded already.
    """
    if not sweep.oracle_models:
        return {}
    base = families.example(task) if base is None else base
    expected, oracles = _shapes(base), dict[str, Identity]()
    for k, folder in enumerate(sweep.oracle_models):
        oracle = _loaded(str(folder), task, "oracle_models")
        oracles[f"oracle-{k}"] = Identity.of(oracle, str(folder.absolute()))
        shapes = _shapes(oracle)
        differing = next((n for n in (*expected, *shapes) if expected.get(n) != shapes.get(n)), None)
        if differing is not None:
            raise ConfigError(
                f"oracle_models: {folder} is of another architecture than the base: {differing} is "
                f"{shapes.get(differing, 'missing')}, but {expected.get(differing, 'missing')} in the base"
            )
        if task.base is not None and base.latent:
            _check_same_latents(oracle, str(folder), base, "oracle_models")
    given = Identity.of(base, task.given_base) if task.given_base else None
    check_distinct(list(oracles.values()), given)
    return oracles


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.net.state_dict().items()}
