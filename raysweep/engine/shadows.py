"""U-LiRA: separates unlearned models from models that never saw the forgotten images, image by image, by shadow models.

After Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", arXiv:2403.01218.
Each shadow has its own seed and is a pair of models: one trained with the forgotten images, to which the method with a trial's
settings is then applied, and one trained without them. An image's log likelihood ratio under a model compares its loss
score with those under all other unlearned and all other retrained shadows (two normal distributions, deviations pooled over
images). Each shadow's two models are judged by the others; so is the trial's candidate itself. Accuracy 1/2 means that
this attack cannot tell unlearned models from retrained ones; a single attack for all images would conclude that too early.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.attacks import lira_online
from evaluators.statistics import auc_interval, clopper_pearson, t_interval
from raysweep.auditing.request import scores_path
from raysweep.config.schema import ConfigError
from raysweep.context import Context
from raysweep.engine.audits import Audits
from raysweep.engine.cached_jobs import prepare_job, prepares, retrain_job
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.events import Events
from raysweep.models import stored
from raysweep.registry import resolve
from raysweep.results.recompute import load_scores
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import RunDir
from raysweep.storage.files import write_json
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task
from raysweep.train.jobs import Job, Outcome

MIN_SHADOWS = 3  # two of a kind must be left to fit a deviation when one is judged


@dataclass(frozen=True)
class ULiRA:
    """Results of the attack.

    unlearned, retrained: log likelihood ratios (shadows, images) of each shadow's models, judged by the others; positive
    says "unlearned". candidate: those of the trial's own model (images,), judged by all.
    """

    unlearned: np.ndarray
    retrained: np.ndarray
    candidate: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Accuracies and AUC with 95 % intervals; the shadows are the independent units."""
        right = np.concatenate([self.unlearned > 0, self.retrained <= 0], axis=1).mean(1)
        if np.ptp(right) > 0:
            _, low, high = t_interval(right)
        else:  # no spread between shadows to estimate an interval from
            low, high = clopper_pearson(round(right[0] * len(right)), len(right))
        auc, _, *ends = auc_interval(self.unlearned.mean(1), self.retrained.mean(1))
        by_image = np.concatenate([self.unlearned > 0, self.retrained <= 0]).mean(0)
        recognised, images = int((self.candidate > 0).sum()), len(self.candidate)
        return {
            "shadows": len(right),
            "images": images,
            "accuracy": {"value": float(right.mean()), "lo": max(0.0, low), "hi": min(1.0, high)},
            "auc_over_models": dict(zip(("value", "lo", "hi"), (auc, *ends), strict=True)),
            "worst_image_accuracy": float(by_image.max()),
            "candidate": {
                "images_told": recognised,
                "lo_hi": clopper_pearson(recognised, images),
                "mean_ratio": float(self.candidate.mean()),
            },
        }


def u_lira(unlearned: np.ndarray, retrained: np.ndarray, candidate: np.ndarray) -> ULiRA:
    """The attack on scores (shadows, images) of unlearned and of retrained shadows and (images,) of a candidate.

    Raises ValueError for fewer than three shadows.
    """
    shadows = len(unlearned)
    if shadows < MIN_SHADOWS or len(retrained) != shadows:
        raise ValueError(f"needs at least {MIN_SHADOWS} shadows of either kind, as many of one as of the other")

    def judged(scores: np.ndarray, left_out: int) -> np.ndarray:
        others = np.arange(shadows) != left_out
        return lira_online(scores, unlearned[others].T, retrained[others].T)

    return ULiRA(
        np.stack([judged(unlearned[k], k) for k in range(shadows)]),
        np.stack([judged(retrained[k], k) for k in range(shadows)]),
        lira_online(candidate, unlearned.T, retrained.T),
    )


