"""The sentences of a report: the answer, the numbers behind it, and what was not tested. True in every state of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysweep.auditing.anchors import View
from raysweep.auditing.objectives import floor_in_words
from raysweep.auditing.untested import results_of, untested
from raysweep.report.data import ReportData
from raysweep.report.tables import TableLine, value
from raysweep.results.choice import MEANING
from raysweep.results.front_row import OBJECTIVES, FrontRow
from raysweep.tasks.records import listed

EASY = 0.2  # largest objective of the best candidate under which a short front says that the task is easy
METRICS = (
    "fidelity.frechet",
    "classifier.validity",
    "classifier.unlearning_accuracy",
    "classifier.retain_accuracy",
    "contrast.unlearning_accuracy",
    "contrast.retain_accuracy",
    "contrast.retain_loss",
    "loss.auc",
    "loss.rank",
    "loss.gap",
    "loss.retain_auc",
)


def unfinished(data: ReportData) -> tuple[str, list[str]]:
    """(badge, sentences) of a run that has not finished, or whose last attempt failed; empty for all others."""
    state, reason = data.manifest["state"], data.manifest.get("reason", "")
    if state == "failed":
        rest = " The results below are from the previous attempt." if data.front else " No candidate is recommended."
        return "FAILED", [f"The run failed: {reason}.{rest}"]
    if state == "interrupted" and data.front:
        return "NOT FINISHED", [
            "The run was resumed and interrupted; run the same command again to resume. The results below are from the previous "
            "attempt."
        ]
    if not data.front:
        ended = sum(t.has_ended for t in data.trials)
        return "NOT FINISHED", [
            f"The run has not finished its audit (state: {state}; {ended} of {data.sweep.search.trials} trials ended). No candidate is "
            "recommended; run the same command again to resume."
        ]
    return "", []


def answer(data: ReportData, best: FrontRow | None) -> list[str]:
    """The answer of front.json, the meaning of its words, and the settings behind it."""
    lines = list(data.front.get("answer", ()))
    if best is None:
        return lines
    members = [p for p in data.candidates() if p.on_front]
    settings = ", ".join(f"{name} {short(setting)}" for name, setting in best.hyperparameters.items())
    lines.append(f"Residue is {MEANING['residue']}. Damage is {MEANING['damage']}.")
    lines.append(f"Settings of {best.trial}: {settings}.")
    audited = len(data.candidates())
    lines.append(
        f"{len(members)} of {audited} audited candidates {'is' if len(members) == 1 else 'are'} on the front: no other candidate is "
        "as good in both residue and damage and better in one."
        if audited > 1
        else "It is the only candidate that was audited, so there is no front to choose from."
    )
    recommended = data.front["recommended"]["trial"] is not None
    if recommended and audited > 2 and len(members) <= 2 and best.worst < EASY:
        lines.append(
            "The task is easy for the best methods, so the overall front is short; see each method's own front."
        )
    return lines


@dataclass(frozen=True)
class AnswerTable:
    """The main audited metrics of a few models side by side."""

    subjects: list[str]
    lines: list[TableLine]


def answer_table(data: ReportData, best: FrontRow | None) -> AnswerTable:
    """The main metrics of base, best candidate and oracles; without lines if nothing was audited."""
    oracles = [name for name in data.subjects if name.startswith("oracle")]
    subjects = [name for name in ("base", *([best.trial] if best else []), *oracles) if name in data.subjects]
    lines = []
    for metric in dict.fromkeys([*(view["metric"] for view in data.anchors["views"]), *METRICS]):
        cells = [value(data.metric(subject, metric)) for subject in subjects]
        if any(cell != "-" for cell in cells):
            lines.append(TableLine(metric, cells))
    return AnswerTable(subjects, lines)


def not_tested(data: ReportData) -> list[str]:
    """The limits of the report, in sentences."""
    candidates = [p.trial for p in data.candidates()]
    not_attacked = [name for name in candidates if name not in data.front.get("verdicts", {})]
    if candidates:
        lines = [
            "Intervals cover the sampling of images and noise, not the retraining of a candidate with another seed.",
            f"Candidates were picked for the audit by their probe values; it used {fresh_material(data)}, on the same task.",
        ]
    else:
        lines = ["No candidate was audited: the search's own estimates are from few samples, and are not results."]
    if not_attacked:
        lines.append(f"Whether attacks bring the forgotten data back was not shown for {listed(not_attacked)}.")
    if data.left_out:
        lines.append(
            f"Checks are shown of {len(data.detailed)} of {len(data.points)} audited models; those that failed on others are listed "
            "above, and their rows are in rows/."
        )
    audit = data.sweep.audit
    tiers = {"audit": audit.audit} | ({"durability": audit.durability} if audit.finalists else {})
    return lines + untested(
        data.task,
        tiers,
        results_of(data.rows),
        [View(**view) for view in data.anchors["views"]],
        oracles=len(data.sweep.oracle_models) or data.sweep.oracles,
    )


def noise_floor(data: ReportData) -> str:
    """How far from 0 perfectly unlearned models lie by chance; empty before the audit."""
    oracles = [(p.residue, p.damage) for p in data.points if p.trial.startswith("oracle")]
    return floor_in_words(oracles) if oracles else ""


def fresh_material(data: ReportData) -> str:
    """The audit's prompts, images and judges that the search had not seen."""
    if data.model_kind == "contrastive":  # such a model draws no images and is its own judge
        return "other labelled images and other prompts"
    return "fresh seeds and a judge with other training data"


