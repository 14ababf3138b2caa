"""The audit of one model that anyone made, without a sweep, and its card."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from raysweep.audit import card
from raysweep.audit.informative import caveat
from raysweep.audit.objectives import Objectives, Unmeasured, objectives
from raysweep.audit.request import AuditRequest, rows_path, scores_path
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.cluster import Pool, RunFailed, connected, has_trial_slots, pool
from raysweep.engine.prepare import (
    Say,
    Tick,
    check_latents,
    check_model,
    gather,
    measure_anchors,
    prepare,
    save_task,
)
from raysweep.engine.resources import make_plan
from raysweep.engine.trial import make_executor
from raysweep.models import families
from raysweep.plugins import audit_code
from raysweep.results.front import verdict_of
from raysweep.results.paired import write_paired
from raysweep.rundir import RunDir, git_commit, versions
from raysweep.tasks.records import data_lines
from raysweep.tasks.task import Task


def audit_model(model: Path, sweep: Sweep, say: Say, tick: Tick) -> tuple[Path, dict[str, Any]]:
    """Audits a diffusers folder in the full tier and by all attacks, next to base and oracles; (path of the card, card).

    Raises ConfigError if the folder holds no model that fits the task.
    """
    sweep = sweep.model_copy(update={"name": f"{sweep.name[:50]}-audits"})
    task, _ = resolve_sweep(sweep)
    digest = check_model(str(model), task, str(model))
    name = subject_name(model, digest)
    if task.base is not None:
        check_latents(str(model), families.load(task.base), str(model))
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {"config": sweep.digest, "task": task.digest}, sweep.audit.checks_for(task)):
        for line in data_lines(task):
            say("data", line)
        folder.update(data=list(task.accounts), reason="", incomplete=[])  # these two of an attempt before
        run_id = folder.run_id
        save_task(folder, task)
        try:
            with connected(sweep) as cluster:
                plan = make_plan(cluster.nodes, sweep, has_trial_slots())
                with pool(folder.path, run_id, sweep, plan) as actors:
                    executor = make_executor(str(folder.path), run_id, sweep, plan)
                    context = prepare(sweep, task, folder, run_id, executor, actors, say, tick)
                    if task.base is None:  # only now it is known
                        check_latents(str(model), families.load(context.base), str(model))
                    requests, incomplete = _measure(
                        sweep, task, context, actors, (name, str(model.absolute()), digest), say, tick
                    )
            anchors, views = context.load_anchors("audit")
            key = requests["audit"].key
            place = objectives(load_measured(folder.path, key), anchors, views, task.quality, task.validity)
        except (RunFailed, Unmeasured) as error:
            folder.update(state="failed", reason=str(error))
            raise RunFailed(str(error)) from error
        except KeyboardInterrupt:
            folder.update(state="interrupted")
            raise
        except Exception as error:
            folder.update(state="failed", reason=f"{type(error).__name__}: {error}")
            raise
        write_paired(folder, context, {name: key}, {})
        made = write_card(
            sweep, task, context, folder, name, str(model.absolute()), digest, requests, place, incomplete
        )
        folder.update(state="incomplete" if incomplete else "done", incomplete=incomplete)
    return made, card.read(made)


def subject_name(model: Path, digest: str) -> str:
    """What tables and cards call an audited model: its folder's name and its weights, FOLDER@HASH.

    Folders may share a name, with one another and with the anchors, which have no "@" in theirs: base, oracle-K, destroyed.
    """
    return f"{Path(os.path.abspath(model)).name}@{digest[:8]}"


def _measure(
    sweep: Sweep, task: Task, context: Context, actors: Pool, subject: tuple[str, str, str], say: Say, tick: Tick
) -> tuple[dict[str, AuditRequest], list[str]]:
    """Audits one model (name, folder, digest) and the anchors; (tier -> its audit, what failed).

    Raises RunFailed if an audit came to nothing.
    """
    name, model, digest = subject
    actors.audit_only()
    requests = {
        tier: context.request(tier, getattr(sweep.audit, tier), name, "", model, digest)
        for tier in ("audit", "durability")
    }
    pending = {actors.manager.audit.remote(r): tier for tier, r in requests.items()}
    incomplete = measure_anchors(task, context, actors, "audit", sweep.audit.audit, say)
    keys, missing = gather(pending, requests, say, tick)
    if set(keys) != set(requests):
        raise RunFailed("; ".join(missing))
    return requests, incomplete + missing


def write_card(
    sweep: Sweep,
    task: Task,
    context: Context,
    folder: RunDir,
    name: str,
    model: str,
    digest: str,
    requests: dict[str, AuditRequest],
    place: Objectives,
    incomplete: list[str],
) -> Path:
    """Writes the audit card of one model from what its audits left in the run. incomplete: checks that failed."""
    verdict = verdict_of(folder, name, {tier: r.key for tier, r in requests.items()}, context)
    findings = [f for tier, r in requests.items() for f in card.findings_of(
        rows_path(folder.path, r.key), folder.rows / f"paired-{r.key}.parquet", tier)]  # fmt: skip
    for f in findings:
        f["reason"] = "; ".join(filter(None, (f["reason"], caveat(task.kind, f"{f['check']}.{f['metric']}"))))
    forget = len(task.splits["forget"].distinct())
    thing = task.thing or f"{forget} distinct image{'s' * (forget > 1)}"
    given = "given" if sweep.oracle_models else "trained here"
    skipped = [f for f in findings if f["status"] == "skipped" and f["metric"] in ("auc", "presence")]
    untested = ["Adversarial prompts were not tried.", *(f"{f['check']}: {f['reason']}" for f in skipped)]
    if task.kind == "concept":
        untested.append("Other prompts than the audit's were not tried, and no interval covers them.")
    untested += [f"{text}: the check failed." for text in incomplete]
    content = {
        "subject": name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "answer": [
            f"Residue {place.residue:.3f} (standard error {place.residue_se:.3f}; 0 like a model that never saw the forgotten data, "
            f"1 like the base) at damage {place.damage:.3f} (standard error {place.damage_se:.3f}; 0 like the oracles, 1 like a "
            "destroyed model).",
            f"Under attack: {verdict.sentence()}.",
        ],
        "asked": f"Has {name} forgotten {thing} of the task {task.name}, and what did that cost? Compared with the base model and "
        f"{len(context.oracles)} oracles ({given}) that never saw it.",
        "objectives": {k: v for k, v in place.plain().items() if k != "replicates"},
        "verdict": verdict.plain(),
        "findings": findings,
        "untested": untested,
        "incomplete": incomplete,
        "tiers": {tier: r.tier.model_dump(mode="json") for tier, r in requests.items()},
        "models": {name: {"folder": model, "digest": digest}}
        | {n: {"folder": f, "digest": d} for n, f, d in requests["audit"].anchors},
        "task": {"name": task.name, "digest": task.digest, "folder": str(folder.task)},
        "judge_digest": requests["audit"].judge_digest,
        "code": {
            "version": versions()["raysweep"],
            "commit": git_commit(),
            "audit": audit_code(f["check"] for f in findings),
        },
        "versions": versions(),
    }
    tables = {
        f"{tier}-{kind}.parquet": where(folder.path, r.key)
        for tier, r in requests.items()
        for kind, where in (("rows", rows_path), ("scores", scores_path))
    }
    out = folder.path / "cards" / name
    return card.write(out, content, tables, Path(requests["audit"].judge) if requests["audit"].judge else None)
