"""The steward: keeps a run's slots and auditors in step with the nodes that there are and with what there is to do.

It looks every two seconds. Nodes that join receive workers. What workers did on nodes that are lost goes to others at once. On
nodes that are being drained, workers stop at a checkpoint. Where slots and auditors have the same size, those that have had nothing
to do for a while are replaced by the other kind if that has too much to do; after the search slots are replaced by auditors.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from raysweep.config.schema import Sweep
from raysweep.engine.admission import Admission
from raysweep.engine.cluster import alive_nodes
from raysweep.engine.events import Events
from raysweep.engine.resources import Node, Plan, refit

LOOK_S = 2.0
ANSWER_S = 30.0  # for a desk to answer
FUTILE = 3  # workers in a row that end before they ask for work, before it is said
REST_S = 60.0  # at most, before the next one is tried
SHIFT_S = 30.0  # without work, before a worker is replaced by one of the other kind
Hire = Callable[[str, str], tuple[ActorHandle, ray.ObjectRef]]  # (name, role of its node) -> (actor, its service's end)


@dataclass
class Member:
    """A worker. role: of its node, as in `Plan`. service: ends when the worker does."""

    actor: ActorHandle
    role: str
    service: ray.ObjectRef


@dataclass
class Crew:
    """The workers of one kind, called `name` and a number, which ask `desk` for work."""

    name: str
    desk: ActorHandle
    hire: Hire
    members: dict[str, Member] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    hired: int = 0
    futile: int = 0  # workers in a row that ended before they asked for work
    trouble: str = ""  # why they did
    rests_until: float = -math.inf

    def adjust(self, wanted: Mapping[str, int], census: Mapping[str, Any]) -> None:
        """Hires and dismisses until there are as many as wanted for each role. Dismissed first: who has no place, then no work."""
        staying = [name for name in self.members if name not in self.leaving]
        roles = {name: self.members[name].role for name in staying}
        have = Counter(roles.values())
        at_work = {worker: bool(key) for worker, (_, key) in census["workers"].items()}
        for role in sorted({*have, *wanted}):
            surplus = have[role] - wanted.get(role, 0)
            of_role = [name for name in staying if roles[name] == role]
            of_role.sort(key=lambda name: (name in at_work, at_work.get(name, False)))
            self.dismiss(of_role[: max(0, surplus)], at_work)
            for _ in range(-surplus if time.monotonic() >= self.rests_until else 0):
                name = f"{self.name}-{self.hired}"
                self.hired += 1
                actor, service = self.hire(name, role)
                self.members[name] = Member(actor, role, service)

    def dismiss(self, names: list[str], present: Mapping[str, Any]) -> None:
        """Ends workers: those that the desk knows when they can, the others at once."""
        known = [name for name in names if name in present]
        self.leaving |= set(known)
        if known:
            self.desk.leave.remote(known)
        for name in names:
            if name not in present:
                self.remove(name)

    def reap(self, census: Mapping[str, Any], alive: Collection[str]) -> None:
        """Removes workers that have ended, and those whose heartbeat stopped. alive: ids of the nodes that are.

        Ray does not start them again, because it would print each time that it does. After workers that ended before they asked for
        work, the next are hired later and later.
        """
        if any(name in census["workers"] for name in self.members):
            self.futile, self.trouble = 0, ""
        services = {member.service: name for name, member in self.members.items()}
        if services:
            ended, _ = ray.wait(list(services), num_returns=len(services), timeout=0)
            for service in ended:
                name, reason = services[service], _reason(service)
                node, _ = census["workers"].get(name, ("", ""))
                self.remove(name, died=node in alive and bool(reason))
                if reason and not node:
                    self.futile += 1
                    self.trouble = reason
                    self.rests_until = time.monotonic() + min(REST_S, LOOK_S * 2.0**self.futile)
        for name in census["silent"]:
            if name in self.members:
                self.remove(name)

    def remove(self, name: str, died: bool = False) -> None:
        """Kills a worker; its task goes to another one. died: by itself, so that it counts as an attempt at the task."""
        ray.kill(self.members.pop(name).actor)
        self.leaving.discard(name)
        self.desk.forget.remote([name], died=died)

    def on(self, nodes: set[str], census: Mapping[str, Any]) -> list[str]:
        """The workers on nodes, without those that leave."""
        return [
            w for w, (node, _) in census["workers"].items() if node in nodes and w in self.members.keys() - self.leaving
        ]


class Steward:
    """Manages the slots and the auditors of a run in a thread of the driver.

    plan: for all nodes that are expected; it is cut down to what the present ones hold. slots: None where trials have groups of their
    own. admission: says which nodes may work; all of `nodes` may.
    """

    def __init__(
        self,
        sweep: Sweep,
        plan: Plan,
        nodes: list[Node],
        slots: Crew | None,
        auditors: Crew,
        admission: Admission,
        events: Events,
    ):
        self.sweep, self.full, self.plan, self.events = sweep, plan, refit(plan, nodes, sweep) or plan, events
        self.slots, self.auditors, self.admission = slots, auditors, admission
        self.nodes = {node.id: node for node in nodes}
        self.searching = True
        self.shift = Shift()
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._troubles: set[str] = set()
        self._barred: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._watch, name="steward", daemon=True)

    def start(self) -> None:
        """Hires the workers and begins to watch. Auditors first: they must not wait for what slots have taken."""
        nobody: dict[str, Any] = {"workers": {}, "silent": [], "queued": 0}
        self._adjust(nobody, nobody)
        self._thread.start()

    def end_search(self) -> None:
        """Has the slots replaced by auditors."""
        self.searching = False

    def stop_watching(self) -> None:
        """Ends the watch, so that nobody is hired in the place of workers that end."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_S)
        self.admission.close()

    def dismiss_all(self) -> None:
        """Kills every worker."""
        for crew in (self.slots, self.auditors):
            for member in crew.members.values() if crew is not None else ():
                ray.kill(member.actor)

    def look(self) -> None:
        """Looks once at nodes, desks and workers, and does what is due."""
        with self._lock:
            if self._ending.is_set():
                return
            desks = [crew.desk for crew in (self.slots, self.auditors) if crew is not None]
            self._follow(self.admission.of({node.id: node for node in alive_nodes()}))
            self._bar()
            answers = ray.get([desk.census.remote() for desk in desks], timeout=ANSWER_S)
            jobs = answers[0] if self.slots is not None else {"workers": {}, "silent": [], "queued": 0}
            audits = answers[-1]
            self._say_troubles(audits["trouble"])
            self._leave_drained(jobs, audits)
            self._adjust(jobs, audits)

    def _follow(self, nodes: dict[str, Node]) -> None:
        """Makes the plan for the nodes that there are, if they have changed."""
        if nodes.keys() == self.nodes.keys():
            return
        joined = [node for key, node in nodes.items() if key not in self.nodes]
        lost = [node for key, node in self.nodes.items() if key not in nodes]
        self.nodes = nodes
        dead = {n["NodeID"] for n in ray.nodes() if not n["Alive"]}
        gone = [node.id for node in lost if node.id in dead]
        for crew in (self.slots, self.auditors):
            if crew is not None and gone:
                ray.get(crew.desk.forget.remote([], gone), timeout=ANSWER_S)
        plan = refit(self.full, list(nodes.values()), self.sweep)
        changes = [f"{_listed(joined)} joined"] * bool(joined) + [f"{_listed(lost)} left"] * bool(lost)
        if plan is None:
            self.events.say("cluster", f"{', '.join(changes)}: no room for a slot and an auditor; waiting for nodes")
            return
        self.plan = plan
        self.events.say("cluster", f"{', '.join(changes)}: {plan.slots} trials at once, {plan.auditors} auditors")

    def _leave_drained(self, jobs: Mapping[str, Any], audits: Mapping[str, Any]) -> None:
        drained = {n["NodeID"] for n in ray.nodes() if n["Alive"]} - self.nodes.keys() - self.admission.checking
        for crew, census in ((self.slots, jobs), (self.auditors, audits)):
            if crew is not None and drained:
                crew.dismiss(crew.on(drained, census), census["workers"])

    def _adjust(self, jobs: Mapping[str, Any], audits: Mapping[str, Any]) -> None:
        plan = self.plan
        slots, auditors = Counter[str](), Counter({plan.audit_role: plan.auditors})
        if not self.searching:
            auditors[plan.train_role] += plan.late_auditors
        else:
            slots[plan.train_role] = plan.slots
            if self.slots is not None and plan.interchangeable:
                self.shift.look(jobs, audits, plan, time.monotonic())
                slots[plan.audit_role] += self.shift.to_slots
                auditors[plan.audit_role] -= self.shift.to_slots
                auditors[plan.train_role] += self.shift.to_auditors
                slots[plan.train_role] -= self.shift.to_auditors
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}  # by now, as a census may take a while
        for crew, wanted, census in ((self.auditors, auditors, audits), (self.slots, slots, jobs)):
            if crew is not None:
                crew.reap(census, alive)
                crew.adjust(wanted, census)

    def _bar(self) -> None:
        """Tells the desks on which nodes nothing may be done: Ray may have put there workers that waited for a place."""
        barred = self.admission.barred
        if barred or barred != self._barred:
            for crew in (self.slots, self.auditors):
                if crew is not None:
                    crew.desk.bar.remote(sorted(barred))
        self._barred = barred

    def _say_troubles(self, full: str) -> None:
        """full: why the audit manager cannot write, or ""."""
        troubles = {f"{full}; audits wait until there is room"} if full else set()
        for crew in (self.slots, self.auditors):
            if crew is not None and crew.futile >= FUTILE:
                troubles.add(f"each {crew.name} ends before it asks for work, and is started again: {crew.trouble}")
        for trouble in troubles - self._troubles:
            self.events.say("warning", trouble)
        self._troubles = troubles

    def _watch(self) -> None:
        # Ray raises SystemExit in waiting threads when it shuts down
        with contextlib.suppress(SystemExit):
            while not self._ending.wait(LOOK_S):
                try:
                    self.look()
                except ray.exceptions.RayError:  # a desk that is being started again
                    continue
                except Exception as error:
                    self.events.say("warning", f"the cluster could not be looked at: {type(error).__name__}: {error}")


