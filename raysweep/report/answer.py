"""The first screen of a report, in words: what came out, by which numbers, and what was not tested. True in every state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raysweep.results.choice import MEANING
from raysweep.results.front_row import FrontRow

if TYPE_CHECKING:
    from raysweep.report.data import ReportData

EASY = 0.2  # the worse objective under which a short front says that the task is easy


def unfinished(data: ReportData) -> tuple[str, list[str]]:
    """(badge, sentences) of a run that has come to no end, or whose last attempt failed; empty for all others."""
    state, reason = data.manifest["state"], data.manifest.get("reason", "")
    if state == "failed":
        before = " What follows stands from the attempt before it." if data.front else " No candidate is recommended."
        return "FAILED", [f"The run failed: {reason}.{before}"]
    if state == "interrupted" and data.front:
        again = "The run was resumed and interrupted; the same command goes on. What follows stands from the attempt before it."
        return "NOT FINISHED", [again]
    if not data.front:
        ended = sum(t.has_ended for t in data.trials)
        return "NOT FINISHED", [
            f"The run has not come to the end of its audit (state: {state}; {ended} of {data.sweep.search.trials} trials ended). No candidate "
            "is recommended; the same command goes on."
        ]
    return "", []


def answer(data: ReportData, best: FrontRow | None) -> list[str]:
    """The answer of front.json, what its words mean, and the settings behind it."""
    lines = list(data.front.get("answer", ()))
    if best is None:
        return lines
    members = [p for p in data.candidates() if p.on_front]
    settings = ", ".join(f"{k} {short(v)}" for k, v in best.hyperparameters.items())
    lines.append(f"Residue is {MEANING['residue']}; damage is {MEANING['damage']}.")
    lines.append(f"Settings of {best.trial}: {settings}.")
    audited = len(data.candidates())
    lines.append(
        f"{len(members)} of {audited} audited candidates {'is' if len(members) == 1 else 'are'} on the front."
        if audited > 1
        else "It is the only candidate that was audited, so there is no front to choose from."
    )
    recommended = data.front["recommended"]["trial"] is not None
    if recommended and audited > 2 and len(members) <= 2 and best.worst < EASY:
        lines.append(
            "The task is easy for the best methods, so the overall front is short; see each method's own front."
        )
    return lines


def answer_rows(data: ReportData, best: FrontRow | None) -> list[dict[str, Any]]:
    """The main numbers of base, chosen candidate and oracles side by side; empty if nothing was audited."""
    oracles = [name for name in data.subjects if name.startswith("oracle")]
    chosen = [name for name in ("base", *([best.trial] if best else []), *oracles) if name in data.subjects]
    wanted = [v["metric"] for v in data.anchors["views"]]
    wanted += [
        "fidelity.frechet",
        "classifier.validity",
        "classifier.unlearning_accuracy",
        "classifier.retain_accuracy",
        "contrast.unlearning_accuracy",
        "contrast.retain_accuracy",
        "contrast.retain_loss",
    ]
    wanted += ["loss.auc", "loss.gap", "loss.retain_auc"]
    rows = []
    for name in dict.fromkeys(wanted):
        cells = [value(data.metric(subject, name)) for subject in chosen]
        if any(cell != "-" for cell in cells):
            rows.append({"metric": name, "cells": cells})
    return [{"metric": "", "cells": chosen}, *rows] if rows else []


def untested(data: ReportData) -> list[str]:
    """What nobody should read into this report."""
    attacked = [name for name in data.front.get("verdicts", {}) if name in {p.trial for p in data.candidates()}]
    others = [p.trial for p in data.candidates() if p.trial not in attacked]
    lines = ["Adversarial prompts were not tried."]
    if data.candidates():
        prompts = ", nor other prompts than the audit's" if data.kind == "concept" else ""
        lines += [
            f"Intervals cover the sampling of images and noise, not the retraining of a candidate with another seed{prompts}.",
            f"Candidates were picked for the audit by their probe values; it used {fresh(data)}, on the same task.",
        ]
    else:
        lines.append("No candidate was audited: the search's own estimates are on few samples, and are not results.")
    if others:
        lines.append(f"Attacks that might bring the forgotten thing back were not made on {', '.join(others)}.")
    oracles = len(data.sweep.oracle_models) or data.sweep.oracles
    if oracles < 3:
        lines.append(
            f"The oracle is {'one retrained model' if oracles == 1 else 'the mean of two retrained models'}, too few for an "
            "interval on its spread."
        )
    return lines


def fresh(data: ReportData) -> str:
    """What the audit has that the search had not."""
    if data.model_kind == "contrastive":  # such a model draws no images and is its own judge
        return "other labelled images and other prompts"
    return "fresh seeds and a judge with other training data"


def trials_told(data: ReportData) -> str:
    """How the trials ended."""
    count = {state: sum(t.state == state for t in data.trials) for state in ("COMPLETE", "FAIL", "PRUNED")}
    return (
        f"{count['COMPLETE']} of {data.sweep.search.trials} trials ended well, {count['FAIL']} failed, {count['PRUNED']} were "
        "stopped early."
    )


def value(row: dict[str, Any] | None) -> str:
    """A row's value for a table."""
    return "-" if row is None or row["value"] is None else f"{row['value']:.3g}"


def short(value: Any) -> str:
    """A setting for a sentence."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
