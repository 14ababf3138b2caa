"""What a sweep needs before its first trial: task, base model, oracles, judges, prepared tensors; and its anchors' audits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from methods.base import Method
from raysweep.audit.objectives import Anchors, Indistinct, Unmeasured, assess_views, check_scale
from raysweep.audit.power import remedies
from raysweep.audit.request import AuditRequest
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.context import Context, load_measured, prepared_key
from raysweep.engine.cluster import Pool, RunFailed
from raysweep.models import families
from raysweep.models.sound import check_serves
from raysweep.plugins import method_code
from raysweep.registry import resolve
from raysweep.rundir import RunDir
from raysweep.search.spaces import Space
from raysweep.storage.cache import cache_folder, load_tensors
from raysweep.storage.code_digests import code_digest, judge_code
from raysweep.storage.files import StoreError, digest_of, digest_state, write_folder, write_json
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task
from raysweep.train.executors import Executor
from raysweep.train.jobs import Job, Outcome, finished

Say = Callable[[str, str], None]


def save_task(folder: RunDir, task: Task) -> None:
    """Writes the task for the workers and the report, unless it is there; how it is shown may have changed since."""
    plain = folder.task / "task.json"
    if not plain.is_file():
        write_folder(folder.task, task.save)
    stored = json.loads(plain.read_text())
    if stored["sensitive"] != task.sensitive:
        write_json(plain, stored | {"sensitive": task.sensitive})


def check_model(path: str, task: Task, key: str = "task.base") -> str:
    """Hash of a model given by the user; raises ConfigError, naming `key`, if it does not load or fit the task."""
    return _loaded(path, task, key).digest


def _loaded(path: str, task: Task, key: str) -> Any:
    try:
        model = families.load(path)
    except ValueError as error:
        raise ConfigError(str(error) if key == path else f"{key}: {error}") from error
    check_fits(model, path, task, key)
    return model


def check_fits(model: Any, path: str, task: Task, key: str = "task.base") -> None:
    """Raises ConfigError, naming `key` and `path`, unless a model fits the task, whose conditions its network must take."""
    if model.family != task.family:
        raise ConfigError(
            f"{key}: {path} is a {model.family} model, and the task {task.name} is about {task.family} models"
        )
    shape = tuple(task.splits["forget"].x.shape[1:])
    if model.image_shape != shape:
        raise ConfigError(f"{key}: {path} makes images of shape {model.image_shape}, but the task's are {shape}")
    if task.family == "pixel-ddpm" and (model.null_label is not None) != (task.kind == "class"):
        raise ConfigError(f"{key}: {path} must be {'class-conditional' if task.kind == 'class' else 'unconditional'}")
    try:
        check_serves(model, task, path)
    except ValueError as error:
        raise ConfigError(str(error) if key == path else f"{key}: {error}") from error


def check_latents(path: str, base: Any, key: str) -> None:
    """Raises ConfigError, naming `key`, if a model's latents are not those of `base`, with which it will be compared."""
    if base.latent:
        _check_same_latents(families.load(path), path, base, key)


def _check_same_latents(model: Any, path: str, base: Any, key: str) -> None:
    if not base.same_encoder(model):
        raise ConfigError(
            f"{path if key == path else f'{key}: {path}'} has another autoencoder than the base, so that what one makes of an "
            "image says nothing to the other: models that are compared share the base's folder vae"
        )


def check_oracles(sweep: Sweep, task: Task, base: Any = None) -> dict[str, tuple[str, str]]:
    """Folder and hash of each oracle given by the user; raises ConfigError if one does not load, fit, or match the base.

    An oracle is the base's recipe without the forgotten data: of another architecture it would say what that changes.
    base: the model of the task's architecture, if it is at hand.
    """
    if not sweep.oracle_models:
        return {}
    base = families.example(task) if base is None else base
    wanted, found = _shapes(base), dict[str, tuple[str, str]]()
    for k, given in enumerate(sweep.oracle_models):
        oracle = _loaded(str(given), task, "oracle_models")
        found[f"oracle-{k}"] = (str(given.absolute()), oracle.digest)
        shapes = _shapes(oracle)
        odd = next((n for n in (*wanted, *shapes) if wanted.get(n) != shapes.get(n)), None)
        if odd is not None:
            raise ConfigError(
                f"oracle_models: {given} is of another architecture than the base: {odd} is "
                f"{shapes.get(odd, 'missing')}, and {wanted.get(odd, 'missing')} there"
            )
        if task.base is not None and base.latent:
            _check_same_latents(oracle, str(given), base, "oracle_models")
    return found


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.net.state_dict().items()}


