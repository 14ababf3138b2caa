"""The actors of a run: the job broker, the audit manager, and the workers that the steward looks after."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.auditing.auditor import Auditor
from raysweep.auditing.manager import AuditManager
from raysweep.config.schema import Sweep
from raysweep.engine.admission import Admission
from raysweep.engine.cluster import uninterrupted
from raysweep.engine.events import Events
from raysweep.engine.resources import Node, Plan
from raysweep.engine.steward import Crew, Steward
from raysweep.engine.trial import scaling
from raysweep.storage.cache import cache_folder
from raysweep.train.broker import Broker, actor_name
from raysweep.train.executors import Executor
from raysweep.train.slot import Slot, slot_options

CLOSE_S = 5.0
LEAVE_S = 20.0


@dataclass
class Pool:
    """A run's actors. ending: threads that still shut down."""

    manager: ActorHandle
    broker: ActorHandle
    steward: Steward
    ending: list[threading.Thread] = field(default_factory=list)

    @contextlib.contextmanager
    def waiting(self, executor: Executor) -> Iterator[ThreadPoolExecutor]:
        """Threads that wait for jobs and actors. An interrupt does not wait for them: they end with the pool."""
        threads = ThreadPoolExecutor(max_workers=16)
        try:
            yield threads
        except BaseException:
            executor.stop()
            ending = threading.Thread(target=threads.shutdown, kwargs={"cancel_futures": True}, daemon=True)
            ending.start()
            self.ending.append(ending)
            raise
        threads.shutdown()

    def audit_only(self) -> None:
        """Ends training and gives its resources to more auditors: after the search nothing else would use them."""
        self.steward.end_search()

    def close(self) -> None:
        """Ends everything."""
        self.steward.stop_watching()
        # before they are killed: Ray prints of calls that still wait that they will be tried again
        for desk in (self.broker, self.manager):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(desk.close.remote(), timeout=CLOSE_S)
        self.steward.dismiss_all()
        for actor in (self.manager, self.broker):
            ray.kill(actor)
        for thread in self.ending:  # one that is inside Ray while Ray shuts down would abort the process
            thread.join(LEAVE_S)


@contextlib.contextmanager
def pool(run: Path, run_id: str, sweep: Sweep, plan: Plan, nodes: list[Node], events: Events) -> Iterator[Pool]:
    """Starts the actors of the run in the folder `run`; they end with the block. The two desks stay on this process's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    manager = AuditManager.options(name=actor_name("audits", run, run_id), scheduling_strategy=here).remote(  # type: ignore[attr-defined]
        str(run), sweep.audit.attempts
    )
    broker = Broker.options(name=actor_name("broker", run, run_id), scheduling_strategy=here).remote(run.name)  # type: ignore[attr-defined]

    def slot(name: str, role: str) -> tuple[ActorHandle, ray.ObjectRef]:
        group = scaling(replace(plan, train_role=role))
        actor = Slot.options(**slot_options(group, plan.light)).remote()  # type: ignore[attr-defined]
        return actor, actor.serve.remote(broker, name, group, str(run / "tune" / "train"))

    def auditor(name: str, role: str) -> tuple[ActorHandle, ray.ObjectRef]:
        options: dict[str, Any] = {"num_cpus": plan.auditor_cpus, "num_gpus": plan.auditor_gpus}
        if role:
            options["label_selector"] = {"role": role}
        actor = Auditor.options(**options).remote()  # type: ignore[attr-defined]
        return actor, actor.serve.remote(manager, name, sweep.audit.timeout_s)

    slots = Crew("slot", broker, slot) if sweep.train.executor == "warm" else None
    auditors = Crew("auditor", manager, auditor)
    admission = Admission([run, cache_folder(sweep.cache)], [node.id for node in nodes], events)
    actors = Pool(manager, broker, Steward(sweep, plan, nodes, slots, auditors, admission, events))
    try:
        actors.steward.start()
        yield actors
    finally:
        with uninterrupted():
            actors.close()
