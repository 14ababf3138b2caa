"""The input of a report: the tables of a run in any state, as records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from raysweep.auditing.untested import StoredFacts
from raysweep.config.schema import ConfigError, Sweep
from raysweep.registry import resolve
from raysweep.results.audited import keys_of, rows_of, scores_of
from raysweep.results.front_row import FrontRow, read_front
from raysweep.results.profile import Line, read_profile
from raysweep.results.trials import Trial, trials_of
from raysweep.rundir import Manifest, RunDir
from raysweep.storage.schemas import ROWS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")  # colour-blind safe
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagon", "star-triangle-down")
ORIGINALS = 8  # forgotten pictures that a report shows
DETAILED = 40  # audited candidates with a line in the tables and an audit sheet; front.parquet has all
PICTURED = 12  # of these, those with pictures and curves
ROW_COLUMNS = tuple(name for name in ROWS.names if name != "replicates")  # of which no page shows anything


@dataclass
class ReportData:
    """A run's tables as records, and a colour and a symbol per method.

    sweep: with what was drawn for its audits. front: front.json, empty if the run has none. points: all audited candidates and
    the anchors. subjects: the models that the page shows in detail (see `in_detail`), in the order of the front. rows: theirs, as
    in `storage.schemas.ROWS`, without the probe's and without replicates. scores: (subject, score) -> array whose first axis runs over units, of anchors
    and of the first `PICTURED` candidates. anchors: the audit's anchors-audit.json. tables: those that the run has written,
    relative to it. shape: (C, H, W) of a picture. original: the first forgotten pictures (n, C, H, W) in [-1, 1].
    profile: the phases that ended, and the checks; empty if the run has none.
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
    tables: list[str]
    styles: dict[str, tuple[str, str]]
    shape: tuple[int, int, int]
    task: StoredFacts
    model_kind: str
    sensitive: bool
    original: np.ndarray
    profile: list[Line]

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return self.task.kind

    def candidates(self) -> list[FrontRow]:
        """All audited candidates."""
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

    @cached_property
    def detailed(self) -> list[FrontRow]:
        """The candidates and anchors that the page shows in detail."""
        shown = set(self.subjects)
        return [p for p in self.points if p.trial in shown]

    @property
    def left_out(self) -> int:
        """How many audited candidates are in no table of the page."""
        return len(self.points) - len(self.detailed)

    def metric(self, subject: str, name: str, paired_with: str = "") -> dict[str, Any] | None:
        """One audit row of a subject, or None."""
        return self._by_metric.get((subject, name, paired_with))

    @cached_property
    def _by_metric(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """(subject, check.metric, paired with) -> its first row of the audit."""
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in self.rows:
            if row["tier"] == "audit":
                rows.setdefault((row["subject"], f"{row['check']}.{row['metric']}", row["paired_with"]), row)
        return rows


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
    trials = trials_of(folder)
    keys = keys_of(folder, trials)
    anchors = sorted(keys.get("audit", {}))  # without a front, only they were audited
    subjects, pictured = (in_detail(points, front, most) if points else anchors for most in (DETAILED, PICTURED))
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
        rows=rows_of(folder, {t: k for t, k in keys.items() if t != "probe"}, subjects, ROW_COLUMNS),
        scores=scores_of(folder, keys.get("audit", {}), pictured, ("strip.", "loss.")),
        anchors=json.loads(folder.anchors("audit").read_text()) if folder.anchors("audit").is_file() else {"views": []},
        tables=[file.name for file in (folder.front_json, folder.front_table, folder.trials) if file.is_file()],
        styles=styles,
        shape=original.shape[1:],
        task=StoredFacts.of(task),
        model_kind=task.get("model_kind") or resolve("family", task["family"]).model_kind,
        sensitive=task["sensitive"],
        original=original,
        profile=read_profile(folder),
    )


def in_detail(points: Sequence[FrontRow], front: Mapping[str, Any], most: int) -> list[str]:
    """The anchors and at most `most` candidates, in the order of the front.

    First the best one, then those that were attacked, the front, the fronts of the methods, and the others by the larger of
    residue and damage.
    """
    candidates = [p for p in points if p.is_candidate]
    if len(candidates) <= most:
        return [p.trial for p in points]
    best, attacked = front["best"]["trial"], front["verdicts"]

    def rank(p: FrontRow) -> tuple[bool, bool, bool, bool, float]:
        return p.trial != best, p.trial not in attacked, not p.on_front, not p.on_method_front, p.worst

    chosen = {p.trial for p in sorted(candidates, key=rank)[:most]}
    return [p.trial for p in points if p.trial in chosen or not p.is_candidate]