def retrain_jobs(sweep: Sweep, task: Task, task_folder: Path) -> dict[str, Job]:
    """The training of the base model (unless given) and of the oracles, by subject, into the cache."""
    subjects = {} if task.given else {"base": ("train", derive_seed("base", sweep.task.seed))}
    if not sweep.oracle_models:
        subjects |= {f"oracle-{k}": ("retain", derive_seed("oracle", sweep.task.seed, k)) for k in range(sweep.oracles)}
    return {s: retrain_job(sweep, task, task_folder, s, split, seed) for s, (split, seed) in subjects.items()}


def retrain_job(sweep: Sweep, task: Task, task_folder: Path, subject: str, split: str, seed: int) -> Job:
    """The training of a model from scratch on a split, by the task's recipe, into the cache."""
    settings = task.recipe | {"split": split}
    inputs = {"task": task.digest, "code": method_code("retrain")}
    frozen = autoencoder_folder(sweep, task)
    if frozen is not None:
        inputs["autoencoder"] = frozen.name
    if task.base and not task.trained:
        inputs["start"] = families.load(task.base).digest
    key = digest_of(settings, seed, inputs)
    return Job(
        id=f"{subject}-{key}", kind="train", method="retrain", hyperparameters=settings, seed=seed, task=str(task_folder),
        base=None, out=str(cache_folder(sweep.cache) / "models" / f"{task.name}-{subject}-{key}"), inputs=inputs,
        card={"subject": subject}, budget_s=max(3600.0, sweep.train.budget_s), checkpoint_s=sweep.train.checkpoint_s,
        frozen=None if frozen is None else str(frozen),
    )  # fmt: skip


def autoencoder_folder(sweep: Sweep, task: Task) -> Path | None:
    """Where in the cache the autoencoder of a latent model that is trained here lies; None where there is none to train."""
    if task.base or "vae" not in task.model:
        return None
    code = code_digest("raysweep/models/autoencoder.py")
    key = digest_of(task.model["vae"], sweep.task.seed, task.splits["retain"].ids, code)
    return cache_folder(sweep.cache) / "models" / f"{task.name}-autoencoder-{key}"


def judge_files(sweep: Sweep, task: Task) -> dict[str, tuple[Path, int, str]]:
    """Judge -> (file in the cache, seed, split); none where a model is its own judge."""
    files: dict[str, tuple[Path, int, str]] = {}
    if task.model_kind == "contrastive":
        return files
    for seed, name in enumerate(("probe", "audit")):
        split = f"judge_{name}"
        key = digest_of(task.splits[split].ids, task.splits[split].groups.tolist(), seed, judge_code())
        files[name] = (cache_folder(sweep.cache) / "judges" / f"{name}-{key}.safetensors", seed, split)
    return files


def prepare(
    sweep: Sweep,
    task: Task,
    folder: RunDir,
    run_id: str,
    executor: Executor,
    actors: Pool,
    say: Say,
    tick: Tick,
) -> Context:
    """Makes or finds base, oracles and judges, and leaves the run's context on disk."""
    frozen, free = autoencoder_folder(sweep, task), actors.auditors
    with actors.waiting(executor) as threads:
        started, waiting = time.monotonic(), None
        if frozen is not None and not frozen.is_dir():
            where = (str(folder.task), task.model["vae"], sweep.task.seed, str(frozen))
            waiting, free = free[0].train_autoencoder.remote(*where), free[1:] or free
        judges = {
            name: threads.submit(_judge, free[i % len(free)], folder, *spec)
            for i, (name, spec) in enumerate(judge_files(sweep, task).items())
        }
        if waiting is not None:
            ray.get(waiting)
            say("prepare", f"autoencoder ready (trained in {time.monotonic() - started:.0f} s)")
        retrained = {s: threads.submit(executor.run, job) for s, job in retrain_jobs(sweep, task, folder.task).items()}
        _wait({**retrained, **{f"judge {n}": f for n, f in judges.items()}}, actors, say, tick)
        models = {s: _model(s, job, retrained[s].result()) for s, job in retrain_jobs(sweep, task, folder.task).items()}
        if task.given:
            models["base"] = (task.given, check_model(task.given, task))
        models |= check_oracles(sweep, task)
        if task.base is None:  # only now it is known
            base = families.load(models["base"][0])
            for given in sweep.oracle_models:
                check_latents(str(given), base, "oracle_models")
        context = Context(
            run=str(folder.path), run_id=run_id, task_digest=task.digest, views=task.views, quality=task.quality, validity=task.validity, base=models["base"][0],
            base_digest=models["base"][1], oracles={k: v for k, v in models.items() if k != "base"},
            judges={name: future.result() for name, future in judges.items()}, prepared={},
            cache=str(cache_folder(sweep.cache) / "audits"), clip_digest=_clip_digest(task),
        )  # fmt: skip
        context.save()
    return context


