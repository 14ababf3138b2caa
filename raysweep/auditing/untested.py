"""What an audit did not test, in sentences: checks left out, failed, skipped or weak, unused views, attacks that do not exist.

Pure functions of the task, the tiers, the results and the views, shared by cards, reports, exported models and dry runs. No Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from raysweep.auditing.informative import LEAST, measured
from raysweep.config.schema import Tier
from raysweep.registry import EVALUATORS, RegistryError, attacks, checks_by_weights, names, reach_of, resolve, unserved
from raysweep.settings import ORACLES
from raysweep.tasks.base import HasObjectives

KINDS = frozenset({"points", "class", "concept"})


class TaskFacts(HasObjectives, Protocol):
    """What is read of a task; a `Task` has it."""

    @property
    def kind(self) -> Any: ...
    @property
    def family(self) -> str: ...


@dataclass(frozen=True)
class StoredFacts:
    """The facts of a task as a run stores it, without its data."""

    kind: str
    family: str
    views: tuple[str, ...]
    quality: str
    validity: str

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> StoredFacts:
        """From the content of task.json."""
        return cls(task["kind"], task["family"], tuple(task["views"]), task["quality"], task["validity"])


class AssessedView(Protocol):
    """A view of the residue, as anchors were measured in it."""

    @property
    def metric(self) -> str: ...
    @property
    def informative(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Result(NamedTuple):
    """A metric of a check on a model, without its numbers; see `ROWS` for the fields."""

    subject: str
    tier: str
    check: str
    metric: str
    status: str
    reason: str


@dataclass(frozen=True)
class Missing:
    """An attack, or another part of an audit, that raysweep does not have.

    kinds, model_kinds: the tasks and the models that it concerns. captions: whether it concerns only models that read prompts.
    """

    sentence: str
    kinds: frozenset[str] = KINDS
    model_kinds: frozenset[str] = frozenset({"diffusion", "contrastive"})
    captions: bool = False


NAMED = frozenset({"class", "concept"})
DRAWS = frozenset({"diffusion"})

# One sentence each, for all cards and reports: change this table when an attack is added to `evaluators`.
MISSING = (
    Missing(
        "No adversarial prompts are optimised against the model.",
        kinds=frozenset({"points", "class"}),
        model_kinds=DRAWS,
        captions=True,
    ),
    Missing(
        "No adversarial prompts are searched for picture by picture, or towards the predictions of the base (P4D).",
        kinds=frozenset({"concept"}),
        model_kinds=DRAWS,
        captions=True,
    ),
    Missing(
        "No adversarial pictures are made, in which small changes of pixels bring recognition back.",
        model_kinds=frozenset({"contrastive"}),
    ),
    Missing(
        "No prompts beyond the audit's are tried, such as paraphrases and other languages, and no interval covers them.",
        kinds=frozenset({"concept"}),
    ),
    Missing(
        "No new token is learned from forgotten pictures (personalisation, textual inversion).",
        model_kinds=DRAWS,
        captions=True,
    ),
    Missing(
        "Visual context other than halves and quarters of forgotten pictures (inpainting) and noised ones is not given: no other masks, "
        "and no image-to-image from pictures of other things.",
        model_kinds=DRAWS,
    ),
    Missing("No classifier guides the sampling towards the forgotten data.", model_kinds=DRAWS),
    Missing("No sums or differences of conditions are tried (concept arithmetic).", kinds=NAMED, model_kinds=DRAWS),
    Missing("No relearning by low-rank adapters, or from more than 10 forgotten images, is tried."),
    Missing("No attacks are combined with one another."),
    Missing(
        "No shadow models are trained (U-LiRA, the strongest attack on membership; `raysweep shadows` does so for a trial).",
        model_kinds=DRAWS,
    ),
)


def untested(
    task: TaskFacts,
    tiers: Mapping[str, Tier],
    results: Iterable[Result],
    views: Iterable[AssessedView] = (),
    *,
    oracles: int | None = None,
) -> list[str]:
    """What an audit leaves open: sentences on checks, views, attacks and oracles.

    tiers: the tiers that were measured, by name. results: of all measured models. oracles: their number, None if it is not
    known.
    """
    results = list(results)
    return [
        *failed(results),
        *skipped(task, results),
        *unused_views(views),
        *weak_checks(task, results),
        *left_out(task, tiers),
        *not_implemented(task),
        *few_oracles(oracles),
    ]


def results_of(rows: Iterable[Mapping[str, Any]], subject: str | None = None) -> list[Result]:
    """The results in rows of `ROWS`, or in findings of a card about `subject`, without paired differences."""
    return [
        Result(subject or r["subject"], r["tier"], r["check"], r["metric"], r["status"], r["reason"])
        for r in rows
        if not r.get("paired_with")
    ]


def failed(results: Sequence[Result]) -> list[str]:
    """A sentence on each check that failed, with the models and the reason."""
    models: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        if r.status == "failed":
            models.setdefault((r.tier, r.check, r.reason), []).append(r.subject)
    return [
        f"{check} failed in the tier {tier} on {', '.join(dict.fromkeys(subjects))}: {reason}."
        for (tier, check, reason), subjects in models.items()
    ]


def skipped(task: TaskFacts, results: Sequence[Result]) -> list[str]:
    """A sentence on each check that fits the task and gave a number for no model, with the reason."""
    status: dict[str, set[str]] = {}
    for r in results:
        status.setdefault(r.check, set()).add(r.status)
    reasons = {check: dict.fromkeys(r.reason for r in results if r.check == check) for check in status}
    return [
        f"{check} was skipped: {'; '.join(reasons[check])}."
        for check, all_of in status.items()
        if all_of == {"skipped"} and applies(check, task)
    ]


def unused_views(views: Iterable[AssessedView]) -> list[str]:
    """A sentence on each view that does not tell the base from the oracles, with the reason."""
    return [f"The view {v.metric} is not part of the residue: {v.reason}." for v in views if not v.informative]


def weak_checks(task: TaskFacts, results: Sequence[Result]) -> list[str]:
    """A sentence on each measured check whose power on the pool of digits is low, and on a kind of task without such a pool."""
    powers, given = measured().get(task.kind), [r for r in results if r.status == "ok"]
    if powers is None:
        kinds = " and ".join(sorted(measured()))
        return [
            f"How well the checks separate models with the forgotten data from models without was measured for tasks of the kind "
            f"{kinds}, not for {task.kind}."
        ]
    lines = []
    for check in dict.fromkeys(r.check for r in given):
        weak = [
            f"{metric} {auc:.2f} ({low:.2f} to {high:.2f})"
            for metric in dict.fromkeys(r.metric for r in given if r.check == check)
            for auc, low, high in [powers.get(f"{check}.{metric}", (1.0, 1.0, 1.0))]
            if auc < LEAST
        ]
        if weak:
            lines.append(
                f"{check} shows little: on the digits pool its AUC in separating models with the forgotten data from models without "
                f"was below {LEAST} (95 % interval in brackets): {', '.join(weak)}."
            )
    return lines


def left_out(task: TaskFacts, tiers: Mapping[str, Tier]) -> list[str]:
    """Sentences on the checks that exist, fit the task and are in no tier, with the setting that adds them."""
    used = {name for tier in tiers.values() for name in tier.checks_for(task)}
    absent = [name for name in names("evaluator") if name not in used and applies(name, task)]
    by_weights, attacking = checks_by_weights(), [n for n in absent if reach_of(n) is not None]
    checks = [n for n in absent if n not in by_weights and n not in attacking]
    costly = [n for n in checks if n in EVALUATORS and EVALUATORS[n].costly]
    lines = [
        f"Not among the checks{reason}: {', '.join(group)}. Name them in audit.audit.checks to add them."
        for group, reason in ((costly, ", for their cost"), ([n for n in checks if n not in costly], ""))
        if group
    ]
    networks: dict[str, list[str]] = {}
    for name in absent:
        if name in by_weights:
            networks.setdefault(by_weights[name], []).append(name)
    if networks:
        shown = "; ".join(f"{', '.join(group)} (audit.audit.weights.{key})" for key, group in networks.items())
        lines.append(f"Not measured without a network's file, which the setting in brackets names: {shown}.")
    if "durability" not in tiers:
        lines.append("No attack of the tier durability was made (audit.finalists is the number of models to attack).")
    elif attacking:
        order = [n for n in attacks() if n in attacking] + [n for n in attacking if n not in attacks()]
        lines.append(f"Not among the attacks: {', '.join(order)}. Name them in audit.durability.checks to add them.")
    return lines


def not_implemented(task: TaskFacts) -> list[str]:
    """The sentences of `MISSING` that concern a task."""
    try:
        family = resolve("family", task.family)
    except RegistryError:  # a family of a package that is not installed: all may concern it
        return [m.sentence for m in MISSING if task.kind in m.kinds]
    return [
        m.sentence
        for m in MISSING
        if task.kind in m.kinds
        and family.model_kind in m.model_kinds
        and ("caption" in family.conditions or not m.captions)
    ]


def few_oracles(oracles: int | None) -> list[str]:
    """A sentence if there are too few oracles to know how much they differ."""
    if oracles is None or oracles >= ORACLES:
        return []
    if oracles < 2:
        return ["The oracle is one retrained model, so how much oracles differ from one another is not known."]
    return [
        "The oracles are two retrained models, so how much oracles differ from one another rests on one difference."
    ]


def applies(check: str, task: TaskFacts) -> bool:
    """Whether a check works on tasks of this kind and on their models; False if it cannot be imported."""
    try:
        evaluator = resolve("evaluator", check)
        return task.kind in evaluator.kinds and not unserved(evaluator, task.family)
    except RegistryError:
        return False
