"""U-LiRA: can it be told, image by image, what was unlearned from what was never seen? By shadow models of one's own.

After Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", arXiv:2403.01218.
Each shadow is a pair of a seed of its own: a model trained with the forgotten images to which the method with a trial's
settings is then applied, and one retrained without them. An image's log likelihood ratio under a model compares its loss
score with those under all other unlearned and all other retrained shadows (two normal distributions, deviations pooled over
images). Each shadow's two models are judged by the others; so is the trial's candidate itself. Accuracy 1/2 means that
unlearned models cannot be told from retrained ones by this attack; one attack for all images would say so too early.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from evaluators.attacks import lira_online
from evaluators.statistics import auc_interval, clopper_pearson, t_interval
from raysweep.audit.card import load_scores
from raysweep.audit.request import scores_path
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.context import Context
from raysweep.engine.cluster import Pool, RunFailed, connected, has_trial_slots, pool
from raysweep.engine.prepare import Say, prepare_job, prepares, retrain_job
from raysweep.engine.resources import make_plan
from raysweep.engine.trial import make_executor
from raysweep.registry import resolve
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import RunDir
from raysweep.storage.files import write_json
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task
from raysweep.train.executors import Executor
from raysweep.train.jobs import Job, Outcome

LEAST = 3  # shadows: two of a kind must be left to fit a deviation when one is judged


@dataclass(frozen=True)
class ULiRA:
    """What the attack found.

    unlearned, retrained: log likelihood ratios (shadows, images) of each shadow's models, judged by the others; positive
    says "unlearned". candidate: those of the trial's own model (images,), judged by all.
    """

    unlearned: np.ndarray
    retrained: np.ndarray
    candidate: np.ndarray

    def summary(self) -> dict[str, Any]:
        """The numbers with their intervals; the shadows are the independent units."""
        right = np.concatenate([self.unlearned > 0, self.retrained <= 0], axis=1).mean(1)
        if np.ptp(right) > 0:
            _, low, high = t_interval(right)
        else:  # all alike: no spread to go by
            low, high = clopper_pearson(round(right[0] * len(right)), len(right))
        auc, _, *ends = auc_interval(self.unlearned.mean(1), self.retrained.mean(1))
        by_image = np.concatenate([self.unlearned > 0, self.retrained <= 0]).mean(0)
        told, images = int((self.candidate > 0).sum()), len(self.candidate)
        return {
            "shadows": len(right),
            "images": images,
            "accuracy": {"value": float(right.mean()), "lo": max(0.0, low), "hi": min(1.0, high)},
            "auc_over_models": dict(zip(("value", "lo", "hi"), (auc, *ends), strict=True)),
            "worst_image_accuracy": float(by_image.max()),
            "candidate": {
                "images_told": told,
                "lo_hi": clopper_pearson(told, images),
                "mean_ratio": float(self.candidate.mean()),
            },
        }


def u_lira(unlearned: np.ndarray, retrained: np.ndarray, candidate: np.ndarray) -> ULiRA:
    """The attack on scores (shadows, images) of unlearned and of retrained shadows and (images,) of a candidate.

    Raises ValueError for fewer than three shadows.
    """
    shadows = len(unlearned)
    if shadows < LEAST or len(retrained) != shadows:
        raise ValueError(f"needs at least {LEAST} shadows of either kind, as many of one as of the other")

    def judged(own: np.ndarray, left_out: int) -> np.ndarray:
        others = np.arange(shadows) != left_out
        return lira_online(own, unlearned[others].T, retrained[others].T)

    return ULiRA(
        np.stack([judged(unlearned[k], k) for k in range(shadows)]),
        np.stack([judged(retrained[k], k) for k in range(shadows)]),
        lira_online(candidate, unlearned.T, retrained.T),
    )


def run_shadows(folder: RunDir, trial: str, shadows: int, say: Say) -> tuple[Path, dict[str, Any]]:
    """Trains the shadows of a finished trial, scores them, and writes `shadows/TRIAL.json`; (its path, its content).

    Shadows that are there already are found again. Raises ConfigError for a trial without a candidate, RunFailed if a shadow
    cannot be trained.
    """
    sweep = folder.sweep()
    run_id = folder.run_id
    config = next((t for t in trial_table(folder, run_id) if t.trial == trial), None)
    if config is None or not config.is_complete:
        done = [t.trial for t in trial_table(folder, run_id) if t.is_complete]
        raise ConfigError(f"{folder.path}: {trial!r} is not a trial with a candidate; those are: {', '.join(done)}")
    if shadows < LEAST:
        raise ConfigError(f"--models: at least {LEAST}, not {shadows}")
    manifest = folder.read_manifest()
    task, context = Task.load(folder.task), Context.load(str(folder.path))
    with folder.claim(sweep, manifest["digests"]), connected(sweep) as cluster:
        folder.update(state=manifest["state"])  # the run itself stays as it was
        plan = make_plan(cluster.nodes, sweep, has_trial_slots())
        with pool(folder.path, run_id, sweep, plan) as actors:
            executor = make_executor(str(folder.path), run_id, sweep, plan)
            models = _train(sweep, task, context, config, shadows, executor, actors, say)
            models["candidate"] = (str(folder.candidates / trial), config.digest)
            found = _scores(sweep, context, actors, trial, models, say)
    result = u_lira(
        np.stack([found[f"unlearned-{k}"] for k in range(shadows)]),
        np.stack([found[f"retrained-{k}"] for k in range(shadows)]),
        found["candidate"],
    )
    content = {
        "trial": trial, "method": config.method, "hyperparameters": config.hyperparameters,
        "summary": result.summary(), "models": {n: d for n, (_, d) in models.items()},
        "ratios": {k: v.tolist() for k, v in vars(result).items()}, "image_ids": task.splits["forget"].distinct().ids,
    }  # fmt: skip
    out = folder.path / "shadows" / f"{trial}.json"
    write_json(out, content)
    return out, content


def _train(
    sweep: Sweep,
    task: Task,
    context: Context,
    config: Trial,
    shadows: int,
    executor: Executor,
    actors: Pool,
    say: Say,
) -> dict[str, tuple[str, str]]:
    """Name -> (folder, digest) of the unlearned and the retrained model of each shadow."""
    done = 0

    def one(number: int) -> dict[str, tuple[str, str]]:
        nonlocal done
        seed = derive_seed("shadow", sweep.task.seed, number)
        place = context.folder
        base_job = retrain_job(sweep, task, place.task, f"shadow-base-{number}", "train", seed)
        base = _ok(executor.run(base_job), base_job)
        without = retrain_job(sweep, task, place.task, f"shadow-oracle-{number}", "retain", seed)
        retrained = _ok(executor.run(without), without)
        method, settings = config.method, config.hyperparameters
        start = Context(**vars(context) | {"base": base_job.out, "base_digest": base.digest})
        prepared = None
        if prepares(resolve("method", method)):
            making = prepare_job(sweep, start, method, settings)
            _ok(executor.run(making), making)
            prepared = making.out
        plain = start.job(sweep, {"trial": config.trial, "method": method, "hyperparameters": settings,
                                  "seed": derive_seed("shadow trial", config.seed, number), "source": "shadow"})  # fmt: skip
        out = str(place.path / "shadows" / config.trial / f"unlearned-{number}")
        job = Job(**vars(plain) | {"id": f"{plain.id}-shadow-{number}", "out": out, "prepared": prepared})
        unlearned = _ok(executor.run(job), job)
        done += 1
        say("shadow", f"{done} of {shadows}")
        return {
            f"unlearned-{number}": (job.out, unlearned.digest),
            f"retrained-{number}": (without.out, retrained.digest),
        }

    with actors.waiting(executor) as threads:
        futures: list[Future] = [threads.submit(one, k) for k in range(shadows)]
        return {name: where for future in futures for name, where in future.result().items()}


def _ok(outcome: Outcome, job: Job) -> Outcome:
    if outcome.status != "ok":
        raise RunFailed(f"{job.id}: {outcome.reason}")
    return outcome


def _scores(
    sweep: Sweep, context: Context, actors: Pool, trial: str, models: dict[str, tuple[str, str]], say: Say
) -> dict[str, np.ndarray]:
    """Model -> loss scores (images,) of the forgotten images, at the step and with the sign that the run's base calibrates."""
    actors.audit_only()
    tier: Tier = sweep.audit.audit.model_copy(update={"checks": ("loss",), "strips": 0, "weights": {}})
    requests = {name: context.request("shadow", tier, f"{trial}-{name}", "", *where) for name, where in models.items()}
    answers = ray.get([actors.manager.audit.remote(r) for r in requests.values()])
    found = {}
    for (name, request), answer in zip(requests.items(), answers, strict=True):
        if answer["status"] != "ok" or answer["failed"]:
            raise RunFailed(f"scoring {name} failed: {answer['reason'] or answer['failed']}")
        scores = load_scores(scores_path(Path(request.run), request.key))
        step, sign = scores["loss.calibration"][0]
        found[name] = sign * scores["loss.forget"][:, int(step)]
    say("shadow", f"{len(found)} models scored on {len(found['candidate'])} forgotten images")
    return found
