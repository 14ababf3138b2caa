"""A sweep on 1,000 GPUs in simulated time: utilisation, time to finish, and what saturates first.

    python benchmarks/simulation.py [--trials 10000] [--nodes 125] [--losses 0.05] ...    # prints one JSON object

A discrete-event simulation around the real parts that decide what happens next: `ParetoSearch` with its journal (which trial, and
when it may start), and the `Leases` of the jobs' and of the audits' desk (which worker has what, and what is given out again after a
loss). Simulated are clock, lengths, nodes and the processes of the head that serve one request at a time: Tune's loop with the searcher
in it, and both desks. Their costs per request are parameters: of Tune and the searcher as `benchmarks/tune.py` and `benchmarks/search.py`
measure them on two slow cores, of a desk as 200 tasks per second allow.

A quarter of the nodes audits. Nodes are lost at a constant rate (exponential lifetimes). Until Ray declares the loss nobody knows of it; then
the node's tasks go to other workers, jobs continue from their last checkpoint, and audits start again. A replacement joins later, and
its workers need time to start.

    python benchmarks/simulation.py --check      # the same sweeps simulated and run

Checked is what two cores can run: 4 slots and 4 auditors that sleep, with the real searcher, Tune, desks and trial functions. In one
case the lengths of trials decide; in the other one trials are shorter than Tune needs for them.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from ground import machine

from raysweep.config.sections import SearchConfig
from raysweep.dispatch.leases import Leases
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.window import resolve_window

METHODS = ("rgd", "siss")
OPTIONS = {  # name -> (default, what it is)
    "trials": (10_000, "number of trials"),
    "nodes": (125, "nodes"),
    "gpus": (8, "GPUs of a node"),
    "train-s": (600.0, "mean seconds of training of a trial"),
    "probe-s": (90.0, "mean seconds of a probe"),
    "cv": (0.8, "coefficient of variation of both, which are lognormal"),
    "losses": (0.05, "losses per node and hour"),
    "declared-s": (30.0, "seconds until Ray declares a loss"),
    "replaced-s": (300.0, "seconds until a lost node is replaced"),
    "start-s": (60.0, "seconds until the workers of a node that joins are ready"),
    "checkpoint-s": (60.0, "seconds between checkpoints of a job"),
    "tune-ms": (120.0, "Tune's loop, per trial"),
    "search-ms": (45.0, "suggestion and completion, per trial, in Tune's loop"),
    "desk-ms": (5.0, "a desk, per task"),
    "beat-ms": (0.5, "a desk, per heartbeat"),
}


@dataclass
class Server:
    """A process of the head that serves one request at a time."""

    free_at: float = 0.0
    busy: float = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """The time at which a request that arrives now has been served."""
        self.free_at = max(now, self.free_at) + seconds
        self.busy += seconds
        return self.free_at


@dataclass
class Pool:
    """The workers of one kind with the leases of their tasks. left: seconds of work that tasks still need; busy: of all workers."""

    server: Server
    leases: Leases = field(default_factory=lambda: Leases(attempts=3, lease_s=40.0))
    idle: list[str] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)
    left: dict[str, float] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)  # token of a lease -> start
    busy: float = 0.0
    lost: float = 0.0
    available: float = 0.0  # worker-seconds of workers that were ready


class Simulation:
    """One simulated sweep."""

    def __init__(self, options: dict[str, float], folder: Path, seed: int):
        self.o, self.draws, self.values = options, np.random.default_rng(seed), np.random.default_rng(seed + 1)
        self.now, self.events, self.order = 0.0, [], count()
        self.tune = Server()
        nodes, trials = int(options["nodes"]), int(options["trials"])
        auditing = max(1, nodes // 4)
        self.pools = {"train": Pool(Server()), "audit": Pool(Server())}
        self.gpus = int(options["gpus"])
        self.slots, self.auditors = (nodes - auditing) * self.gpus, auditing * self.gpus
        self.concurrent = self.slots + self.auditors + 1
        self.window = resolve_window(SearchConfig(trials=trials), self.concurrent)
        self.search = ParetoSearch(
            folder / "study.journal", "simulation", [spaces.load(m) for m in METHODS], trials, self.window, 0, "random"
        )
        self.in_flight, self.starting, self.ended, self.losses = 0, False, 0, 0
        self.endings: list[float] = []
        for node in range(nodes):
            self.join(f"node-{node}", "train" if node >= auditing else "audit")

    def at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), act, arguments))

    def length(self, mean: float) -> float:
        sigma = np.log(1 + self.o["cv"] ** 2) ** 0.5
        return float(self.draws.lognormal(np.log(mean) - sigma**2 / 2, sigma))

    def lengths(self) -> tuple[float, float]:
        """Seconds of training and of the probe of the next trial."""
        return self.length(self.o["train-s"]), self.length(self.o["probe-s"])

    # nodes
    def join(self, node: str, kind: str) -> None:
        self.at(self.now + self.o["start-s"], self.ready, node, kind)

    def ready(self, node: str, kind: str) -> None:
        pool, workers = self.pools[kind], [f"{node}/{k}" for k in range(self.gpus)]
        pool.alive |= set(workers)
        pool.idle += workers
        pool.available -= self.now * self.gpus
        if self.o["losses"]:
            self.at(self.now + self.draws.exponential(3600 / self.o["losses"]), self.vanish, node, kind)
        self.work(kind)

    def vanish(self, node: str, kind: str) -> None:
        """Takes a node away; nobody knows of it yet."""
        pool, workers = self.pools[kind], {f"{node}/{k}" for k in range(self.gpus)}
        self.losses += 1
        pool.alive -= workers
        pool.available += self.now * self.gpus
        pool.idle = [w for w in pool.idle if w not in workers]
        self.at(self.now + self.o["declared-s"], self.declare, workers, self.now, kind)
        self.at(self.now + self.o["replaced-s"], self.join, f"{node}'", kind)

    def declare(self, workers: set[str], when: float, kind: str) -> None:
        """Gives the tasks of a lost node's workers to others."""
        pool = self.pools[kind]
        for worker in workers & set(pool.leases.works):
            key = pool.leases.works[worker]
            done = max(0.0, when - pool.since.pop(pool.leases.held[key].token))
            kept = done // self.o["checkpoint-s"] * self.o["checkpoint-s"] if kind == "train" else 0.0
            pool.left[key] -= kept
            pool.busy += done
            pool.lost += done - kept
            pool.leases.put_back(key, counts=False)
        self.work(kind)

    # trials
    def fill(self) -> None:
        """Lets Tune start as many trials as may be in flight, one after the other."""
        if self.starting or self.in_flight >= self.concurrent:
            return
        config = self.search.suggest(name := str(next(self.order)))
        if not isinstance(config, dict):
            return
        self.in_flight += 1
        self.starting = True
        self.pools["train"].left[name], self.pools["audit"].left[name] = self.lengths()
        self.at(self.tune.serve(self.now, self.per_trial() / 2), self.started, name)

    def per_trial(self) -> float:
        return (self.o["tune-ms"] + self.o["search-ms"]) / 1000

    def started(self, name: str) -> None:
        self.starting = False
        self.submit("train", name)
        self.fill()

    def submit(self, kind: str, name: str) -> None:
        self.at(self.pools[kind].server.serve(self.now, self.o["desk-ms"] / 2000), self.queue, kind, name)

    def queue(self, kind: str, name: str) -> None:
        self.pools[kind].leases.add(name)
        self.work(kind)

    def work(self, kind: str) -> None:
        """Lets idle workers take tasks."""
        pool = self.pools[kind]
        while pool.idle and (lease := pool.leases.take(pool.idle[-1], self.now)) is not None:
            worker = pool.idle.pop()
            begin = pool.server.serve(self.now, self.o["desk-ms"] / 4000)
            pool.since[lease.token] = begin
            self.at(begin + pool.left[lease.key], self.finish, kind, worker, lease.key, lease.token)

    def finish(self, kind: str, worker: str, name: str, token: str) -> None:
        pool = self.pools[kind]
        if worker not in pool.alive or not pool.leases.renew(worker, name, token, self.now):
            return  # lost with its node
        pool.busy += self.now - pool.since.pop(token)
        pool.leases.end(name)
        pool.idle.append(worker)
        self.at(pool.server.serve(self.now, self.o["desk-ms"] / 4000), self.handed_in, kind, name)
        self.work(kind)

    def handed_in(self, kind: str, name: str) -> None:
        if kind == "train":
            self.submit("audit", name)
        else:
            self.at(self.tune.serve(self.now, self.per_trial() / 2), self.completed, name)

    def completed(self, name: str) -> None:
        residue, damage = self.values.random(2)
        self.search.on_trial_complete(name, {"residue": residue, "damage": damage, FINAL: True})
        self.in_flight -= 1
        self.ended += 1
        self.endings.append(self.now)
        self.fill()

    def run(self) -> dict[str, Any]:
        """Runs the sweep to its end; returns what is printed."""
        trials = int(self.o["trials"])
        self.fill()
        while self.ended < trials:
            self.now, _, act, arguments = heapq.heappop(self.events)
            act(*arguments)
        train, audit = self.pools["train"], self.pools["audit"]
        rate = min(
            100.0, (self.slots + self.auditors) / 2
        )  # heartbeats per second of all workers; more workers beat less often
        beating = rate * self.o["beat-ms"] / 1000
        for pool in (train, audit):
            pool.available += self.now * len(pool.alive)
        trials_share = {
            "Tune's loop with the searcher": self.tune.busy / self.now,
            "desk of jobs": train.server.busy / self.now,
            "desk of audits": audit.server.busy / self.now,
        }
        beats_share = {"Tune's loop with the searcher": 0.0}  # each desk: as if all workers were its own
        shortest = {n: share / (1 - beats_share.get(n, beating)) for n, share in trials_share.items()}
        first = max(shortest, key=shortest.__getitem__)
        return {
            "slots": self.slots,
            "auditors": self.auditors,
            "window": self.window,
            "hours": round(self.now / 3600, 2),
            "hours_without_losses_or_waiting": round(trials * self.o["train-s"] / self.slots / 3600, 2),
            "slots_busy": round(train.busy / (self.now * self.slots), 3),
            "slots_busy_of_those_that_were_there": round(train.busy / train.available, 3),
            "lost_nodes": self.losses,
            "lost_training_share": round(train.lost / train.busy, 4),
            "auditors_busy_of_those_that_were_there": round(audit.busy / audit.available, 3),
            "busy_on_the_head": {n: round(s + beats_share.get(n, beating), 4) for n, s in trials_share.items()},
            "saturates_first": f"{first}, if trials were {shortest[first]:.3f} times as long",
        }


def main() -> None:
    """Runs the simulation for three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, what) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=what)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare with real runs")
    options = {name.replace("_", "-"): value for name, value in vars(parser.parse_args()).items()}
    seeds, results, started = options.pop("seeds"), [], time.perf_counter()
    if options.pop("check"):
        from simulation_check import checked

        print(json.dumps(checked(options, seeds) | {"machine": machine()}, indent=1))
        return
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            results.append(Simulation(options, Path(folder), seed).run())
    output = {"options": options, "results": results, "seconds": round(time.perf_counter() - started)}
    print(json.dumps(output | {"machine": machine()}, indent=1))


if __name__ == "__main__":
    main()