def how_trials_ended(data: ReportData) -> str:
    """The counts of trials by how they ended."""
    complete, failed, pruned = (sum(t.state == state for t in data.trials) for state in ("COMPLETE", "FAIL", "PRUNED"))
    return f"{complete} of {data.sweep.search.trials} trials completed, {failed} failed, {pruned} were stopped early."


def other_picks(data: ReportData) -> list[str]:
    """Other ways to choose, how stable each is, and which candidates are shown to have forgotten."""
    picks = data.front.get("picks")
    if not picks:
        return []

    def named(trial: str) -> str:
        return trial + (" (not recommended)" if data.front["against"][trial] else "")

    balanced, knee, sure, shown = (picks[name] for name in ("balanced", "knee", "sure", "forgotten"))
    lines = [
        f"Smallest value of max(residue, damage): {named(balanced['trial'])}, chosen in {balanced['share']:.0%} of paired "
        "resamples of the audit's samples.",
        f"Knee of the front (farthest below the line between its ends): {named(knee['trial'])}, chosen in {knee['share']:.0%}.",
        f"Least damage among candidates whose residue is shown to be under {sure['limit']}: "
        f"{named(sure['trial']) if sure['trial'] else 'no candidate is that sure'}.",
        f"Shown to have a residue under {shown['limit']}, with false discoveries over the sweep's candidates held to "
        f"{shown['rate']:.0%}: {listed(map(named, shown['trials'])) or 'none'}.",
    ]
    if data.front["undecided"]:
        audits = max(p.audits or 0 for p in data.candidates())
        lines.append(
            f"Not surely on the front or off it after {audits} audits: {listed(data.front['undecided'])}. Raise audit.rounds to "
            "measure them again."
        )
    return lines


def search_optimism(data: ReportData) -> list[str]:
    """Sentences on the difference between the audit and the search's estimates, by objective."""
    gaps = data.front.get("search_against_audit", {})
    return [_optimism(objective, gaps[objective]) for objective in OBJECTIVES if objective in gaps]


def _optimism(objective: str, gap: dict[str, Any]) -> str:
    if gap["gap"] is None:
        return f"{objective}: at least two audited candidates are needed to measure the search's optimism."
    rank = "not defined" if gap["rank_correlation"] is None else f"{gap['rank_correlation']:.2f}"
    return (
        f"{objective}: audit minus search {gap['gap']:+.3f} on average (95 % interval {gap['lo']:+.3f} to {gap['hi']:+.3f}, "
        f"{gap['n']} candidates); Spearman's rank correlation {rank}."
    )


def short(setting: Any) -> str:
    """A setting for a sentence."""
    return f"{setting:.3g}" if isinstance(setting, float) else str(setting)
