"""Makes or reads what a sweep needs before its first trial: base, oracles, judges, and what methods prepare."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from raysweep.auditing.judges import JudgeFile, judge_files
from raysweep.auditing.request import Chore
from raysweep.context import Context, Prepared
from raysweep.engine.audits import answer_to
from raysweep.engine.cached_jobs import (
    autoencoder_folder,
    preparation_defaults,
    prepare_jobs,
    retrain_jobs,
)
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.model_checks import check_distinct, check_latents, check_model, check_oracles
from raysweep.models import families
from raysweep.models.identity import Identity
from raysweep.registry import resolve
from raysweep.search.spaces import Space
from raysweep.storage.cache import cache_folder, load_tensors
from raysweep.storage.files import StoreError, digest_state
from raysweep.tasks.task import Task
from raysweep.train.jobs import Job, Outcome

POLL_S = 0.5


def prepare(engine: Engine) -> Context:
    """Makes those of base, oracles and judges that are neither given nor cached; writes the run's context."""
    sweep, task, folder = engine.sweep, engine.task, engine.folder
    with engine.threads() as threads:
        autoencoder = _autoencoder(engine)
        training = None if autoencoder is None else threads.submit(_do, engine, "autoencoder", autoencoder)
        judges = {
            name: threads.submit(_judge, engine, name, file) for name, file in judge_files(task, sweep.cache).items()
        }
        if training is not None:
            started = time.monotonic()
            training.result()
            engine.events.say("prepare", f"autoencoder ready (trained in {time.monotonic() - started:.0f} s)")
        jobs = retrain_jobs(sweep, task, folder.task)
        retrained = {subject: threads.submit(engine.executor.run, job) for subject, job in jobs.items()}
        _wait(engine, {**retrained, **{f"judge {name}": future for name, future in judges.items()}})
        models = {subject: _model(subject, job, retrained[subject].result()) for subject, job in jobs.items()}
    models |= _given_models(engine, models)
    context = Context(
        run=str(folder.path),
        run_id=engine.run_id,
        task_digest=task.digest,
        views=task.views,
        quality=task.quality,
        validity=task.validity,
        base=models["base"][0],
        base_digest=models["base"][1],
        oracles={name: model for name, model in models.items() if name != "base"},
        judges={name: future.result() for name, future in judges.items()},
        prepared={},
        cache=str(cache_folder(sweep.cache) / "audits"),
        clip_digest=_clip_digest(task),
    )
    context.save()
    return context


def prepare_methods(engine: Engine, context: Context) -> None:
    """Makes what the methods compute once per base, unless it is cached; enters it into the context, here and on disk."""
    jobs = prepare_jobs(engine.sweep, engine.spaces, context)
    with engine.threads() as threads:
        futures = {
            job.id: threads.submit(engine.executor.run, job) for by_key in jobs.values() for job in by_key.values()
        }
        for method, by_key in jobs.items():
            for job in by_key.values():
                outcome = futures[job.id].result()
                if outcome.status != "ok":
                    raise RunFailed(f"preparing {method} failed: {outcome.reason}")
                engine.events.say("prepare", f"{method}: prepared in {outcome.seconds:.1f} s")
            files = {key: job.out for key, job in by_key.items()}
            context.prepared[method] = Prepared(preparation_defaults(resolve("method", method)), files)
    context.save()


def open_choices(space: Space, context: Context) -> Space:
    """The space with the choices that the prepared method offers."""
    if not any(p.open for p in space.parameters):
        return space
    method = resolve("method", space.method)
    settings = method.Hyperparameters(**space.fixed)
    files = context.prepared[space.method].files.values()

    def choices(name: str) -> list[Any]:
        offered = [method.choices(name, load_tensors(Path(file)), settings) for file in files]
        return list(dict.fromkeys(value for values in offered for value in values))

    return space.resolved(choices)


def _autoencoder(engine: Engine) -> Chore | None:
    """The training of the autoencoder that latents need; None if none must be trained."""
    out = autoencoder_folder(engine.sweep, engine.task)
    if out is None or out.is_dir():
        return None
    return Chore(
        "train_autoencoder", (str(engine.folder.task), engine.task.model["vae"], engine.sweep.task.seed, str(out))
    )


def _given_models(engine: Engine, trained: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Folder and hash of the base and the oracles that the user gives, by subject, checked against each other."""
    sweep, task = engine.sweep, engine.task
    models = {"base": (task.given_base, check_model(task.given_base, task).digest)} if task.given_base else {}
    oracles = check_oracles(sweep, task)
    models |= {name: (oracle.folder, oracle.digest) for name, oracle in oracles.items()}
    if task.base is None and sweep.oracle_models:  # the base to compare them with has only now been trained
        folder = (trained | models)["base"][0]
        base = families.load(folder)
        check_distinct(list(oracles.values()), Identity.of(base, folder))
        for oracle in sweep.oracle_models:
            check_latents(str(oracle), base, "oracle_models")
    return models


def _clip_digest(task: Task) -> str:
    """Content hash of the CLIP model that a task names beside its base; "" for none."""
    if task.clip is None:
        return ""
    from raysweep.models.tower import Clip

    return Clip.load(task.clip).digest


def _model(subject: str, job: Job, outcome: Outcome) -> tuple[str, str]:
    if outcome.status != "ok":
        raise RunFailed(f"training {subject} failed: {outcome.reason}")
    return job.out, outcome.digest


def _judge(engine: Engine, name: str, file: JudgeFile) -> tuple[str, str]:
    """Path and hash of a judge, which is trained on the run's task unless it is cached."""
    path = str(file.path)
    if file.path.is_file():
        with contextlib.suppress(StoreError):  # a file that was cut short is trained again
            return path, digest_state(load_tensors(file.path))
    chore = Chore("train_judge", (str(engine.folder.task), file.seed, file.split, path))
    return path, _do(engine, f"judge {name}", chore)


def _do(engine: Engine, name: str, chore: Chore) -> str:
    """Has an auditor do a chore; what that returns."""
    outcome = answer_to(engine.actors.manager.submit.remote(chore.key, chore))
    if outcome["status"] != "ok":
        raise RunFailed(f"training {name} failed: {outcome['reason']}")
    return outcome["value"]


def _wait(engine: Engine, futures: dict[str, Future[Any]]) -> None:
    """Waits for all, reporting each end and the progress of jobs."""
    started, waiting, lengths = time.monotonic(), dict(futures), dict[str, int]()
    while waiting:
        for name in [n for n, f in waiting.items() if f.done()]:
            result: Any = waiting.pop(name).result()
            seconds = result.seconds if isinstance(result, Outcome) else None
            if name in lengths:  # its last steps may have gone unnoticed
                engine.events.tick(name, lengths[name], lengths[name])
            engine.events.say("prepare", f"{name} ready" + (f" (trained in {seconds:.0f} s)" if seconds else ""))
        if waiting:
            state = ray.get(engine.actors.broker.census.remote())
            for job_id, (done, steps, _) in state["progress"].items():
                name = job_id.rsplit("-", 1)[0]
                if name in waiting:
                    lengths[name] = steps
                    engine.events.tick(name, done, steps)
            time.sleep(POLL_S)
    engine.events.say("prepare", f"base, oracles and judges ready after {time.monotonic() - started:.0f} s")