def run_shadows(folder: RunDir, name: str, shadows: int, events: Events) -> tuple[Path, dict[str, Any]]:
    """Trains the shadows of a finished trial, scores them, and writes `shadows/TRIAL.json`; (its path, its content).

    Shadows that were trained before are reused. Raises ConfigError for a trial without a candidate, RunFailed if a shadow cannot
    be trained.
    """
    sweep, trials = folder.sweep(), trial_table(folder, folder.run_id)
    done = {t.trial: t for t in trials if t.state == "COMPLETE"}
    if name not in done:
        raise ConfigError(f"{folder.path}: {name!r} is not a trial with a candidate; those are: {', '.join(done)}")
    if shadows < MIN_SHADOWS:
        raise ConfigError(f"--models: at least {MIN_SHADOWS}, not {shadows}")
    try:
        stored.base_of(folder.candidates / name)
    except stored.Missing as error:  # before the shadows are trained
        raise ConfigError(str(error)) from error
    trial, manifest = done[name], folder.read_manifest()
    task, context = Task.load(folder.task), Context.load(str(folder.path))
    with folder.claim(sweep, manifest["digests"]):
        folder.update(state=manifest["state"])  # the run itself stays as it was
        with Engine.open(folder, folder.in_force(), task, events) as engine:
            models = _train(engine, context, trial, shadows)
            models["candidate"] = (str(folder.candidates / name), trial.digest)
            scores = _scores(engine, context, name, models)
    ratios = u_lira(
        np.stack([scores[f"unlearned-{k}"] for k in range(shadows)]),
        np.stack([scores[f"retrained-{k}"] for k in range(shadows)]),
        scores["candidate"],
    )
    content = {
        "trial": name,
        "method": trial.method,
        "hyperparameters": trial.hyperparameters,
        "summary": ratios.summary(),
        "models": {model: digest for model, (_, digest) in models.items()},
        "ratios": {k: v.tolist() for k, v in vars(ratios).items()},
        "image_ids": task.splits["forget"].distinct().ids,
    }
    path = folder.path / "shadows" / f"{name}.json"
    write_json(path, content)
    return path, content


def _train(engine: Engine, context: Context, trial: Trial, shadows: int) -> dict[str, tuple[str, str]]:
    """Name -> (folder, digest) of the unlearned and the retrained model of each shadow."""
    ended = 0

    def train(number: int) -> dict[str, tuple[str, str]]:
        nonlocal ended
        models = _train_shadow(engine, context, trial, number)
        ended += 1
        engine.events.say("shadow", f"{ended} of {shadows}")
        return models

    with engine.threads() as threads:
        futures: list[Future[dict[str, tuple[str, str]]]] = [threads.submit(train, k) for k in range(shadows)]
        return {name: model for future in futures for name, model in future.result().items()}


def _train_shadow(engine: Engine, context: Context, trial: Trial, number: int) -> dict[str, tuple[str, str]]:
    """Trains one shadow: a base, its unlearned version, and a model that never saw the forgotten images."""
    sweep, task, folder = engine.sweep, engine.task, engine.folder
    seed = derive_seed("shadow", sweep.task.seed, number)
    base_job = retrain_job(sweep, task, folder.task, f"shadow-base-{number}", "train", seed)
    base = _run(engine, base_job)
    oracle_job = retrain_job(sweep, task, folder.task, f"shadow-oracle-{number}", "retain", seed)
    oracle = _run(engine, oracle_job)
    start = Context(**vars(context) | {"base": base_job.out, "base_digest": base.digest})
    prepared = None
    if prepares(resolve("method", trial.method)):
        preparation = prepare_job(sweep, start, trial.method, trial.hyperparameters)
        _run(engine, preparation)
        prepared = preparation.out
    config = {
        "trial": trial.trial,
        "method": trial.method,
        "hyperparameters": trial.hyperparameters,
        "seed": derive_seed("shadow trial", trial.seed, number),
        "source": "shadow",
    }
    job = start.job(sweep, config)
    out = str(folder.path / "shadows" / trial.trial / f"unlearned-{number}")
    job = Job(**vars(job) | {"id": f"{job.id}-shadow-{number}", "out": out, "prepared": prepared, "as_delta": False})
    unlearned = _run(engine, job)
    return {
        f"unlearned-{number}": (job.out, unlearned.digest),
        f"retrained-{number}": (oracle_job.out, oracle.digest),
    }


def _run(engine: Engine, job: Job) -> Outcome:
    outcome = engine.executor.run(job)
    if outcome.status != "ok":
        raise RunFailed(f"{job.id}: {outcome.reason}")
    return outcome


def _scores(engine: Engine, context: Context, trial: str, models: dict[str, tuple[str, str]]) -> dict[str, np.ndarray]:
    """Model -> loss scores (images,) of the forgotten images, at the step and with the sign that the run's base calibrates."""
    engine.actors.audit_only()
    tier = engine.sweep.audit.audit.model_copy(update={"checks": ("loss",), "strips": 0, "weights": {}})
    requests = {name: context.request("shadow", tier, f"{trial}-{name}", "", *model) for name, model in models.items()}
    keys, failed = Audits.start(engine, requests).collect()
    if failed:
        raise RunFailed(f"scoring failed: {'; '.join(failed)}")
    losses = {}
    for name, key in keys.items():
        scores = load_scores(scores_path(engine.folder.path, key))
        step, sign = scores["loss.calibration"][0]
        losses[name] = sign * scores["loss.forget"][:, int(step)]
    engine.events.say("shadow", f"{len(losses)} models scored on {len(losses['candidate'])} forgotten images")
    return losses
