"""Common ground of the method benchmarks: a task with its base, oracles, judges and anchors, made by the engine's code.

Everything expensive is in the cache that `raysweep run` uses, or is made once. Trials run in this process, without Ray.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluators.base import Subject
from methods.base import Diverged, Method
from raysweep.auditing.anchors import Anchors, View, assess_views
from raysweep.auditing.judges import judge_of
from raysweep.auditing.measure import Measurement, measure, subject_of
from raysweep.auditing.objectives import Objectives, objectives
from raysweep.auditing.terms import Measured
from raysweep.config.reader import load
from raysweep.config.schema import Sweep, Tier
from raysweep.engine.cached_jobs import prepares, retrain_jobs
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import resolve
from raysweep.storage.cache import load_tensors
from raysweep.storage.files import write_folder
from raysweep.storage.seeds import derive_seed
from raysweep.tasks.task import Task
from raysweep.train.loop import Resident
from raysweep.train.loop import run as run_job

SEEDS = ("audit.audit.seed=2", "audit.durability.seed=3")  # a repeated benchmark measures the same


@dataclass
class Candidate:
    """A model, the cost of making it, and its method's diagnostics."""

    model: PixelDDPM
    seconds: float
    diagnostics: dict[str, float]


class Ground:
    """One task and everything that measurements on it need.

    Args:
        overrides: changes to the default sweep, as on the command line, for example ("task=digits-class",).
    """

    def __init__(self, *overrides: str):
        torch.set_num_threads(1)
        sweep = load(None, (*SEEDS, *overrides))
        self.task: Task = sweep.task.build()
        schedule = len(PixelDDPM.build(self.task.model, 0).alphas)
        self.sweep: Sweep = sweep.with_drawn(sweep.audit.draw(schedule, self.task.sampling.get("steps")))
        self._prepared: dict[str, dict[str, torch.Tensor]] = {}
        self._models: dict[str, PixelDDPM] = {}

    @cached_property
    def folders(self) -> dict[str, str]:
        """Folders of base and oracles, trained if they are not in the cache."""
        folder = Path(tempfile.mkdtemp(prefix="raysweep-")) / "task"
        write_folder(folder, self.task.save)
        jobs = retrain_jobs(self.sweep, self.task, folder)
        for job in jobs.values():
            outcome = run_job(job, Resident())
            assert outcome.status == "ok", outcome.reason
        return {subject: job.out for subject, job in jobs.items()}

    def model(self, subject: str) -> PixelDDPM:
        """A fresh copy of "base", "oracle-K" or "destroyed"."""
        if subject == "destroyed":
            return PixelDDPM.build(self.task.model, derive_seed("destroyed"))
        return PixelDDPM.load(self.folders[subject])

    def judge(self, name: str) -> torch.nn.Module:
        """The judge of a tier, trained if it is not in the cache."""
        judge = judge_of(self.task, name, self.sweep.cache)
        assert judge is not None
        return judge

    def tier(self, name: str) -> Tier:
        """The sweep's tier "probe" or "audit", with no more checks than the benchmarks show."""
        tier = getattr(self.sweep.audit, name)
        objectives = tier.model_copy(update={"checks": None}).checks_for(self.task)
        checks = objectives if name == "probe" else (*objectives, "loss")
        return tier.model_copy(update={"checks": checks, "full_fidelity": False, "samples": min(400, tier.samples)})

    @cached_property
    def judges(self) -> dict[str, torch.nn.Module]:
        return {name: self.judge(name) for name in ("probe", "audit")}

    def measure(self, model: PixelDDPM, tier: str) -> Measurement:
        """All checks of a tier."""
        subject = self.subject(model, tier)
        subject.peers = self.peers(tier)
        return measure(subject, self.tier(tier))

    def subject(self, model: PixelDDPM, tier: str) -> Subject:
        """The model in the form that the checks of a tier take."""
        return subject_of(model, self.task, self.judges[self.tier(tier).judge], self.tier(tier))

    def peers(self, tier: str) -> dict[str, Subject]:
        """Base and oracles, which checks compare a model with."""
        if tier not in self.__dict__.setdefault("_peers", {}):
            peers = {name: self.subject(self.model(name), tier) for name in self.folders}
            for peer in peers.values():
                peer.peers = peers
            self._peers[tier] = peers
        return self._peers[tier]

    def anchors(self, tier: str) -> tuple[Anchors, list[View]]:
        """Base, oracles and a destroyed model as a tier measures them, and the views that tell them apart."""
        if tier not in self.__dict__.setdefault("_anchors", {}):
            measured = {s: as_measured(measure(peer, self.tier(tier))) for s, peer in self.peers(tier).items()}
            measured["destroyed"] = as_measured(self.measure(self.model("destroyed"), tier))
            oracles = tuple(m for s, m in measured.items() if s.startswith("oracle"))
            anchors = Anchors(measured["base"], oracles, measured["destroyed"])
            self._anchors[tier] = anchors, assess_views(anchors, self.task.views)
        return self._anchors[tier]

    def objectives(self, measured: Measurement, tier: str) -> Objectives:
        """Residue and damage."""
        return objectives(as_measured(measured), *self.anchors(tier), self.task.quality, self.task.validity)

    def prepared(self, method: type[Method], settings: Any) -> dict[str, torch.Tensor]:
        """The method's prepared tensors, made once per setting that they depend on."""
        if not prepares(method):
            return {}
        key = repr((method.name, [getattr(settings, n) for n in method.prepared_by]))
        if key not in self._prepared:
            seed = derive_seed("prepare", derive_seed("prepare", method.name))
            self._prepared[key] = method.prepare(self.model("base"), self.task, seed, settings)
        return self._prepared[key]

    def make(self, name: str, hyperparameters: dict[str, Any], seed: int) -> Candidate | str:
        """A candidate by method `name`, or the reason why there is none."""
        method_class: type[Method] = resolve("method", name)
        settings = method_class.Hyperparameters(**hyperparameters)
        prepared = self.prepared(method_class, settings)
        started = time.perf_counter()
        try:
            method = method_class(self.model("base"), settings, prepared, self.task.goal)
            for step in range(method.steps):
                method.step(self.task.batch(method.draws(), derive_seed("trial", seed), step))
            diagnostics = method.finish()
        except Diverged as error:
            return str(error)
        model = method.model
        assert isinstance(model, PixelDDPM)
        return Candidate(model, time.perf_counter() - started, diagnostics)


def as_measured(measurement: Measurement) -> Measured:
    """Values and replicates as objectives take them."""
    import numpy as np

    return Measured(measurement.values, {k: np.asarray(v) for k, v in measurement.replicates.items()})


def machine() -> dict[str, str]:
    """Machine and versions of a benchmark run, for its output."""
    import platform

    from raysweep.rundir import versions

    libraries = {k: v for k, v in versions().items() if k in ("python", "torch", "diffusers", "commit")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}", "gpu": gpu} | libraries


def save_lines(path: Path, lines: list[str]) -> None:
    """Writes a text file in one piece."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


__all__ = ["Candidate", "Ground", "as_measured", "load_tensors", "machine", "save_lines"]
