"""Jobs for train workers, and their outcomes. Light to import: every process of a run loads this module."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysweep.models.folders import CARD
from raysweep.storage.files import digest_of


@dataclass(frozen=True)
class Job:
    """A candidate to train, or a method's tensors to prepare.

    kind: "train" writes a model folder to `out`, "prepare" a file of tensors. task, base, prepared: paths of the task's
    folder, of the model to start from and of prepared tensors; without a base, the model is freshly initialised from the
    task and the seed, and `frozen` is the folder of the trained autoencoder that it uses, if it is a latent model.
    modules: the modules of a text-to-image model that train, () for all. lora: rank and alpha of adapters that train
    instead. precision: of the forward and backward passes, fp32 or bf16. budget_s: seconds after which the job is ended.
    checkpoint_s: seconds between checkpoints. as_delta: save what differs from the base instead of the whole model. inputs: content hashes of the files behind the paths, and of the code. card:
    what the candidate's card says besides.
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
    as_delta: bool = False
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
    """The result of a job.

    status: ok or failed. reason: why it failed. digest: hash of the weights, or of the prepared tensors. seconds: for the
    job; step_seconds: per step. limit: the setting that ended it, such as train.budget_s, if one did.
    """

    status: str
    reason: str = ""
    digest: str = ""
    seconds: float = 0.0
    step_seconds: float = 0.0
    diagnostics: dict[str, float] = field(default_factory=dict)
    limit: str = ""


def finished(job: Job) -> Outcome | None:
    """The outcome of a job that was done before, from its card; None if there is no result, or another job's.

    Prepared tensors lie in a cache that other runs write to: a file whose hash is not the card's (truncated, replaced) counts
    as no result.
    """
    out = Path(job.out)
    if job.kind == "train":
        return trained(job, out)
    card = _card(out.with_suffix(".json"), job)
    if card is None or not out.is_file() or card["sha256"] != file_digest(out):
        return None
    return Outcome(**card["outcome"])


def trained(job: Job, folder: Path) -> Outcome | None:
    """The outcome by the card in a folder, wherever that is; None unless it is the card of this training job."""
    card = _card(folder / CARD, job)
    return None if card is None else Outcome(**card["outcome"])


def _card(path: Path, job: Job) -> dict[str, Any] | None:
    """The content of a card; None if there is none, or another job's."""
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return card if card.get("job_digest") == job.digest else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
