"""Tells models apart: by everything that their output depends on, and by their weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.models import families


@dataclass(frozen=True)
class Identity:
    """What tells a model from others. folder: its path; digest, networks: see `raysweep.models.handle.Handle`."""

    folder: str
    digest: str
    networks: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, folder: str) -> Identity:
        """The identity of a model that was read from a folder."""
        return cls(folder, model.digest, model.networks)

    @classmethod
    def read(cls, folder: str) -> Identity:
        """The identity of the model in a folder; raises ValueError, saying what is wrong with the folder."""
        return cls.of(families.load(folder), folder)

    def same_network(self, other: Identity) -> bool:
        """Whether both have the same tensors, in any type, whatever their settings."""
        return not set(self.networks).isdisjoint(other.networks)


def clashes(oracles: Sequence[Identity], base: Identity | None, audited: Identity | None = None) -> list[str]:
    """A sentence for each oracle that is no model of its own: it is another oracle, the base or the audited model.

    Comparing a model with itself shows no difference, whatever it has forgotten, and an oracle named twice hides how far oracles
    differ. The audited model may be the base: that is a positive control.
    """
    problems = []
    for k, oracle in enumerate(oracles):
        twin = next((other for other in oracles[:k] if oracle.same_network(other)), None)
        if twin is not None:
            problems.append(
                f"{oracle.folder} and {twin.folder} are the same model ({_sameness(oracle, twin)}): each oracle must be trained "
                "from its own seed"
            )
        if base is not None and oracle.same_network(base):
            problems.append(
                f"{oracle.folder} is the base {base.folder} ({_sameness(oracle, base)}): an oracle is a model that was trained without "
                "what must be forgotten"
            )
        if audited is not None and oracle.same_network(audited):
            problems.append(
                f"{oracle.folder} is the audited model {audited.folder} ({_sameness(oracle, audited)}), and a model cannot be compared "
                "with itself: name other oracles"
            )
    return problems


def _sameness(one: Identity, other: Identity) -> str:
    if one.digest == other.digest:
        return f"hash {one.digest}"
    return "the same weights, with other settings or in another type"