def prepare_methods(
    sweep: Sweep, spaces: list[Space], context: Context, executor: Executor, actors: Pool, say: Say
) -> None:
    """Makes or finds what the methods compute once per base, and enters it into the context, here and on disk."""
    jobs = _prepare_jobs(sweep, spaces, context)
    with actors.waiting(executor) as threads:
        futures = {job.id: threads.submit(executor.run, job) for made in jobs.values() for job in made.values()}
        for method, made in jobs.items():
            for job in made.values():
                outcome = futures[job.id].result()
                if outcome.status != "ok":
                    raise RunFailed(f"preparing {method} failed: {outcome.reason}")
                say("prepare", f"{method}: prepared in {outcome.seconds:.1f} s")
            context.prepared[method] = {
                "by": _defaults(resolve("method", method)),
                "files": {key: job.out for key, job in made.items()},
            }
    context.save()


def _clip_digest(task: Task) -> str:
    """Content hash of the CLIP model that a task names beside its base; "" for none."""
    if task.clip is None:
        return ""
    from raysweep.models.tower import Clip

    return Clip.load(task.clip).digest


def measure_anchors(task: Task, context: Context, actors: Pool, tier_name: str, tier: Tier, say: Say) -> list[str]:
    """Measures base, oracles and a destroyed model in a tier, and settles which views tell base and oracle apart; the checks
    that failed on them.

    Raises RunFailed or Unmeasured if no model could be placed among these anchors.
    """
    requests = context.anchor_requests(tier_name, tier)
    answers = dict(zip(requests, ray.get([actors.manager.audit.remote(r) for r in requests.values()]), strict=True))
    for name, answer in answers.items():
        if answer["status"] != "ok":
            raise RunFailed(f"{tier_name}: measuring {name} failed: {answer['reason']}")
    failed = [f"{tier_name} of {name}: {check}" for name, answer in answers.items() for check in answer["failed"]]
    for text in failed:
        say("failed", f"{text} failed")
    found = {name: load_measured(folder_path(context), request.key) for name, request in requests.items()}
    oracles = tuple(found[name] for name in context.oracles)
    anchors = Anchors(found["base"], oracles, found["destroyed"])
    keys = {name: request.key for name, request in requests.items()}
    try:
        check_scale(anchors, task.quality, task.validity)
        views = assess_views(anchors, task.views)
    except Indistinct as error:
        context.save_anchors(tier_name, keys, error.views)  # for the report
        told = remedies(error.views, task, tier_name, tier)
        raise Unmeasured(f"{tier_name}: {error}. What to do: {told}") from error
    except Unmeasured:
        context.save_anchors(tier_name, keys, [])
        raise
    context.save_anchors(tier_name, keys, views)
    for view in views:
        verdict = f"base {view.base:.3g}, oracle {view.oracle:.3g}" if view.informative else f"not used: {view.reason}"
        say("anchor", f"{tier_name} view {view.metric}: {verdict}")
    return failed


def gather(
    pending: dict[Any, str], requests: dict[str, AuditRequest], say: Say, tick: Tick
) -> tuple[dict[str, str], list[str]]:
    """Waits for audits by reference; (subject -> key of those that ended well, in the order of `requests`; what is missing)."""
    ended, incomplete = {}, []
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        name = pending.pop(ready[0])
        answer = ray.get(ready[0])
        tick("audits", len(requests) - len(pending), len(requests))
        incomplete += [f"{name}: {check}" for check in answer["failed"]]
        if answer["status"] == "ok":
            ended[name] = requests[name].key
        else:
            incomplete.append(f"{name}: {answer['reason']}")
            say("failed", f"audit of {name}: {answer['reason']}")
    return {name: ended[name] for name in requests if name in ended}, incomplete


