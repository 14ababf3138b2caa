"""The function that Ray Tune runs for each trial: trains a candidate, has it probed, reports both objectives once."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import ScalingConfig

from raysweep.auditing.anchors import Unmeasured
from raysweep.auditing.objectives import objectives
from raysweep.auditing.request import AuditRequest, Outcome
from raysweep.config.schema import Sweep
from raysweep.context import Context, load_measured
from raysweep.dispatch.desk import ENDED, Closed
from raysweep.engine.resources import Plan
from raysweep.rundir import RunDir
from raysweep.search.outcome import FINAL, OBJECTIVES
from raysweep.settings import DISK
from raysweep.train.broker import NAMESPACE, actor_name
from raysweep.train.executors import Executor, Isolated, Warm


def trial(config: dict[str, Any]) -> None:
    """Runs one trial. A method's failure is reported as a result with a reason, never raised."""
    run = config["run"]
    context, sweep = _load(run)
    executor = make_executor(run, context.run_id, sweep, Plan(**config["plan"]))
    outcome = executor.run(context.job(sweep, config))
    if outcome.status != "ok":
        _report(reason=outcome.reason, limit=outcome.limit, train_s=outcome.seconds)
        return
    folder = str(context.folder.candidates / config["trial"])
    request = context.request("probe", sweep.audit.probe, config["trial"], config["method"], folder, outcome.digest)
    costs: dict[str, Any] = {"train_s": outcome.seconds, "step_s": outcome.step_seconds}
    try:
        answer = ask_audit(context.run_id, request)
    except Closed as error:
        why = str(getattr(error, "cause", error))
        if why == ENDED:
            raise
        _report(reason=f"probe: {why}", limit=DISK, **costs)  # the manager had no room for its log
        return
    costs["audit_s"] = answer["seconds"]
    if answer["status"] != "ok":
        _report(reason=f"probe: {answer['reason']}", limit=answer["limit"], **costs)
        return
    try:
        anchors, views = context.load_anchors("probe")
        measured = load_measured(Path(run), request.key)
        result = objectives(measured, anchors, views, context.quality, context.validity)
    except Unmeasured as error:
        _report(reason=f"probe: {error}", probe=request.key, **costs)
        return
    validity = sum(o.values[context.validity] for o in anchors.oracles) / len(anchors.oracles)
    constraint = sweep.search.min_validity * validity - result.validity
    provenance = {"digest": outcome.digest, "probe": request.key}
    tune.report(result.plain() | costs | provenance | {"constraint": constraint, "reason": "", FINAL: True})


def make_executor(run: str, run_id: str, sweep: Sweep, plan: Plan) -> Executor:
    """The sweep's executor of train jobs."""
    if sweep.train.executor == "warm":
        return Warm(ray.get_actor(actor_name("broker", run, run_id), namespace=NAMESPACE))
    return Isolated(scaling(plan), str(Path(run) / "tune" / "train"), plan.light)


def scaling(plan: Plan) -> ScalingConfig:
    """The resources of a worker group."""
    resources = {"CPU": plan.worker_cpus} | ({"GPU": plan.worker_gpus} if plan.worker_gpus else {})
    return ScalingConfig(
        num_workers=plan.workers,
        use_gpu=plan.worker_gpus > 0,
        resources_per_worker=resources,
        placement_strategy="PACK",
        label_selector={"role": plan.train_role} if plan.train_role else None,
    )


def ask_audit(run_id: str, request: AuditRequest) -> Outcome:
    """Has a model audited; the manager's answer."""
    manager = ray.get_actor(actor_name("audits", request.run, run_id), namespace=NAMESPACE)
    outcome: Outcome = ray.get(manager.submit.remote(request.key, request))
    return outcome


@cache
def _load(run: str) -> tuple[Context, Sweep]:
    return Context.load(run), RunDir(Path(run)).sweep()


def _report(reason: str, limit: str = "", **values: Any) -> None:
    """Reports a failure; limit: the setting that ended the trial, if one did."""
    tune.report(dict.fromkeys(OBJECTIVES, math.nan) | values | {"reason": reason, "limit": limit, FINAL: True})
