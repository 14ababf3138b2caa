"""Statistical power of the configured numbers of samples, computed before anything runs. No Ray."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from raysweep.auditing.anchors import ALTERED, INFORMATIVE, View, knows_less
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.registry import checks_by_weights, names, resolve, suggest, unserved
from raysweep.tasks.task import Task

# Metrics that are shares of independent samples, and the setting with their number.
SHARES = {
    "classifier.unlearning_accuracy": "class_samples",
    "classifier.recognised": "class_samples",
    "classifier.retain_accuracy": "samples",
    "classifier.validity": "samples",
    "classifier.leak": "samples",
    "generation.rate": "samples",
    "reconstruction.hits": "noises",
}

# Metrics of objectives, and the setting that limits their precision; None if the task's images do.
DECIDED_BY: dict[str, str | None] = {
    "classifier.leak": "samples",
    "classifier.recognised": "class_samples",
    "contrast.forget_similarity": None,
    "contrast.recognised": None,
    "contrast.retain_loss": None,
    "denoising.forget_log_loss": "loss_noises",
    "denoising.unlabelled_log_loss": "loss_noises",
    "fidelity.frechet": "samples",
    "generation.rate": "samples",
    "questions.forget_accuracy": None,
    "questions.retain_error": None,
    "reconstruction.correlation": "noises",
} | dict.fromkeys(ALTERED, "noises")

MOST_SAMPLES = 2**30  # that are considered
AFFORDABLE = 30.0  # largest factor by which the advice may raise a number of samples


def decided_by(metric: str, kind: str, tier: str = "audit") -> str:
    """The setting that limits the precision of `metric` on tasks of a kind, or the limit in words."""
    key = DECIDED_BY.get(metric, "")
    if metric == "relearning.presence":
        key = "class_samples" if kind in ("class", "concept") else "noises"
    if key:
        return f"audit.{tier}.{key}"
    return "the number of the task's held-out images" if key is None else f"the samples of audit.{tier}"


def remedies(views: Sequence[View], task: Task, tier_name: str, tier: Tier) -> str:
    """Advice if no view of a tier separates the base from the oracles: the settings to raise, and to which values."""
    name, samples = tier_name.partition("-")[0], []
    if all(view.base is None for view in views):
        return "the checks gave nothing to compare: fix what made them fail, and run the same command again"
    for view in views:
        if view.base is None or view.oracle is None or not view.gap_se or view.base == view.oracle:
            continue
        if knows_less(view.metric, view.base, view.oracle):  # more samples would only confirm it
            continue
        key = decided_by(view.metric, task.kind, name)
        times = (INFORMATIVE * view.gap_se / abs(view.base - view.oracle)) ** 2
        count = getattr(tier, key.rpartition(".")[2], None)
        if isinstance(count, int) and times <= AFFORDABLE:
            samples.append(
                f"if so small a difference of {view.metric} is worth forgetting, raise {key} from {count} to about "
                f"{math.ceil(count * times)}"
            )
    if name == "probe" and samples:  # the audit, with more samples, separates them
        return "; or ".join(samples)
    if task.given_base:
        training = (
            "task.base may not have learned what must be forgotten, or the oracles may have: check that the model was trained on "
            "the forget set and the oracles without it"
        )
    else:
        training = (
            "the base has hardly learned what it must forget: train it for longer (task.base_steps, "
            f"{task.recipe['steps']} so far)"
        )
    return "; or ".join([training, *samples])


@dataclass(frozen=True)
class Requirement:
    """A condition for a recommendation: the whole interval of `metric` lies on the right side of `bound`.

    least: whether `bound` is the least value, else the largest.
    """

    metric: str
    least: bool
    bound: float

    def met(self, low: float | None, high: float | None) -> bool:
        """Whether the interval [low, high] meets it; a metric without an interval does not."""
        end = low if self.least else high
        return end is not None and (end >= self.bound if self.least else end <= self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.least else '<='} {self.bound:g}"


def requirements(sweep: Sweep, task: Task) -> list[Requirement]:
    """The conditions of `audit.require`; raises ConfigError for metrics that do not exist or that the audit does not measure."""
    conditions, checks = [], sweep.audit.audit.checks_for(task)
    for metric, text in sweep.audit.require.items():
        match = re.fullmatch(r"\s*(>=|<=)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*", text)
        check, _, name = metric.partition(".")
        setting = f"audit.require.{metric}"
        if match is None:
            raise ConfigError(f'{setting}: {text!r} must be ">= NUMBER" or "<= NUMBER"')
        if check not in names("evaluator"):
            raise ConfigError(f"{setting}: {check!r} is not an evaluator{suggest(check, names('evaluator'))}")
        evaluator = resolve("evaluator", check)
        metrics = list(evaluator.directions)
        if name.partition("@")[0] not in metrics:
            raise ConfigError(f"{setting}: {check} has no metric {name!r}{suggest(name, metrics)}")
        if check not in checks:
            key = checks_by_weights().get(check)
            remedy = f": it needs audit.audit.weights.{key}" if key else f"; those are: {', '.join(checks)}"
            raise ConfigError(f"{setting}: {check} is not among the checks of the tier audit{remedy}")
        if task.kind not in evaluator.kinds or unserved(evaluator, task.family):
            raise ConfigError(
                f"{setting}: {check} does not apply to a task of kind {task.kind!r} with a {task.family} model"
            )
        conditions.append(Requirement(metric, match[1] == ">=", float(match[2])))
    return conditions


def undecidable(sweep: Sweep, task: Task) -> list[str]:
    """Requirements that even a perfect outcome could not meet with the configured samples, and the numbers that suffice."""
    problems = []
    for requirement in requirements(sweep, task):
        setting = SHARES.get(requirement.metric)
        if setting is None:
            continue
        n = getattr(sweep.audit.audit, setting)
        bound = _perfect_bound(requirement, n)
        if requirement.met(bound, bound):
            continue
        needed = _samples_needed(requirement)
        if needed is None:
            problems.append(f"audit.require: {requirement} can be met by no number of samples")
            continue
        perfect = f"{n if requirement.least else 0} of {n}"
        problems.append(
            f"audit.require: {requirement} cannot be decided with audit.audit.{setting} {n}: even {perfect} leaves an interval "
            f"to {bound:.3g}; {needed} samples could"
        )
    return problems


def _perfect_bound(requirement: Requirement, n: int) -> float:
    """The end of the exact interval that a requirement reads, for a perfect outcome of n samples."""
    from evaluators.statistics import clopper_pearson

    return clopper_pearson(n, n)[0] if requirement.least else clopper_pearson(0, n)[1]


def _samples_needed(requirement: Requirement) -> int | None:
    """The smallest number of samples with which a perfect outcome meets a requirement; None if there is none."""

    def is_met(n: int) -> bool:
        bound = _perfect_bound(requirement, n)
        return requirement.met(bound, bound)

    numbers = range(1, MOST_SAMPLES + 1)
    index = bisect_left(numbers, True, key=is_met)
    return numbers[index] if index < len(numbers) else None


def detectable(tier: Tier, task: Task) -> list[str]:
    """The smallest differences that the tier detects with 80 % power at 95 %, and the rate that zero hits exclude, in words."""
    from evaluators.statistics import clopper_pearson, detectable_auc, detectable_proportion

    forget, held = (min(tier.membership_images, len(task.splits[n].distinct())) for n in ("forget", "forget_holdout"))
    lines = []
    if task.forget_class is not None:
        n = tier.class_samples
        lines.append(f"unlearning accuracy: {detectable_proportion(n, 0.05):.3f} near 0.95 (n = {n})")
        lines.append(f"retain accuracy: {detectable_proportion(tier.samples, 0.05):.3f} near 0.95 (n = {tier.samples})")
    else:
        bound = clopper_pearson(0, tier.samples)[1]
        lines.append(f"generation: zero hits in {tier.samples} samples leave a rate up to {bound:.4f} possible")
    if forget > 1:
        lines.append(
            f"membership AUC: {detectable_auc(forget, held):.3f} from 0.5 ({forget} forgotten, {held} held out)"
        )
    else:
        lines.append(f"membership of one image: its rank among {held}, so steps of {1 / held:.3f}")
    return lines
