"""Audits by the run's auditors: of any models, and of the anchors that fix the scales of a tier."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from raysweep.auditing.anchors import Anchors, Indistinct, Unmeasured, View, assess_views, check_scale
from raysweep.auditing.power import remedies
from raysweep.auditing.request import AuditRequest, Outcome
from raysweep.config.schema import Tier
from raysweep.context import Context, load_measured
from raysweep.dispatch.desk import Closed
from raysweep.engine.cluster import RunFailed
from raysweep.engine.engine import Engine


@dataclass
class Audits:
    """Audits in flight. requests: subject -> its audit; pending: reference of the answer -> subject."""

    engine: Engine
    requests: dict[str, AuditRequest]
    pending: dict[ray.ObjectRef, str]

    @classmethod
    def start(cls, engine: Engine, requests: dict[str, AuditRequest]) -> Audits:
        """Hands the audits to the manager; `collect` waits for them."""
        return cls(
            engine, requests, {engine.actors.manager.submit.remote(r.key, r): name for name, r in requests.items()}
        )

    def collect(self) -> tuple[dict[str, str], list[str]]:
        """Waits; (subject -> key of its audit if that succeeded, in the order of the requests; what failed)."""
        keys, failed, events = {}, [], self.engine.events
        while self.pending:
            ready, _ = ray.wait(list(self.pending), num_returns=1)
            name = self.pending.pop(ready[0])
            answer = answer_to(ready[0])
            events.tick("audits", len(self.requests) - len(self.pending), len(self.requests))
            failed += [f"{name}: {check}" for check in answer["failed"]]
            if answer["status"] == "ok":
                keys[name] = self.requests[name].key
            else:
                failed.append(f"{name}: {answer['reason']}")
                events.say("failed", f"audit of {name}: {answer['reason']}")
        return {name: keys[name] for name in self.requests if name in keys}, failed


def answer_to(reference: ray.ObjectRef) -> Outcome:
    """The manager's answer; raises RunFailed if it can answer nobody any more."""
    try:
        answer: Outcome = ray.get(reference)
    except Closed as error:
        raise RunFailed(str(getattr(error, "cause", error))) from error
    return answer


def measure_anchors(
    engine: Engine, context: Context, tier_name: str, tier: Tier, views: list[View] | None = None
) -> list[str]:
    """Audits base, oracles and a destroyed model in a tier and saves its scales: keys, and which views tell base and oracle apart.

    views: those that an earlier round has fixed; None to assess them. Returns the checks that failed on the anchors. Raises
    RunFailed or Unmeasured if these cannot fix the scales.
    """
    requests, events = context.anchor_requests(tier_name, tier), engine.events
    references = [engine.actors.manager.submit.remote(r.key, r) for r in requests.values()]
    answers = {name: answer_to(reference) for name, reference in zip(requests, references, strict=True)}
    for name, answer in answers.items():
        if answer["status"] != "ok":
            raise RunFailed(f"{tier_name}: measuring {name} failed: {answer['reason']}")
    failed = [f"{tier_name} of {name}: {check}" for name, answer in answers.items() for check in answer["failed"]]
    for text in failed:
        events.say("failed", f"{text} failed")
    keys = {name: request.key for name, request in requests.items()}
    measured = {name: load_measured(engine.folder.path, key) for name, key in keys.items()}
    oracles = tuple(measured[name] for name in context.oracles)
    anchors = Anchors(measured["base"], oracles, measured["destroyed"])
    task = engine.task
    try:
        check_scale(anchors, task.quality, task.validity)
        if views is not None:
            context.save_anchors(tier_name, keys, views)
            return failed
        views = assess_views(anchors, task.views)
    except Indistinct as error:
        context.save_anchors(tier_name, keys, error.views)  # for the report
        advice = remedies(error.views, task, tier_name, tier)
        raise Unmeasured(f"{tier_name}: {error}. What to do: {advice}") from error
    except Unmeasured:
        context.save_anchors(tier_name, keys, [])
        raise
    context.save_anchors(tier_name, keys, views)
    for view in views:
        verdict = f"base {view.base:.3g}, oracle {view.oracle:.3g}" if view.informative else f"not used: {view.reason}"
        events.say("anchor", f"{tier_name} view {view.metric}: {verdict}")
    return failed
