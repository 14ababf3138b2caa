"""Runs a tier's checks on one model and keeps everything that later steps need: metrics, scores, replicates.

A check that raises becomes a row with status `failed` and its reason; one that does not apply to the task becomes
`skipped`. Neither can look like a pass.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from evaluators.base import BATCHES, Evaluator, Inapplicable, Metric, Scores, Subject, without_group
from raysweep.config.schema import Tier
from raysweep.models.noise import row_seeds
from raysweep.registry import resolve, unserved
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task


@dataclass
class Measurement:
    """What one tier measured on one model.

    rows: one dict per metric (`check` is the evaluator's name, the rest are the fields of `Metric`).
    values: "check.metric" -> value; replicates: the same metrics without each group of units in turn.
    scores: "check.score" -> raw scores by unit.
    images: how many were generated, for the subject and the models that it is compared with.
    """

    rows: list[dict] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    replicates: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    images: int = 0


def subject_of(model: Any, task: Task, judge: torch.nn.Module | None, tier: Tier) -> Subject:
    """What the checks of `tier` see of `model`."""

    def seeds(stream: str, count: int) -> torch.Tensor:
        return row_seeds(derive_seed("audit", tier.seed, stream), 0, count)

    return Subject(model, task, judge if judge is None else judge.eval(), tier.sizes(), seeds)  # type: ignore[arg-type]


def measure(subject: Subject, tier: Tier) -> Measurement:
    """All checks of `tier` on `subject`. Deterministic in its model, task and judge, the tier, and its peers."""
    started, before = time.monotonic(), BATCHES.generated
    task: Any = subject.task
    result = Measurement()
    for name in tier.checks_for(task):
        evaluator: Evaluator = resolve("evaluator", name)()
        if task.kind not in evaluator.kinds or unserved(evaluator, task.family):
            what = f"a task of kind {task.kind!r}" if task.kind not in evaluator.kinds else f"a {task.family} model"
            reason = f"does not apply to {what}"
            result.rows += _absent(evaluator, "skipped", reason)
            continue
        halved = BATCHES.halved
        try:
            metrics, values, replicates, scores = _check(evaluator, subject, tier.groups)
        except Inapplicable as error:
            result.rows += _absent(evaluator, "skipped", str(error))
            continue
        except Exception as error:  # any fault of a check must end up in the record, not end the audit
            result.rows += _absent(evaluator, "failed", f"{type(error).__name__}: {error}")
            continue
        if BATCHES.halved > halved:
            note = f"memory ran out: batches of {BATCHES.size}"
            metrics = [replace(m, reason="; ".join(filter(None, (m.reason, note)))) for m in metrics]
        result.rows += [{"check": name} | asdict(metric) for metric in metrics]
        result.values |= {f"{name}.{k}": v for k, v in values.items()}
        result.replicates |= {f"{name}.{k}": v.tolist() for k, v in replicates.items()}
        result.scores |= {f"{name}.{k}": np.asarray(v) for k, v in scores.items()}
    if tier.strips and task.model_kind == "diffusion":  # others draw no images
        result.scores |= _strips(subject, tier.strips)
    result.seconds, result.images = time.monotonic() - started, BATCHES.generated - before
    return result


def _strips(subject: Subject, count: int) -> Scores:
    """Pictures for people: the first samples of each kind, and the forgotten image noised and rebuilt."""
    strips = {"strip.samples": subject.samples()[0][:count]}
    if subject.classed:
        cond = subject.forgotten(count)
        seeds = subject.seeds("class samples", count)
        strips["strip.forgotten"] = subject.generate(cond, seeds)
    else:
        model, seeds = subject.model, subject.seeds("injection", count)
        strips["strip.rebuilt"], x0 = subject.rebuilt(subject.task.splits["forget"].distinct(), 0, seeds)
        noise, t = model.noise(seeds), torch.tensor([subject.sizes["injection_t"]])
        noised = model.add_noise(model.encode(x0.to(noise)), noise, t)
        strips["strip.noised"] = model.decode(noised).cpu()
    return {name: images.float().numpy() for name, images in strips.items()}


def _check(
    evaluator: Evaluator, subject: Subject, groups: int
) -> tuple[list[Metric], dict[str, float], dict[str, np.ndarray], Scores]:
    scores: Scores = evaluator.scores(subject)
    return *reduce(evaluator, scores, subject, groups), scores


def reduce(
    evaluator: Evaluator, scores: Scores, subject: Subject, groups: int
) -> tuple[list[Metric], dict[str, float], dict[str, np.ndarray]]:
    """(metrics, values, replicates) of scores; needs the subject's task and judge, but no model."""
    for key, array in scores.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{key} is not finite")
    values = evaluator.values(scores, subject)
    parts = [evaluator.values(without_group(scores, g, groups), subject) for g in range(groups)]
    replicates = {name: np.array([part[name] for part in parts]) for name in values}
    return evaluator.rows(scores, subject, replicates), values, replicates


def _absent(evaluator: Evaluator, status, reason: str) -> list[dict]:
    metrics = [Metric(m, None, 0, direction=d, status=status, reason=reason) for m, d in evaluator.directions.items()]
    return [{"check": evaluator.name} | asdict(metric) for metric in metrics]
