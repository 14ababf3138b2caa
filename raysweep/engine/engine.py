"""The engine: a running sweep with everything that its phases share, opened in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import ray

from raysweep.config.schema import Sweep
from raysweep.dispatch.leases import Span
from raysweep.engine.arrival import await_nodes, expected_nodes, requested
from raysweep.engine.cluster import connected, has_trial_slots
from raysweep.engine.events import Events
from raysweep.engine.pool import Pool, pool
from raysweep.engine.resources import Plan, make_plan
from raysweep.engine.shared import check_shared
from raysweep.engine.trial import make_executor
from raysweep.rundir import RunDir
from raysweep.search.spaces import Space
from raysweep.storage.cache import cache_folder
from raysweep.tasks.task import Task
from raysweep.train.executors import Executor


@dataclass(frozen=True)
class Engine:
    """A running sweep on a cluster.

    sweep, task, spaces: what is to be done; spaces are empty where nothing is searched.
    folder, run_id: the run's directory, which this process has claimed, and the name of its study, actors and jobs.
    plan: what of the cluster trains and what audits. actors: audit manager, auditors and job broker. executor: runs train jobs.
    dashboard: HOST:PORT of Ray's dashboard; "" without one. phases: of the run that have ended.
    """

    sweep: Sweep
    task: Task
    spaces: tuple[Space, ...]
    folder: RunDir
    run_id: str
    events: Events
    plan: Plan
    actors: Pool
    executor: Executor
    dashboard: str
    phases: list[Span] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, folder: RunDir, sweep: Sweep, task: Task, events: Events, spaces: tuple[Space, ...] = ()
    ) -> Iterator[Engine]:
        """Connects to a cluster or starts one, and starts the run's actors; they end with the block.

        Raises:
            ConfigError: no cluster answers, the sweep does not fit it, or its nodes do not share the run directory and the cache.
            RunFailed: no local Ray starts, or none of the nodes that are expected joins in time.
        """
        run_id = folder.run_id
        with connected(sweep) as cluster:
            expected = expected_nodes(sweep)
            plan = make_plan(expected or cluster.nodes, sweep, has_trial_slots())
            events.say("plan", plan.describe())
            if cluster.dashboard:
                events.say("url", f"Ray dashboard  http://{cluster.dashboard}")
            with requested(expected):
                nodes = cluster.nodes
                if expected:
                    nodes = await_nodes(plan, expected, sweep, events)
                    plan = replace(plan, trial_slots=has_trial_slots())
                check_shared(ray.nodes(), [folder.path, cache_folder(sweep.cache)])
                with pool(folder.path, run_id, sweep, plan, nodes, events) as actors:
                    executor = make_executor(str(folder.path), run_id, sweep, plan)
                    yield cls(sweep, task, spaces, folder, run_id, events, plan, actors, executor, cluster.dashboard)

    @contextlib.contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that wait for jobs and audits. An interrupt does not wait for them: they end with the actors."""
        with self.actors.waiting(self.executor) as threads:
            yield threads
