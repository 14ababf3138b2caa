"""Validates a sweep as a whole before anything starts: task, model, methods, spaces, training, checks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysweep.auditing.anchors import ADDED
from raysweep.auditing.power import undecidable
from raysweep.config.schema import ConfigError, Sweep
from raysweep.engine.cached_jobs import prepares
from raysweep.engine.model_checks import check_fits, check_oracles
from raysweep.models import families
from raysweep.registry import external, resolve
from raysweep.search.spaces import Space, SpaceError
from raysweep.search.spaces import load as load_space
from raysweep.tasks.task import Task
from raysweep.train.unlearning import refusals

TIERS = ("probe", "audit", "durability")


def resolve_sweep(sweep: Sweep) -> tuple[Task, list[Space]]:
    """The task and the search spaces, checked against each other; raises ConfigError."""
    try:
        task = sweep.task.build()
    except ValueError as error:
        raise ConfigError(f"task: {error}") from error
    if getattr(sweep.task, "base_steps", 1) == 0 and not sweep.oracle_models:
        raise ConfigError(
            "oracle_models: name folders of models retrained without the forgotten data, or set task.base_steps to train them here"
        )
    problems = task.near_duplicates()
    if problems:
        raise ConfigError("\n".join(f"task: {problem}" for problem in problems))
    try:
        model = families.example(task)
    except ValueError as error:
        raise ConfigError(f"task.base: {error}") from error
    if task.base is not None:
        check_fits(model, task.base, task)
    check_steps(sweep, task, model)
    check_oracles(sweep, task, model)
    check_weights(sweep)
    check_training(sweep, task, model)
    if sweep.train.modules:
        model.train_only(sweep.train.modules)
    check_tower(task, model)
    spaces = [resolve_space(sweep, name, task, model) for name in sweep.methods]
    resolve("sampler", sweep.search.sampler)  # a fault of another package is reported now and not by the search
    check_tiers(sweep, task)
    problems = undecidable(sweep, task)
    if problems:
        raise ConfigError("\n".join(problems))
    return task, spaces


def resolve_space(sweep: Sweep, name: str, task: Task, model: Any) -> Space:
    """The search space of the method `name`; raises ConfigError if the method or values of its space do not suit the task."""
    reasons = refusals(resolve("method", name), task)
    if reasons:
        raise ConfigError(f"methods: {name} cannot serve the task {task.name}: {'; '.join(reasons)}")
    try:
        space = load_space(name, sweep.spaces.get(name), task.kind)
    except SpaceError as error:
        raise ConfigError(str(error)) from error
    reasons = misfits(space, task, model)
    if reasons:
        raise ConfigError("\n".join(f"spaces.{name}: {reason}" for reason in reasons))
    return space


def check_tower(task: Task, model: Any) -> None:
    """Raises ConfigError if the CLIP model that a task names beside its base cannot be read or is not part of the base."""
    if task.clip is None:
        return
    from raysweep.models.tower import Clip

    try:
        families.with_tower(model, Clip.load(task.clip))
    except ValueError as error:
        raise ConfigError(f"task.clip: {error}") from error


def check_tiers(sweep: Sweep, task: Task) -> None:
    """Raises ConfigError unless the probe and the audit measure all objectives; imports the checks of other packages.

    Some views add to the others (`ADDED`): a list of checks without theirs leaves them out, and report and card name them as not
    tested.
    """
    for tier_name in TIERS:
        checks = getattr(sweep.audit, tier_name).checks_for(task)
        for name in checks:
            if name in external("evaluator"):  # a fault of another package is reported now and not by an auditor
                resolve("evaluator", name)
        if tier_name == "durability":
            continue
        views = (view for view in task.views if view not in ADDED)
        for metric in (*views, task.quality, task.validity):
            if metric.split(".")[0] not in checks:
                raise ConfigError(
                    f"audit.{tier_name}.checks: {metric.split('.')[0]!r} is missing: {metric} is an objective"
                )


def check_steps(sweep: Sweep, task: Task, model: Any) -> None:
    """Raises ConfigError if steps of the noise schedule are asked for that the model's does not have."""
    if not hasattr(model, "alphas"):
        return
    total = len(model.alphas)
    for tier_name in TIERS:
        tier = getattr(sweep.audit, tier_name)
        for key, steps in (
            ("injection_t", () if tier.injection_t is None else (tier.injection_t,)),
            ("loss_t", tier.loss_t or ()),
            ("membership_t", tier.membership_t or ()),
            ("recall_t", tier.recall_t or ()),
        ):
            if not all(0 <= t < total for t in steps):
                raise ConfigError(
                    f"audit.{tier_name}.{key}: {max(steps)} is no step of the model's noise schedule; valid: 0 to {total - 1}"
                )
    if "free steps" in resolve("family", task.family).abilities:
        return
    numbers = {f"audit.{name}.sampling_steps": getattr(sweep.audit, name).sampling_steps or 0 for name in TIERS}
    for key, number in ({"task.steps": task.sampling.get("steps", 1)} | numbers).items():
        if number > total:
            raise ConfigError(f"{key}: {number} is more than the {total} steps of the model's noise schedule")


def check_weights(sweep: Sweep) -> None:
    """Raises ConfigError if an outside network that a tier names cannot be read: auditors would only meet it after the training."""
    from evaluators.external import Unreadable, check

    seen: set[tuple[str, Path]] = set()
    for tier_name in TIERS:
        for key, path in getattr(sweep.audit, tier_name).weights.items():
            if (key, path) not in seen:
                try:
                    check(key, path)
                except Unreadable as error:
                    raise ConfigError(f"audit.{tier_name}.weights.{key}: {error}") from error
            seen.add((key, path))


def check_training(sweep: Sweep, task: Task, model: Any) -> None:
    """Raises ConfigError if the modules or adapters that are to be trained do not fit the task's model and the methods."""
    train = sweep.train
    reasons = [] if task.given_base and sweep.oracle_models else refusals(resolve("method", "retrain"), task)
    if reasons:
        raise ConfigError(
            f"oracle_models: base and oracles of the task {task.name} cannot be trained here: {'; '.join(reasons)}; name folders of "
            "retrained models"
        )
    if (train.modules or train.lora) and not resolve("family", task.family).text_to_image:
        key = "modules" if train.modules else "lora"
        raise ConfigError(
            f"train.{key}: is for text-to-image models, and the task {task.name} is about {task.family} models"
        )
    unknown = [m for m in train.modules if m not in model.net] if train.modules else []
    if unknown:
        raise ConfigError(f"train.modules: the model has no {', '.join(unknown)}; valid: {', '.join(model.net)}")
    if train.lora is None:
        return
    if train.modules:
        raise ConfigError("train.lora: adapters lie on the denoising network; leave train.modules empty")
    if find_spec("peft") is None:
        raise ConfigError("train.lora: the library is missing: pip install 'raysweep[lora]'")
    for name in sweep.methods:
        if prepares(resolve("method", name)):
            raise ConfigError(f"train.lora: {name} works on the tensors of the base model by name, not on adapters")


def misfits(space: Space, task: Task, model: Any) -> list[str]:
    """Why values of a space cannot work on a task's model; each reason once."""
    method = resolve("method", space.method)
    start = space.fixed | {p.name: p.values[0] for p in space.parameters if not p.open and not p.when}
    trials = [start | {p.name: v} for p in space.parameters if not p.open and not p.when for v in p.values]
    trials += [start | point.values for point in space.points]
    reasons = [
        reason for values in trials for reason in method.unsuited(method.Hyperparameters(**values), model, task.goal)
    ]
    return list(dict.fromkeys(reasons))