def folder_path(context: Context) -> Path:
    """The run directory of a context."""
    return Path(context.run)


Tick = Callable[[str, int, int], None]


def prepares(method: type[Method]) -> bool:
    """Whether a method has something to prepare."""
    return method.prepare.__func__ is not Method.prepare.__func__  # type: ignore[attr-defined]


def open_choices(space: Space, context: Context) -> Space:
    """The space with the choices that the prepared method offers."""
    if not any(p.open for p in space.parameters):
        return space
    method = resolve("method", space.method)
    settings = method.Hyperparameters(**space.fixed)
    files = context.prepared[space.method]["files"].values()

    def choices(name: str) -> list[Any]:
        offered = [method.choices(name, load_tensors(Path(file)), settings) for file in files]
        return list(dict.fromkeys(value for values in offered for value in values))

    return space.resolved(choices)


def _defaults(method: type[Method]) -> dict[str, Any]:
    """The settings that a preparation depends on, at their defaults."""
    return {name: method.Hyperparameters.model_fields[name].default for name in method.prepared_by}


def _prepare_jobs(sweep: Sweep, spaces: list[Space], context: Context) -> dict[str, dict[str, Job]]:
    """Method -> key -> the preparation of each method that has one, for every setting that it depends on."""
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
    """The preparation of a method for the context's base, with the settings that it depends on."""
    inputs = context.inputs(name) | ({"modules": ",".join(sweep.train.modules)} if sweep.train.modules else {})
    defaults = _defaults(resolve("method", name))
    own = defaults | {k: v for k, v in settings.items() if k in defaults}
    key = prepared_key(own, own)
    out = cache_folder(sweep.cache) / "prepared" / f"{name}-{digest_of(name, key, inputs)}.safetensors"
    return Job(
        id=f"{context.run_id}-prepare-{name}-{key}-{context.base_digest}", kind="prepare", method=name, hyperparameters=own,
        seed=derive_seed("prepare", name), task=str(context.folder.task), base=context.base, out=str(out), inputs=inputs,
        budget_s=max(3600.0, sweep.train.budget_s), modules=sweep.train.modules,
    )  # fmt: skip


def _model(subject: str, job: Job, outcome: Outcome) -> tuple[str, str]:
    if outcome.status != "ok":
        raise RunFailed(f"training {subject} failed: {outcome.reason}")
    return job.out, outcome.digest


def _judge(auditor: Any, folder: RunDir, path: Path, seed: int, split: str) -> tuple[str, str]:
    if path.is_file():
        with contextlib.suppress(StoreError):  # cut short: trained again
            return str(path), digest_state(load_tensors(path))
    return str(path), ray.get(auditor.train_judge.remote(str(folder.task), seed, split, str(path)))


def _wait(futures: dict[str, Future], actors: Pool, say: Say, tick: Tick) -> None:
    """Waits for all, telling of each end and of progress on the way."""
    started, open_ = time.monotonic(), dict(futures)
    while open_:
        for name in [n for n, f in open_.items() if f.done()]:
            result: Any = open_.pop(name).result()
            seconds = result.seconds if isinstance(result, Outcome) else None
            say("prepare", f"{name} ready" + (f" (trained in {seconds:.0f} s)" if seconds else ""))
        if open_:
            state = ray.get(actors.broker.state.remote())
            for job_id, (done, steps, _) in state["progress"].items():
                tick(job_id.rsplit("-", 1)[0], done, steps)
            time.sleep(0.5)
    say("prepare", f"base, oracles and judges ready after {time.monotonic() - started:.0f} s")


def cached(sweep: Sweep, task: Task, folder: RunDir) -> dict[str, bool]:
    """Which of base, oracles and judges are in the cache already."""
    found = {s: finished(job) is not None for s, job in retrain_jobs(sweep, task, folder.task).items()}
    frozen = autoencoder_folder(sweep, task)
    found |= {} if frozen is None else {"autoencoder": frozen.is_dir()}
    return found | {f"judge {n}": spec[0].is_file() for n, spec in judge_files(sweep, task).items()}
