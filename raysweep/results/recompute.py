"""What a card states, computed again from the scores in its folder: rows of metrics, and the card itself. No Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.base import Inapplicable, Subject
from evaluators.metrics import Status
from raysweep.auditing.anchors import Anchors, assess_views
from raysweep.auditing.card import JUDGE, Card, anchor_table
from raysweep.auditing.judges import load_judge
from raysweep.auditing.measure import Measurement, absent, misfit, reduce, subject_of, table_rows
from raysweep.auditing.request import AuditRequest, rows_path, scores_path
from raysweep.config.schema import Tier
from raysweep.context import Context, load_measured
from raysweep.registry import RegistryError, resolve
from raysweep.results.cards import conclude
from raysweep.storage.files import write_bytes
from raysweep.storage.schemas import ROWS, SCORES, read_table
from raysweep.tasks.task import Task

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Audit:
    """One audit in a card's folder: its request, and the files of its rows and scores."""

    request: AuditRequest
    rows: Path
    scores: Path

    @property
    def stated(self) -> Rows:
        """Its rows as they are in the file."""
        rows: Rows = read_table(self.rows, ROWS).to_pylist()
        return rows


@dataclass(frozen=True)
class Evidence:
    """Everything in a card's folder that its content follows from. anchors: by name, in the full tier; audits: by tier."""

    card: Card
    task: Task
    context: Context
    audits: dict[str, Audit]
    anchors: dict[str, Audit]

    @classmethod
    def of(cls, card: Card, folder: Path, task: Task, run: Path) -> Evidence:
        """The evidence of a card. run: an empty folder, in which the run is laid out again."""
        tiers = {name: Tier.model_validate(settings, context={"stored": True}) for name, settings in card.tiers.items()}
        audited = card.models[card.subject]
        oracles = {
            n: (m.folder, m.digest) for n, m in card.models.items() if n.startswith("oracle-") and n != card.subject
        }
        context = Context(
            run=str(run),
            run_id="",
            task_digest=card.task.digest,
            quality=task.quality,
            validity=task.validity,
            base=card.models["base"].folder,
            base_digest=card.models["base"].digest,
            oracles=oracles,
            judges={t.judge: (str(folder / JUDGE), card.judge_digest) for t in tiers.values()}
            if card.judge_digest
            else {},
            prepared={},
            cache=str(run / "cache"),
            views=task.views,
        )
        audits = {
            name: Audit(
                context.request(name, tier, card.subject, "", audited.folder, audited.digest),
                folder / f"{name}-rows.parquet",
                folder / f"{name}-scores.parquet",
            )
            for name, tier in tiers.items()
        }
        anchors = {
            name: Audit(request, folder / anchor_table(name, "rows"), folder / anchor_table(name, "scores"))
            for name, request in context.anchor_requests("audit", tiers["audit"]).items()
        }
        return cls(card, task, context, audits, anchors)

    def card_again(self) -> Path:
        """Writes the card that follows from the rows in the card's folder, and returns its path."""
        run = Path(self.context.run)
        for audit in (*self.audits.values(), *self.anchors.values()):
            write_bytes(rows_path(run, audit.request.key), audit.rows.read_bytes())
            write_bytes(scores_path(run, audit.request.key), audit.scores.read_bytes())
        keys = {name: audit.request.key for name, audit in self.anchors.items()}
        measured = {name: load_measured(run, key) for name, key in keys.items()}
        anchors = Anchors(measured["base"], tuple(measured[n] for n in self.context.oracles), measured["destroyed"])
        self.context.save_anchors("audit", keys, assess_views(anchors, self.task.views))
        requests = {tier: audit.request for tier, audit in self.audits.items()}
        given = "(given)" in self.card.asked
        return conclude(self.task, self.context, requests, self.card.models, given, list(self.card.incomplete))

    def failed(self) -> list[str]:
        """The checks that failed, in the words of a card, by the rows in the card's folder."""
        texts = {
            **{f"{tier}: {{}}": audit for tier, audit in self.audits.items()},
            **{f"audit of {name}: {{}}": audit for name, audit in self.anchors.items()},
        }
        return sorted(
            {text.format(r["check"]) for text, a in texts.items() for r in a.stated if r["status"] == "failed"}
        )


@dataclass
class Recomputed:
    """Rows of an audit by check, and what of them could not be computed again: check -> why."""

    rows: dict[str, Rows]
    unknown: dict[str, str]


class Recomputer:
    """Computes the rows of audits again from their scores; what depends on data and judge alone is computed once."""

    def __init__(self, task: Task, judge: Path | None):
        self.task, self.judge = task, None if judge is None else load_judge(judge)
        self.arrays: dict[str, np.ndarray] = {}

    def rows(self, audit: Audit) -> Recomputed:
        """The rows of one audit; raises ValueError for scores that its tier has no check for, or that are not what a check gives."""
        request, scores = audit.request, load_scores(audit.scores)
        tier, stated = request.tier, audit.stated
        subject = subject_of(None, self.task, self.judge, tier)
        subject.kept = self._kept
        subject.peers = {
            name: subject if digest == request.digest else subject_of(None, self.task, self.judge, tier)
            for name, _, digest in request.anchors
        }
        checks = tier.checks_for(self.task)
        unasked = {name.split(".", 1)[0] for name in scores} - {*checks, "strip"}
        if unasked:
            raise ValueError(f"holds scores of {', '.join(sorted(unasked))}, which the tier does not ask for")
        result, unknown = Measurement(), dict[str, str]()
        for check in checks:
            units = {name.split(".", 1)[1]: a for name, a in scores.items() if name.split(".", 1)[0] == check}
            try:
                evaluator = resolve("evaluator", check)()
            except RegistryError as error:
                unknown[check] = str(error)
                continue
            reason = misfit(evaluator, self.task)
            if reason:
                result.rows += absent(evaluator, "skipped", reason)
            elif units:
                result.add(check, reduce(evaluator, units, subject, tier.groups), units)
            else:
                kept = [r for r in stated if r["check"] == check]
                status: Status = "failed" if kept and kept[0]["status"] == "failed" else "skipped"
                why = _why_skipped(evaluator, subject) if status == "skipped" else None
                if why is None:
                    unknown[check] = f"there are no scores: it was {status} when the model was measured"
                reason = why or (kept[0]["reason"] if kept else "no scores")
                result.rows += absent(evaluator, status, reason)
        rows = table_rows(request, result)
        return Recomputed({check: [r for r in rows if r["check"] == check] for check in checks}, unknown)

    def _kept(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self.arrays:
            self.arrays[key] = make()
        return self.arrays[key]


def _why_skipped(evaluator: Any, subject: Subject) -> str | None:
    """The reason for which a check is skipped before it looks at the model; None if there is none."""
    try:
        evaluator.scores(subject)
    except Inapplicable as error:
        return str(error)
    except Exception:  # it looks at the model, which is not here
        return None
    return None


def load_scores(path: Path) -> dict[str, np.ndarray]:
    """Reads an audit's scores: "check.score" -> array, units along the first axis."""
    units: dict[str, list[tuple[int, list[float], list[int]]]] = {}
    for row in read_table(path, SCORES).to_pylist():
        units.setdefault(row["score"], []).append((row["unit"], row["values"], row["shape"]))
    return {
        name: np.array([values for _, values, _ in sorted(rows)]).reshape(len(rows), *rows[0][2])
        for name, rows in units.items()
    }
