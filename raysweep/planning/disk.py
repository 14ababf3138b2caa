"""What a sweep needs on disk: candidates as what differs from their base, as many as are kept, and base and oracles whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.base import Method
from raysweep.config.schema import Sweep
from raysweep.engine.resources import Plan
from raysweep.engine.retention import audited, bound
from raysweep.registry import resolve

IN_MEMORY = (
    2  # of the numbers per trained weight that a method holds, those that no checkpoint has, among them gradients
)


@dataclass(frozen=True)
class Disk:
    """Upper limits in bytes. search: of candidates and checkpoints while it runs; after: of candidates when the run is complete;
    shared: of base and oracles that are trained here, in the cache. kept, flying, slots: candidates, trials in flight, checkpoints.
    """

    search: float
    after: float
    shared: float
    kept: int
    flying: int
    slots: int

    def in_words(self, keep: str) -> str:
        """One line for people. keep: the setting `candidates.keep`."""
        shared = f"; {_size(self.shared)} of base and oracles in the cache" if self.shared else ""
        return (
            f"at most {_size(self.search)} of candidates and checkpoints during the search ({self.kept} candidates, {self.flying} more of "
            f"trials in flight, {self.slots} checkpoints), at most {_size(self.after)} of candidates afterwards (candidates.keep={keep})"
            f"{shared}"
        )


def of(sweep: Sweep, plan: Plan, candidate: float, whole: float, retrained: int) -> Disk:
    """The disk that a sweep needs.

    candidate: bytes of the weights that may change; whole: bytes of a whole model; retrained: number of models trained here.
    """
    trials, keep = sweep.search.trials, sweep.candidates.keep
    kept = bound(sweep)
    flying = min(trials - kept, plan.concurrent_trials)
    slots = min(trials, plan.slots)
    after = kept if keep == "all" else min(trials, audited(sweep))
    state = max(checkpoint(resolve("method", name), candidate, whole) for name in sweep.methods)
    search = (kept + flying) * candidate + slots * state
    return Disk(search, after * candidate, retrained * whole, kept, flying, slots)


def checkpoint(method: type[Method], candidate: float, whole: float) -> float:
    """The most bytes of a method's checkpoint: the model, and what the method keeps for each trained weight besides."""
    return whole + candidate * max(0.0, method.copies - IN_MEMORY)


def sizes(sweep: Sweep, model: Any) -> tuple[float, float]:
    """(bytes of the weights that the sweep's trials may change, bytes of the whole model), for a model in memory."""
    if sweep.train.modules:
        model.train_only(sweep.train.modules)
    parameters = list(model.net.parameters())
    changing = model.adaptable() if sweep.train.lora else [p for p in parameters if p.requires_grad]
    frozen = list(model.frozen.vae.parameters()) if model.latent else []
    return float(sum(p.nbytes for p in changing)), float(sum(p.nbytes for p in (*parameters, *frozen)))


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
