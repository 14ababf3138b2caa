"""Writes the audit card of one model from the tables that its audits left in a run. No Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raysweep.auditing import card
from raysweep.auditing.anchors import View
from raysweep.auditing.card import Card, Code, Finding, ModelFolder, TaskFolder
from raysweep.auditing.informative import caveat
from raysweep.auditing.objectives import Objectives, floor_in_words, in_words, noise_floor, objectives
from raysweep.auditing.request import AuditRequest, rows_path, scores_path
from raysweep.auditing.untested import results_of, untested
from raysweep.context import Context, load_measured
from raysweep.plugins import audit_code
from raysweep.results.front import verdict_of
from raysweep.results.paired import write_paired
from raysweep.rundir import RunDir, git_commit, now, versions
from raysweep.tasks.task import Task


def conclude(
    task: Task,
    context: Context,
    requests: dict[str, AuditRequest],
    models: dict[str, ModelFolder],
    given: bool,
    incomplete: list[str],
) -> Path:
    """Places a model on its scales and writes its paired differences and its card, all from the tables that audits left in the run.

    `raysweep verify` calls it on the tables of a card. given: whether the user gave the oracles. Others: see `write_card`.
    """
    folder, request = context.folder, requests["audit"]
    anchors, views = context.load_anchors("audit")
    measured = load_measured(folder.path, request.key)
    result = objectives(measured, anchors, views, task.quality, task.validity)
    floor = noise_floor(anchors, views, task.quality, task.validity)
    write_paired(folder, context, {request.subject: request.key}, {})
    return write_card(given, task, context, requests, result, floor, views, models, incomplete)


def write_card(
    given: bool,
    task: Task,
    context: Context,
    requests: dict[str, AuditRequest],
    result: Objectives,
    floor: list[Objectives],
    views: list[View],
    models: dict[str, ModelFolder],
    incomplete: list[str],
) -> Path:
    """Writes the audit card of one model from the tables that its audits left in the run.

    given: whether the user gave the oracles. requests: tier -> its audit. floor: the oracles, each placed by the others. views: of the
    task, as the anchors were measured in them. models: the audited model, the base and the oracles, by name. incomplete: checks that
    failed.
    """
    folder, request = context.folder, requests["audit"]
    verdict = verdict_of(folder, request.subject, {tier: r.key for tier, r in requests.items()}, context)
    findings = _findings(folder, task, requests)
    checks = sorted({f.check for f in findings})
    content = Card(
        subject=request.subject,
        created_at=now(),
        answer=(
            f"{in_words('residue', result.residue, result.residue_lo, result.residue_hi).capitalize()} (0 like a model that never saw "
            f"the forgotten data, 1 like the base), {in_words('damage', result.damage, result.damage_lo, result.damage_hi)} (0 like "
            "the oracles, 1 like a destroyed model).",
            floor_in_words([(oracle.residue, oracle.damage) for oracle in floor]),
            f"Under attack: {verdict.sentence()}.",
        ),
        asked=_question(given, task, request),
        objectives=result.placement(),
        verdict=verdict,
        findings=tuple(findings),
        untested=tuple(_untested(task, requests, findings, views, incomplete)),
        incomplete=tuple(incomplete),
        tiers={tier: r.tier.model_dump(mode="json") for tier, r in requests.items()},
        models=models,
        task=TaskFolder(task.name, task.digest, str(folder.task)),
        judge_digest=request.judge_digest,
        code=Code(versions()["raysweep"], git_commit(), audit_code(checks)),
        versions=versions(),
    )
    tables = {
        f"{tier}-{kind}.parquet": path_of(folder.path, r.key)
        for tier, r in requests.items()
        for kind, path_of in (("rows", rows_path), ("scores", scores_path))
    }
    content = replace(content, answer=(*_control(content), *content.answer))
    out = folder.path / "cards" / request.subject
    of_anchors = {
        name: (rows_path(folder.path, key), scores_path(folder.path, key))
        for name, key in context.anchor_keys("audit").items()
    }
    return card.write(out, content, tables, Path(request.judge) if request.judge else None, of_anchors)


def _findings(folder: RunDir, task: Task, requests: dict[str, AuditRequest]) -> list[Finding]:
    """The findings of all tiers, each with the caveat that its check carries on this kind of task."""
    findings = []
    for tier, request in requests.items():
        paired = folder.rows / f"paired-{request.key}.parquet"
        findings += card.findings_of(rows_path(folder.path, request.key), paired, tier)
    caveats = (caveat(task.kind, f"{f.check}.{f.metric}") for f in findings)
    return [
        replace(f, reason="; ".join(filter(None, (f.reason, warning))))
        for f, warning in zip(findings, caveats, strict=True)
    ]


def _question(given: bool, task: Task, request: AuditRequest) -> str:
    images = len(task.splits["forget"].distinct())
    target = task.thing or f"{images} distinct image{'s' * (images > 1)}"
    oracles = sum(name != "base" for name, *_ in request.anchors)
    origin = "given" if given else "trained here"
    return (
        f"Has {request.subject} forgotten {target} of the task {task.name}, and what did that cost? Compared with the base model "
        f"and {oracles} oracles ({origin}) that never saw it."
    )


def _untested(
    task: Task, requests: dict[str, AuditRequest], findings: list[Finding], views: list[View], incomplete: list[str]
) -> list[str]:
    """Sentences on what the card does not cover."""
    request = requests["audit"]
    lines = untested(
        task,
        {tier: r.tier for tier, r in requests.items()},
        results_of(map(vars, findings), request.subject),
        views,
        oracles=sum(name != "base" for name, *_ in request.anchors),
    )
    return [*(f"Incomplete: {text}." for text in incomplete), *lines]


def _control(card: Card) -> list[str]:
    """A sentence if the audited model is the base, whose residue shows that the audit can tell."""
    audited, base = card.models[card.subject], card.models["base"]
    if set(audited.networks).isdisjoint(base.networks):
        return []
    same = "is the base itself" if audited.digest == base.digest else "has the weights of the base, with other settings"
    return [f"The audited model {same}: this is a positive control, and its residue should be near 1."]
