"""The kill matrix: while a sweep runs on real raylets, processes and nodes are killed at random times in each of its phases.

    KILLS=100 pytest -m cluster tests/test_kills.py -s        # about half a minute per kill on two cores
    KILLS=20 KILL_PHASES=attack pytest -m cluster tests/test_kills.py -s     # only in the attacks

Killed is what was killed least in the phase so far, of what there is. Each sweep must end with every trial complete, none done
twice and no audit missing.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from raylets import Raylets, raylets, sweep
from small import SMALL, log
from test_cluster import check_whole

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(0)]
KILLS = int(os.environ.get("KILLS", "7"))
SEED = int(os.environ.get("KILL_SEED", "0"))
PHASES = {"prepare": " plan ", "search": "probe view", "audit": "on fresh seeds", "attack": " attack   "}
PROCESSES = {"slot": "ray::Slot", "auditor": "ray::Auditor", "broker": "ray::Broker", "manager": "ray::AuditManager"}
VICTIMS = (*PROCESSES, "trial function", "driver", "node")
BETWEEN_S = {"audit": (1.0, 6.0), "attack": (0.5, 4.0)}  # seconds between kills; the other phases take longer
OTHERWISE_S = (4.0, 12.0)
ONLY = os.environ.get("KILL_PHASES", "").split() or ["start", *PHASES]
MOST = {"start": 1, "prepare": 2}  # kills in a phase of one sweep, so that it gets to the next phase
OTHERWISE = 4
PATIENT = "audit.attempts=20"  # a process that dies by itself counts as an attempt


@dataclass
class Killer:
    """Kills at random. done: (victim, phase) -> kills in all sweeps."""

    made: Raylets
    folder: Path
    rng: random.Random
    process: psutil.Popen
    done: Counter
    here: Counter = field(default_factory=Counter)  # phase -> kills in this sweep

    def phase(self) -> str:
        said = log(self.folder).split("\x00")[-1]
        return next((name for name, text in reversed(PHASES.items()) if text in said), "start")

    def kill(self, victim: str) -> bool:
        """Kills one of a kind, if there is one; a driver is started again, and a node is replaced."""
        phase = self.phase()
        if victim == "driver":
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = sweep(self.folder, self.made, PATIENT)
        elif victim == "node":
            node = self.rng.choice(self.made.nodes)
            role = node._ray_params.labels["role"]
            self.made.kill(node)
            self.made.nodes.remove(node)
            self.made.nodes.append(self.made.add(role))
        else:
            processes = self.of_kind(victim)
            if not processes:
                return False
            self.rng.choice(processes).kill()
        self.done[victim, phase] += 1
        self.here[phase] += 1
        return True

    def kill_one(self) -> str:
        """Kills one of the kind that was killed least in this phase; returns the kind, "" if this phase has had enough."""
        phase = self.phase()
        if phase not in ONLY or self.here[phase] >= MOST.get(phase, OTHERWISE):
            return ""
        victims = sorted(VICTIMS, key=lambda victim: (self.done[victim, phase], self.rng.random()))
        return next(victim for victim in victims if self.kill(victim))

    def of_kind(self, victim: str) -> list[psutil.Process]:
        """The workers of the cluster's raylets with such a name."""
        prefix = PROCESSES.get(victim, "ray::ImplicitFunc")
        found = []
        for node in [self.made.cluster.head_node, *self.made.nodes]:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for p in raylet.children(recursive=True):
                with_name = "".join(p.cmdline()[:1]) if p.is_running() else ""
                if with_name.startswith(prefix):
                    found.append(p)
        return found


def table(done: Counter) -> str:
    """Markdown: kills by victim and phase."""
    phases = ["start", *PHASES]
    lines = ["| killed | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    lines += [f"| {victim} | " + " | ".join(str(done[victim, p]) for p in phases) + " |" for victim in VICTIMS]
    return "\n".join(lines)


def test_whatever_is_killed_nothing_is_lost(tmp_path):
    rng, done, k = random.Random(SEED), Counter(), 0
    while done.total() < KILLS:
        folder = tmp_path / f"sweep-{k}"
        folder.mkdir()
        (folder / "sweep.yaml").write_text(SMALL.replace("base_steps: 70", "base_steps: 120"))
        with raylets("train", "train", "audit") as made:
            killer = Killer(made, folder, rng, sweep(folder, made, PATIENT), done)
            while done.total() < KILLS and killer.process.poll() is None:
                waits = BETWEEN_S.get(killer.phase(), OTHERWISE_S) if killer.phase() in ONLY else (0.2, 0.2)
                time.sleep(rng.uniform(*waits))
                phase = killer.phase()
                if killer.process.poll() is None and (victim := killer.kill_one()):
                    print(f"{done.total()}: sweep {k}, {phase}: {victim} killed", flush=True)  # noqa: T201
            check_whole(folder, killer.process)
        k += 1
    print(f"{k} sweeps, {done.total()} kills\n{table(done)}")  # noqa: T201
