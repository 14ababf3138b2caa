"""Jobs whose results are kept in the cache, and where: base, oracles, judges, and what methods prepare once per base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods.base import Method
from raysweep.auditing.judges import judge_files
from raysweep.config.schema import Sweep
from raysweep.context import Context, prepared_key
from raysweep.models import families
from raysweep.plugins import method_code
from raysweep.registry import resolve
from raysweep.rundir import RunDir
from raysweep.search.spaces import Space
from raysweep.storage.cache import cache_folder
from raysweep.storage.code_digests import code_digest
from raysweep.storage.files import digest_of
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task
from raysweep.train.jobs import Job, finished


def retrain_jobs(sweep: Sweep, task: Task, task_folder: Path) -> dict[str, Job]:
    """The jobs that train the base model (unless given) and the oracles into the cache, by subject."""
    subjects = {} if task.given_base else {"base": ("train", derive_seed("base", sweep.task.seed))}
    if not sweep.oracle_models:
        subjects |= {f"oracle-{k}": ("retain", derive_seed("oracle", sweep.task.seed, k)) for k in range(sweep.oracles)}
    return {s: retrain_job(sweep, task, task_folder, s, split, seed) for s, (split, seed) in subjects.items()}


def retrain_job(sweep: Sweep, task: Task, task_folder: Path, subject: str, split: str, seed: int) -> Job:
    """The job that trains a model from scratch on a split, by the task's recipe, into the cache."""
    settings = task.recipe | {"split": split}
    inputs = {"task": task.digest, "code": method_code("retrain")}
    frozen = autoencoder_folder(sweep, task)
    if frozen is not None:
        inputs["autoencoder"] = frozen.name
    if task.base and not task.trained:
        inputs["start"] = families.load(task.base).digest
    key = digest_of(settings, seed, inputs)
    return Job(
        id=f"{subject}-{key}",
        kind="train",
        method="retrain",
        hyperparameters=settings,
        seed=seed,
        task=str(task_folder),
        base=None,
        out=str(cache_folder(sweep.cache) / "models" / f"{task.name}-{subject}-{key}"),
        inputs=inputs,
        card={"subject": subject},
        budget_s=max(3600.0, sweep.train.budget_s),
        checkpoint_s=sweep.train.checkpoint_s,
        frozen=None if frozen is None else str(frozen),
    )


def autoencoder_folder(sweep: Sweep, task: Task) -> Path | None:
    """The cache folder of the autoencoder that a latent task trains; None where none is trained."""
    if task.base or "vae" not in task.model:
        return None
    code = code_digest("raysweep/models/autoencoder.py")
    key = digest_of(task.model["vae"], sweep.task.seed, task.splits["retain"].ids, code)
    return cache_folder(sweep.cache) / "models" / f"{task.name}-autoencoder-{key}"


def cached(sweep: Sweep, task: Task, folder: RunDir) -> dict[str, bool]:
    """Base, oracles, autoencoder and judges -> whether they are in the cache already."""
    present = {s: finished(job) is not None for s, job in retrain_jobs(sweep, task, folder.task).items()}
    frozen = autoencoder_folder(sweep, task)
    present |= {} if frozen is None else {"autoencoder": frozen.is_dir()}
    return present | {f"judge {n}": file.path.is_file() for n, file in judge_files(task, sweep.cache).items()}


def prepares(method: type[Method]) -> bool:
    """Whether a method has something to prepare."""
    return method.prepare.__func__ is not Method.prepare.__func__  # type: ignore[attr-defined]


def preparation_defaults(method: type[Method]) -> dict[str, Any]:
    """The settings that a preparation depends on, at their defaults."""
    return {name: method.Hyperparameters.model_fields[name].default for name in method.prepared_by}


def prepare_jobs(sweep: Sweep, spaces: Sequence[Space], context: Context) -> dict[str, dict[str, Job]]:
    """Method -> key -> job: the preparations of each method, one per combination of the settings that it depends on."""
    jobs: dict[str, dict[str, Job]] = {}
    for space in spaces:
        name, method = space.method, resolve("method", space.method)
        if not prepares(method):
            continue
        for settings in space.variants(method.prepared_by):
            job = prepare_job(sweep, context, name, settings)
            jobs.setdefault(name, {})[prepared_key(job.hyperparameters, job.hyperparameters)] = job
    return jobs


def prepare_job(sweep: Sweep, context: Context, name: str, settings: dict[str, Any]) -> Job:
    """The job that prepares a method for the context's base, under the settings that the preparation depends on."""
    inputs = context.inputs(name) | ({"modules": ",".join(sweep.train.modules)} if sweep.train.modules else {})
    defaults = preparation_defaults(resolve("method", name))
    relevant = defaults | {k: v for k, v in settings.items() if k in defaults}
    key = prepared_key(relevant, relevant)
    out = cache_folder(sweep.cache) / "prepared" / f"{name}-{digest_of(name, key, inputs)}.safetensors"
    return Job(
        id=f"{context.run_id}-prepare-{name}-{key}-{context.base_digest}",
        kind="prepare",
        method=name,
        hyperparameters=relevant,
        seed=derive_seed("prepare", name),
        task=str(context.folder.task),
        base=context.base,
        out=str(out),
        inputs=inputs,
        budget_s=max(3600.0, sweep.train.budget_s),
        modules=sweep.train.modules,
    )
