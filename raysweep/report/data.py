"""The input of a report: the tables of a run in any state, as records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from raysweep.auditing.untested import StoredFacts
from raysweep.config.schema import ConfigError, Sweep
from raysweep.registry import resolve
from raysweep.results.audited import keys_of, rows_of, scores_of
from raysweep.results.front_row import FrontRow, read_front
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import Manifest, RunDir

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")  # colour-blind safe
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagon", "star-triangle-down")
ORIGINALS = 8  # forgotten pictures that a report shows


@dataclass
class ReportData:
    """A run's tables as records, and a colour and a symbol per method.

    sweep: with what was drawn for its audits. front: front.json, empty if the run has none. subjects: audited models in the
    order of the front. rows: as in `storage.schemas.ROWS`. scores: (subject, score) -> array whose first axis runs over units.
    anchors: the audit's anchors-audit.json. shape: (C, H, W) of a picture. original: the first forgotten pictures (n, C, H, W)
    in [-1, 1].
    """

    sweep: Sweep
    manifest: Manifest
    commits: list[str]
    front: dict[str, Any]
    points: list[FrontRow]
    subjects: list[str]
    trials: list[Trial]
    rows: list[dict[str, Any]]
    scores: dict[tuple[str, str], np.ndarray]
    anchors: dict[str, Any]
    styles: dict[str, tuple[str, str]]
    shape: tuple[int, int, int]
    task: StoredFacts
    model_kind: str
    sensitive: bool
    original: np.ndarray

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return self.task.kind

    def candidates(self) -> list[FrontRow]:
        """The audited candidates."""
        return [p for p in self.points if p.is_candidate]

    def completed(self, method: str) -> list[Trial]:
        """The trials of a method that made a candidate."""
        return [t for t in self.trials if t.method == method and t.is_complete]

    @property
    def membership(self) -> bool:
        """Whether curves of membership inference can be drawn."""
        return bool(self.front) and any(score == "loss.calibration" for _, score in self.scores)

    @property
    def single(self) -> bool:
        """Whether membership was inferred of one picture, which has a rank and no curve."""
        return any(score == "loss.forget" and len(array) == 1 for (_, score), array in self.scores.items())

    def metric(self, subject: str, name: str, paired_with: str = "") -> dict[str, Any] | None:
        """One audit row of a subject, or None."""
        for row in self.rows:
            key = f"{row['check']}.{row['metric']}"
            if (row["subject"], key, row["paired_with"], row["tier"]) == (subject, name, paired_with, "audit"):
                return row
        return None


def gather(folder: RunDir) -> ReportData:
    """Reads a run in any state; tables that it has not written yet are empty.

    Raises StoreError for a table that cannot be read, ConfigError for the front of an earlier raysweep.
    """
    sweep = folder.in_force()
    front: dict[str, Any] = json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}
    if front and "answer" not in front:
        raise ConfigError(
            f"{folder.front_json}: was written by an earlier raysweep, whose runs this version cannot resume: run the sweep again under "
            f"another name, for example name={folder.path.name}-2"
        )
    points = read_front(folder) if front else []
    trials = trial_table(folder, folder.run_id)
    keys = keys_of(folder, trials)
    subjects = [p.trial for p in points] or sorted(keys.get("audit", {}))  # without a front: the anchors
    task = json.loads((folder.task / "task.json").read_text())
    original = load_file(folder.task / "splits.safetensors")["forget.x"][:ORIGINALS]
    styles = {m: (COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, m in enumerate(sweep.methods)}
    return ReportData(
        sweep=sweep,
        manifest=folder.read_manifest(),
        commits=folder.commits,
        front=front,
        points=points,
        subjects=subjects,
        trials=trials,
        rows=rows_of(folder, keys, subjects),
        scores=_scores(scores_of(folder, {"audit": keys.get("audit", {})}, subjects)),
        anchors=json.loads(folder.anchors("audit").read_text()) if folder.anchors("audit").is_file() else {"views": []},
        styles=styles,
        shape=original.shape[1:],
        task=StoredFacts.of(task),
        model_kind=task.get("model_kind") or resolve("family", task["family"]).model_kind,
        sensitive=task["sensitive"],
        original=original,
    )


def _scores(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """(subject, score) -> array, for the scores that the report draws."""
    units: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    for row in rows:
        if row["score"].startswith(("strip.", "loss.")):
            units.setdefault((row["subject"], row["score"]), []).append((row["unit"], row["values"]))
    return {key: np.array([values for _, values in sorted(pairs)]) for key, pairs in units.items()}
