"""Audits one model, made by anyone, without a sweep, and writes its audit card."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from raysweep.auditing import card
from raysweep.auditing.anchors import View
from raysweep.auditing.card import Card, Code, Finding, ModelFolder, TaskFolder
from raysweep.auditing.informative import caveat
from raysweep.auditing.objectives import Objectives, floor_in_words, in_words, noise_floor, objectives
from raysweep.auditing.request import AuditRequest, rows_path, scores_path
from raysweep.auditing.untested import results_of, untested
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.engine.attempt import attempt
from raysweep.engine.audits import Audits, measure_anchors
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine
from raysweep.engine.events import Events
from raysweep.engine.model_checks import check_distinct, check_latents, check_model, given_models
from raysweep.engine.prepare import prepare
from raysweep.models import families
from raysweep.models.contents import not_read
from raysweep.models.identity import Identity
from raysweep.plugins import audit_code
from raysweep.results.front import verdict_of
from raysweep.results.paired import write_paired
from raysweep.rundir import RunDir, git_commit, now, versions
from raysweep.tasks.records import data_lines
from raysweep.tasks.task import Task

TIERS = ("audit", "durability")


def audit_model(model: Path, sweep: Sweep, events: Events) -> tuple[Path, Card]:
    """Audits a diffusers folder in the full tier and by all attacks, next to base and oracles; (path of the card, card).

    The run directory is that of the sweep with "-audits" after its name. Seeds, timesteps and numbers of steps are drawn for each
    model, and the anchors are measured with the same; a repeated audit of the same weights keeps them. Raises ConfigError if the
    folder holds no model that fits the task, RunFailed if an audit came to no result.
    """
    sweep = sweep.model_copy(update={"name": f"{sweep.name[:50]}-audits"})
    task, _ = resolve_sweep(sweep)
    audited = replace(check_model(str(model), task, str(model)), folder=str(model.absolute()))
    name, digest = subject_name(model, audited.digest), audited.digest
    check_distinct(*given_models(sweep, task), audited)
    if task.base is not None:
        check_latents(str(model), families.load(task.base), str(model))
    folder = RunDir.of(sweep)
    for text in sweep.warnings:
        events.say("warning", text)
    with attempt(folder, sweep, task, subject=digest) as sweep:
        for line in data_lines(task):
            events.say("data", line)
        with Engine.open(folder, sweep, task, events) as engine:
            context = prepare(engine)
            anchors_by_name = _anchor_models(context)
            base_model, *oracle_models = anchors_by_name.values()
            check_distinct(oracle_models, base_model, audited)
            if task.base is None:  # the base has only now been trained
                check_latents(str(model), families.load(context.base), str(model))
            engine.actors.audit_only()
            requests = {
                tier: context.request(tier, getattr(sweep.audit, tier), name, "", audited.folder, digest)
                for tier in TIERS
            }
            running = Audits.start(engine, requests)
            incomplete = measure_anchors(engine, context, "audit", sweep.audit.audit)
            keys, missing = running.collect()
            if set(keys) != set(requests):
                raise RunFailed("; ".join(missing))
        incomplete += missing
        anchors, views = context.load_anchors("audit")
        measured = load_measured(folder.path, keys["audit"])
        result = objectives(measured, anchors, views, task.quality, task.validity)
        floor = noise_floor(anchors, views, task.quality, task.validity)
        write_paired(folder, context, {name: keys["audit"]}, {})
        models = {n: _described(m) for n, m in ({name: audited} | anchors_by_name).items()}
        path = write_card(sweep, task, context, requests, result, floor, views, models, incomplete)
        folder.update(state="incomplete" if incomplete else "done", incomplete=incomplete)
    return path, card.read(path)


def _anchor_models(context: Context) -> dict[str, Identity]:
    """The base, then the oracles, by name."""
    folders = {"base": context.base} | {name: folder for name, (folder, _) in sorted(context.oracles.items())}
    return {name: Identity.read(folder) for name, folder in folders.items()}


def _described(model: Identity) -> ModelFolder:
    return ModelFolder(model.folder, model.digest, model.networks, not_read(Path(model.folder)))


def _control(card: Card) -> list[str]:
    """A sentence if the audited model is the base, whose residue shows that the audit can tell."""
    audited, base = card.models[card.subject], card.models["base"]
    if set(audited.networks).isdisjoint(base.networks):
        return []
    same = "is the base itself" if audited.digest == base.digest else "has the weights of the base, with other settings"
    return [f"The audited model {same}: this is a positive control, and its residue should be near 1."]


def subject_name(model: Path, digest: str) -> str:
    """The name of an audited model in tables and cards: its folder's name and its weights, FOLDER@HASH.

    Folders may share a name, with one another and with the anchors, whose names have no "@": base, oracle-K, destroyed.
    """
    return f"{Path(os.path.abspath(model)).name}@{digest[:8]}"


def write_card(
    sweep: Sweep,
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

    requests: tier -> its audit. floor: the oracles, each placed by the others. views: of the task, as the anchors were measured in them. models: the audited model, the base
    and the oracles, by name. incomplete: checks that failed.
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
        asked=_question(sweep, task, request),
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
    return card.write(out, content, tables, Path(request.judge) if request.judge else None)


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


def _question(sweep: Sweep, task: Task, request: AuditRequest) -> str:
    images = len(task.splits["forget"].distinct())
    target = task.thing or f"{images} distinct image{'s' * (images > 1)}"
    oracles = sum(name != "base" for name, *_ in request.anchors)
    origin = "given" if sweep.oracle_models else "trained here"
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
