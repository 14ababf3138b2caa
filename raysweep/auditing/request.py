"""Requests for audits and their answers: what identifies an audit, the files that it leaves in its run, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from raysweep.config.schema import Tier
from raysweep.storage.files import digest_of
from raysweep.storage.schemas import SCHEMA_VERSION


@dataclass(frozen=True)
class AuditRequest:
    """One model to measure in one tier.

    model: its folder; None for a freshly initialised (destroyed) model.
    anchors: (name, folder, digest) of the base and the oracles, which checks compare the model with.
    cache: folder that keeps the audits of anchors beyond the run; None keeps nothing.
    references: folder of arrays that depend on data and judge alone, shared by all models of a judge.
    """

    subject: str
    method: str
    model: str | None
    digest: str
    tier_name: str
    tier: Tier
    judge: str
    judge_digest: str
    task: str
    task_digest: str
    run: str
    code: str = ""
    anchors: tuple[tuple[str, str, str], ...] = ()
    cache: str | None = None
    references: str | None = None

    @property
    def key(self) -> str:
        """Name of the audit; requests with equal keys ask for the same work."""
        parts = (self.subject, self.digest, self.tier_name, self.tier.digest, self.judge_digest, self.task_digest)
        peers = [(name, digest) for name, _, digest in self.anchors]
        return f"{self.subject}-{self.tier_name}-{digest_of(*parts, self.code, SCHEMA_VERSION, peers)}"

    @property
    def rows_path(self) -> Path:
        """The Parquet file of its rows; it is written last, so its presence means that the audit is complete."""
        return rows_path(Path(self.run), self.key)

    @property
    def scores_path(self) -> Path:
        """The Parquet file of its scores."""
        return scores_path(Path(self.run), self.key)


@dataclass(frozen=True)
class Chore:
    """Other work of auditors before the first audit: a method of theirs, such as "train_judge", with its arguments."""

    method: str
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        """Name of the chore."""
        return f"{self.method}-{digest_of(*map(str, self.arguments))}"


class Answer(TypedDict):
    """An auditor's answer: seconds of work, in all and by check, images generated, and the checks that failed."""

    seconds: float
    checks: dict[str, float]
    images: int
    failed: list[str]


class Outcome(TypedDict):
    """The manager's answer, and a line of its log.

    A failed audit has a `reason`, and in `limit` the setting of the time limit that ended it, or "". value: what a chore returns.
    """

    status: Literal["ok", "failed"]
    reason: str
    seconds: float
    failed: list[str]
    checks: NotRequired[dict[str, float]]
    images: NotRequired[int]
    limit: NotRequired[str]
    value: NotRequired[str]


def failed(reason: str, limit: str = "") -> Outcome:
    """The outcome of an audit or a chore that failed."""
    return {"status": "failed", "reason": reason, "seconds": 0.0, "failed": [], "limit": limit}


def rows_path(run: Path, key: str) -> Path:
    """The Parquet file of the rows of the audit `key` in the run folder `run`."""
    return run / "rows" / f"{key}.parquet"


def scores_path(run: Path, key: str) -> Path:
    """The Parquet file of the scores of the audit `key` in the run folder `run`."""
    return run / "scores" / f"{key}.parquet"