@dataclass
class Shift:
    """How many workers of one kind are replaced by the other kind, as demand has it. At most one of the two is above 0."""

    to_slots: int = 0
    to_auditors: int = 0
    since: float | None = None  # when demand became one-sided
    towards: int = 0  # 1: slots are short, -1: auditors are

    def look(self, jobs: Mapping[str, Any], audits: Mapping[str, Any], plan: Plan, now: float) -> None:
        """Shifts half of the idle workers once demand has been one-sided for `SHIFT_S`."""
        idle_slots, idle_auditors = (sum(not key for _, key in c["workers"].values()) for c in (jobs, audits))
        towards = 0
        if jobs["queued"] and idle_auditors and not audits["queued"]:
            towards = 1
        elif audits["queued"] and idle_slots and not jobs["queued"]:
            towards = -1
        if towards != self.towards:
            self.towards, self.since = towards, now
        if not towards or self.since is None or now - self.since < SHIFT_S:
            return
        self.since = now
        balance = (
            self.to_slots - self.to_auditors + towards * max(1, (idle_auditors if towards > 0 else idle_slots) // 2)
        )
        balance = max(1 - plan.slots, min(plan.auditors - 1, balance))
        self.to_slots, self.to_auditors = max(0, balance), max(0, -balance)


def _reason(service: ray.ObjectRef) -> str:
    """Why a worker died by itself, perhaps by what it did; "" if it was let go, or ended with its node or with Ray."""
    try:
        ray.get(service)
    except (
        ray.exceptions.RayTaskError
    ) as error:  # an error of its own loop; before the others, of which it may also be one
        return "" if isinstance(error.cause, ray.exceptions.RayError) else _first_line(error.cause)
    except (ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError) as error:
        return _first_line(error)
    except ray.exceptions.RayError:  # unavailable, as on a node that has just been lost
        return ""
    return ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _listed(nodes: list[Node]) -> str:
    """Nodes for people: their addresses and roles, or their number if they are many."""
    if len(nodes) > 3:
        return f"{len(nodes)} nodes"
    return ", ".join(f"node {n.address}" + f" ({n.role})" * bool(n.role) for n in nodes)
