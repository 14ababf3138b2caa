"""Audits one model, made by anyone, without a sweep, and writes its audit card."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from raysweep.auditing import card
from raysweep.auditing.card import Card, ModelFolder
from raysweep.auditing.request import AuditRequest
from raysweep.config.schema import Sweep
from raysweep.context import Context
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
from raysweep.results.cards import conclude
from raysweep.results.front import verdict_of
from raysweep.rundir import RunDir
from raysweep.tasks.records import data_lines

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
            missing += _attack_again(engine, context, requests)
        incomplete += missing
        models = {n: _described(m) for n, m in ({name: audited} | anchors_by_name).items()}
        path = conclude(task, context, requests, models, bool(sweep.oracle_models), incomplete)
        folder.update(state="incomplete" if incomplete else "done", incomplete=incomplete)
    return path, card.read(path)


def _attack_again(engine: Engine, context: Context, requests: dict[str, AuditRequest]) -> list[str]:
    """Attacks the model once more if more samples, within `audit.attack_draws`, would decide its verdict; what failed.

    These attacks take the place of the first in `requests`: tier -> audit.
    """
    first, settings = requests["durability"], engine.sweep.audit
    verdict = verdict_of(context.folder, first.subject, {tier: r.key for tier, r in requests.items()}, context)
    factor = settings.repeat(verdict.draws)
    if factor is None or engine.task.model_kind == "contrastive":  # whose attacks draw nothing
        return []
    engine.events.say("attack", f"the verdict is undecided: once more, with {factor} times the samples and noises")
    _, tier = settings.more_draws(factor)
    requests["durability"] = replace(first, tier=tier)
    keys, failed = Audits.start(engine, {"durability": requests["durability"]}).collect()
    if not keys:
        raise RunFailed("; ".join(failed))
    return failed


def _anchor_models(context: Context) -> dict[str, Identity]:
    """The base, then the oracles, by name."""
    folders = {"base": context.base} | {name: folder for name, (folder, _) in sorted(context.oracles.items())}
    return {name: Identity.read(folder) for name, folder in folders.items()}


def _described(model: Identity) -> ModelFolder:
    return ModelFolder(model.folder, model.digest, model.networks, not_read(Path(model.folder)))


def subject_name(model: Path, digest: str) -> str:
    """The name of an audited model in tables and cards: its folder's name and its weights, FOLDER@HASH.

    Folders may share a name, with one another and with the anchors, whose names have no "@": base, oracle-K, destroyed.
    """
    return f"{Path(os.path.abspath(model)).name}@{digest[:8]}"
