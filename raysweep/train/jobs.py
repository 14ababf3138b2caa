"""Jobs for train workers and what they come to. Light to import: every process of a run knows these."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysweep.storage.files import digest_of

CARD = "raysweep.json"


@dataclass(frozen=True)
class Job:
    """One piece of training.

    kind: "train" makes a candidate at `out` (a folder), "prepare" makes the method's prepared tensors (a file).
    base: folder of the model to start from; None: freshly initialised from the task and the seed. frozen: folder of the
    trained autoencoder that a freshly initialised model works with, if it does. modules: those of a text-to-image model whose
    weights may change, () for all; lora: rank and alpha of adapters to train instead. precision: of the passes of training.
    inputs: content hashes of what the paths lead to (task, base, prepared tensors, code).
    """

    id: str
    kind: str
    method: str
    hyperparameters: dict[str, Any]
    seed: int
    task: str
    base: str | None
    out: str
    prepared: str | None = None
    frozen: str | None = None
    modules: tuple[str, ...] = ()
    lora: dict[str, Any] | None = None
    precision: str = "fp32"
    budget_s: float = 600.0
    checkpoint_s: float = 60.0
    inputs: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of everything that the result depends on."""
        return digest_of(
            self.kind,
            self.method,
            self.hyperparameters,
            self.seed,
            self.base is None,
            self.inputs,
            list(self.modules),
            self.lora,
            self.precision,
        )


@dataclass(frozen=True)
class Outcome:
    """What a job came to. status: ok or failed; reason says why it failed, and limit which setting ended it, if one did;
    `digest` is the hash of the weights."""

    status: str
    reason: str = ""
    digest: str = ""
    seconds: float = 0.0
    step_seconds: float = 0.0
    diagnostics: dict[str, float] = field(default_factory=dict)
    limit: str = ""


def finished(job: Job) -> Outcome | None:
    """The outcome of a job that was done before, read from what it left; None if there is nothing or something else.

    Prepared tensors live in a cache that others write to as well: a file that is not the one the card tells of (cut short,
    replaced) counts as nothing, and is made again.
    """
    path = Path(job.out) / CARD if job.kind == "train" else Path(job.out).with_suffix(".json")
    if not path.is_file() or not Path(job.out).exists():
        return None
    try:
        card = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    if card.get("job_digest") != job.digest or (job.kind == "prepare" and card["sha256"] != file_digest(Path(job.out))):
        return None
    return Outcome(**card["outcome"])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
