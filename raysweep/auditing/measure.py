"""Runs a tier's checks on one model and returns all that later steps need: metrics, scores, replicates.

A check that raises becomes a row with status `failed` and its reason; one that does not apply to the task becomes
`skipped`. Neither can be mistaken for a pass.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from evaluators import statistics
from evaluators.base import Evaluator, Inapplicable, Metric, Scores, Subject, without_group
from evaluators.batches import Batches
from evaluators.metrics import Status
from raysweep.auditing.request import AuditRequest
from raysweep.auditing.terms import columns_of
from raysweep.config.schema import Tier
from raysweep.models.noise import row_seeds
from raysweep.registry import resolve, unserved
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task

PICTURES = "pictures"  # beside the names of checks


@dataclass
class Measurement:
    """The results of one tier on one model.

    rows: all metrics, each with its check; values: "check.metric" -> value; replicates: the same metrics without each group of
    units in turn; scores: "check.score" -> raw scores by unit.
    seconds: in all; checks: by check, and under `PICTURES` for the report's pictures. What several checks use, such as samples, is
    made for the first of them and counted there.
    images: number of generated images, for the subject and the models that share its batches.
    """

    rows: list[Metric] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    replicates: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    checks: dict[str, float] = field(default_factory=dict)
    images: int = 0

    def add(self, check: str, reduced: Reduced, scores: Scores) -> None:
        """Adds the results of one check."""
        self.rows += [replace(metric, check=check) for metric in reduced.metrics]
        self.values |= {f"{check}.{k}": v for k, v in reduced.values.items()}
        self.replicates |= {f"{check}.{k}": v.tolist() for k, v in reduced.replicates.items()}
        self.scores |= {f"{check}.{k}": np.asarray(v) for k, v in scores.items()}


@dataclass(frozen=True)
class Reduced:
    """The scores of one check reduced to metrics, their values, and the values without each group of units (groups,)."""

    metrics: list[Metric]
    values: dict[str, float]
    replicates: dict[str, np.ndarray]


def subject_of(
    model: Any, task: Task, judge: torch.nn.Module | None, tier: Tier, batches: Batches | None = None
) -> Subject:
    """A model as the checks of `tier` see it; batches: shared with other subjects, None for its own.

    What the tier leaves to be drawn follows from its seed. model: None to recompute metrics from scores.
    """
    tier = tier.in_force(len(model.alphas) if hasattr(model, "alphas") else None, task.sampling.get("steps"))

    def seeds(stream: str, count: int) -> torch.Tensor:
        return row_seeds(derive_seed("audit", tier.seed, stream), 0, count)

    judge = judge if judge is None else judge.eval()
    return Subject(model, task, judge, tier.sizes(), seeds, batches=batches or Batches())  # type: ignore[arg-type]


def measure(subject: Subject, tier: Tier) -> Measurement:
    """Runs all checks of `tier` on `subject`. Deterministic in its model, task and judge, the tier, and its peers."""
    started, images = time.monotonic(), subject.batches.generated
    task: Any = subject.task
    result = Measurement()
    for name in tier.checks_for(task):
        evaluator: Evaluator = resolve("evaluator", name)()
        reason = misfit(evaluator, task)
        if reason:
            result.rows += absent(evaluator, "skipped", reason)
            continue
        halved, began = subject.batches.halved, time.monotonic()
        try:
            scores = evaluator.scores(subject)
            reduced = reduce(evaluator, scores, subject, tier.groups)
        except Inapplicable as error:
            result.rows += absent(evaluator, "skipped", str(error))
            continue
        except Exception as error:  # any fault of a check must end up in the record, not end the audit
            result.rows += absent(evaluator, "failed", f"{type(error).__name__}: {error}")
            continue
        finally:
            result.checks[name] = time.monotonic() - began
        if subject.batches.halved > halved:
            note = f"memory ran out: batches of {subject.batches.size}"
            reduced = replace(reduced, metrics=[_noted(metric, note) for metric in reduced.metrics])
        result.add(name, reduced, scores)
    if tier.strips and task.model_kind == "diffusion":  # others draw no images
        began = time.monotonic()
        result.scores |= _strips(subject, tier.strips)
        result.checks[PICTURES] = time.monotonic() - began
    result.seconds, result.images = time.monotonic() - started, subject.batches.generated - images
    return result


def reduce(evaluator: Evaluator, scores: Scores, subject: Subject, groups: int) -> Reduced:
    """Reduces scores to metrics; needs the subject's task and judge, but no model. Raises ValueError unless all are finite."""
    for key, array in scores.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{key} is not finite")
    values = evaluator.values(scores, subject)
    parts = [evaluator.values(without_group(scores, g, groups), subject) for g in range(groups)]
    replicates = {name: np.array([part[name] for part in parts]) for name in values}
    return Reduced(evaluator.rows(scores, subject, replicates), values, replicates)


def misfit(evaluator: Evaluator, task: Any) -> str:
    """The reason why a check does not apply to a task; empty if it does."""
    if task.kind not in evaluator.kinds:
        return f"does not apply to a task of kind {task.kind!r}"
    return f"does not apply to a {task.family} model" if unserved(evaluator, task.family) else ""


def table_rows(request: AuditRequest, result: Measurement) -> list[dict[str, Any]]:
    """The metrics of an audit as rows of `storage.schemas.ROWS`."""
    common = {
        "subject": request.subject,
        "method": request.method,
        "subject_digest": request.digest,
        "tier": request.tier_name,
        "paired_with": "",
        "level": statistics.LEVEL,
        "seed": request.tier.seed,
        "judge_digest": request.judge_digest,
        "task_digest": request.task_digest,
        "tier_digest": request.tier.digest,
    }
    rows = []
    for metric in result.rows:
        fields = asdict(metric)
        name = fields.pop("name")
        del fields["comparison"]
        fields |= columns_of(metric.comparison)
        rows.append(common | fields | {"metric": name, "replicates": result.replicates.get(f"{metric.check}.{name}")})
    return rows


def _strips(subject: Subject, count: int) -> Scores:
    """Images for people: the first samples of each kind, and the forgotten image noised and rebuilt."""
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


def absent(evaluator: Evaluator, status: Status, reason: str) -> list[Metric]:
    """The main metrics of an evaluator that has no values."""
    return [
        Metric.absent(name, reason, status=status, direction=direction, check=evaluator.name)
        for name, direction in evaluator.directions.items()
    ]


def _noted(metric: Metric, note: str) -> Metric:
    return replace(metric, reason="; ".join(filter(None, (metric.reason, note))))
