"""Measures one model in this process, with the checks that auditors run, without a run directory. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import ValidationError

from evaluators.batches import Batches
from raysweep.auditing.judges import judge_of
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.draws import fresh_seed
from raysweep.config.schema import AuditConfig, ConfigError, Tier
from raysweep.models.identity import Identity, clashes
from raysweep.models.threads import one_thread
from raysweep.storage.schemas import METRICS
from raysweep.tasks.task import Task


def measure_model(
    model: Any,
    task: Task,
    checks: Sequence[str] = (),
    *,
    base: Any = None,
    oracles: Sequence[Any] = (),
    judge: torch.nn.Module | None = None,
    cache: str | Path | None = None,
    **sizes: Any,
) -> pa.Table:
    """One row per metric of a model, with the columns of `storage.schemas.METRICS`; `raysweep.measure` describes the arguments.

    The table's metadata `settings` are those of the tier in force, as JSON.
    """
    tier = tier_of(checks, sizes)
    if tier.seed is None:
        tier = tier.model_copy(update={"seed": fresh_seed()})
    tier = tier.in_force(len(model.alphas) if hasattr(model, "alphas") else None, task.sampling.get("steps"))
    if judge is None:
        judge = judge_of(task, tier.judge, None if cache is None else Path(cache))
    training = judge is not None and judge.training
    batches = Batches()
    if oracles:
        problems = clashes(
            [Identity.of(oracle, f"oracle {k}") for k, oracle in enumerate(oracles)],
            None if base is None else Identity.of(base, "that was given"),
            Identity.of(model, "that was given"),
        )
        if problems:
            raise ConfigError("\n".join(f"oracles: {problem}" for problem in problems))
    named = ({} if base is None else {"base": base}) | {f"oracle-{k}": oracle for k, oracle in enumerate(oracles)}
    peers = {name: subject_of(peer, task, judge, tier, batches) for name, peer in named.items()}
    subject = next((peers[name] for name, peer in named.items() if peer is model), None)
    subject = subject or subject_of(model, task, judge, tier, batches)
    for each in (subject, *peers.values()):
        each.peers = peers
    with one_thread():
        metrics = measure(subject, tier).rows
    if judge is not None:
        judge.train(training)  # the checks have put it into evaluation mode
    rows = [{"check": m.check, "metric": m.name} | {c: getattr(m, c) for c in METRICS.names[2:]} for m in metrics]
    return pa.Table.from_pylist(rows, schema=METRICS.with_metadata({"settings": tier.model_dump_json()}))


def tier_of(checks: Sequence[str], sizes: dict[str, Any]) -> Tier:
    """The full audit's tier with other checks and sizes; raises ConfigError if they are not valid."""
    settings = AuditConfig().audit.model_dump() | {"strips": 0} | sizes
    if checks:
        settings["checks"] = tuple(checks)
    try:
        return Tier.model_validate(settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError("\n".join(problems)) from error
