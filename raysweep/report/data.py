"""Gathers what the report shows from a run's tables. All arithmetic and wording is done here, none in the template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from raysweep.audit.informative import caveat
from raysweep.config import presets
from raysweep.config.schema import ConfigError, Sweep
from raysweep.registry import resolve
from raysweep.report.answer import answer, answer_rows, fresh, trials_told, unfinished, untested, value
from raysweep.report.pictures import strips
from raysweep.results.audited import keys_of, rows_of, scores_of
from raysweep.results.front_row import FrontRow, Objective, read_front
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import RunDir
from raysweep.tasks.records import lines_of

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")  # colour-blind safe
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagon", "star-triangle-down")


@dataclass
class ReportData:
    """A run's tables as plain data, with a colour and a symbol per method.

    front: front.json, empty if the run has none. subjects: audited models in the order of the front. anchors: of the audit.
    """

    sweep: Sweep
    manifest: dict[str, Any]
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
    kind: str
    model_kind: str
    sensitive: bool
    original: np.ndarray

    def candidates(self) -> list[FrontRow]:
        return [p for p in self.points if p.is_candidate]

    @property
    def membership(self) -> bool:
        """Whether curves of membership inference can be drawn."""
        return bool(self.front) and any(score == "loss.calibration" for _, score in self.scores)

    def metric(self, subject: str, name: str, paired_with: str = "") -> dict[str, Any] | None:
        """One audit row of a subject, or None."""
        for row in self.rows:
            key = f"{row['check']}.{row['metric']}"
            if (row["subject"], key, row["paired_with"], row["tier"]) == (subject, name, paired_with, "audit"):
                return row
        return None


def gather(folder: RunDir) -> ReportData:
    """Reads a run in any state: what it has not come to yet is empty. Raises StoreError or ConfigError for what cannot be read."""
    sweep = folder.sweep()
    front: dict[str, Any] = json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}
    if front and "answer" not in front:
        raise ConfigError(
            f"{folder.front_json}: was written by an earlier raysweep, whose runs this one cannot go on with: run the sweep again under "
            f"another name, for example name={folder.path.name}-2"
        )
    points = read_front(folder) if front else []
    trials = trial_table(folder, folder.run_id)
    keys = keys_of(folder, trials)
    subjects = [p.trial for p in points] or sorted(keys.get("audit", {}))  # the anchors
    task = json.loads((folder.task / "task.json").read_text())
    original = load_file(folder.task / "splits.safetensors")["forget.x"][:8]
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
        kind=task["kind"],
        model_kind=task.get("model_kind") or resolve("family", task["family"]).model_kind,
        sensitive=task["sensitive"],
        original=original,
    )


def _plugins(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What is not raysweep's own, and the package that it is of."""
    return [(name, f"external, {package}") for name, package in sorted(manifest.get("plugins", {}).items())]


def _preset(sweep: Sweep) -> str:
    """Which paper's experiment this is, and at which scale; "" if none."""
    text = ""
    if sweep.preset in presets.names():
        about = presets.about(sweep.preset)
        text = f"{about.title}, after {about.paper}. "
    if sweep.scale == "tiny":
        text += "At scale tiny: on miniatures of its models and data, which say nothing about the paper's figures."
    return text


def _scores(rows: list[dict[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """(subject, score) -> array, for what the report draws."""
    wanted: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    for row in rows:
        if row["score"].startswith(("strip.", "loss.")):
            wanted.setdefault((row["subject"], row["score"]), []).append((row["unit"], row["values"]))
    return {key: np.array([v for _, v in sorted(units)]) for key, units in wanted.items()}


def page_context(data: ReportData) -> dict[str, Any]:
    """Everything that the template shows, as text and tables."""
    best_trial = data.front["best"]["trial"] if data.front else None
    best = next((p for p in data.candidates() if p.trial == best_trial), None)
    volume = data.front.get("hypervolume")
    failed = [t for t in data.trials if t.has_failed]
    absent = [r for r in data.rows if r["status"] != "ok" and r["tier"] != "probe" and not r["paired_with"]]
    reasons = sorted({(r["check"], r["status"], r["reason"]) for r in absent})
    incomplete = data.manifest.get("incomplete", [])
    complete = not incomplete and not any(r["status"] == "failed" for r in absent)
    drawn, (badge, lines) = strips(data), unfinished(data)
    return {
        "name": data.sweep.name,
        "preset": _preset(data.sweep),
        "manifest": data.manifest,
        "badges": [text for text in (badge, "" if complete else "INCOMPLETE") if text],
        "answer": [*lines, *answer(data, best)],
        "answer_rows": answer_rows(data, best),
        "sections": _sections(data, drawn),
        "membership": data.membership,
        "audited": bool(data.front),
        "fresh": fresh(data),
        "searched": any(t.is_complete for t in data.trials),
        "hypervolume": f"{volume['value']:.3f} (95 % interval {volume['lo']:.3f} to {volume['hi']:.3f})"
        if volume
        else "-",
        "probe_hypervolume": f"{data.front['probe_hypervolume']:.3f}" if data.front else "-",
        "front_rows": [_front_row(data, p) for p in data.points],
        "method_rows": _method_rows(data),
        "picks": _picks(data),
        "views": [_view_row(v) for v in data.anchors["views"]],
        "sheets": [_sheet(data, name) for name in data.subjects],
        "attacks": _attacks(data),
        "flattery": [_flattery(name, gap) for name, gap in data.front.get("search_against_audit", {}).items()],
        "strips": drawn,
        "data": [line for account in data.manifest.get("data", ()) for line in lines_of(account)],
        "failures": [{"trial": t.trial, "reason": t.reason} for t in failed],
        "trials": trials_told(data),
        "incomplete": incomplete,
        "absent": [{"check": c, "status": s, "reason": why} for c, s, why in reasons],
        "untested": untested(data),
        "config": data.sweep.recipe(),
        "versions": sorted(data.manifest["versions"].items()) + _plugins(data.manifest),
        "commit": ", resumed at ".join(data.commits),
        "command": f"raysweep run {data.sweep.name}.yaml",
    }


def _sections(data: ReportData, drawn: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(anchor, name) of the parts that the page has."""
    parts = {
        "front": ("Front", bool(data.front)),
        "strips": ("Pictures", bool(drawn)),
        "search": ("Search and audit", bool(data.front)),
        "methods": ("Methods", True),
        "effects": ("Hyperparameters", any(t.is_complete for t in data.trials)),
        "sheets": ("Audit sheets", bool(data.subjects)),
        "durability": ("Under attack", bool(data.front)),
        "membership": ("Membership", data.membership),
        "gaps": ("Failures and gaps", True),
        "provenance": ("Provenance", True),
    }
    return [(anchor, name) for anchor, (name, there) in parts.items() if there]


def _picks(data: ReportData) -> list[str]:
    """Other ways to choose, how stable each is, and what the sweep may claim at all."""
    picks = data.front.get("picks")
    if not picks:
        return []

    def named(trial: str) -> str:
        return trial + (" (not recommended)" if data.front["against"][trial] else "")

    sure, shown = picks["sure"], picks["forgotten"]
    lines = [
        f"Smallest value of max(residue, damage): {named(picks['balanced']['trial'])}, chosen in "
        f"{picks['balanced']['share']:.0%} of paired resamples.",
        f"Knee of the front: {named(picks['knee']['trial'])}, chosen in {picks['knee']['share']:.0%}.",
        f"Least damage among candidates whose residue is at most {sure['limit']} with probability {sure['certain']}: "
        f"{named(sure['trial']) if sure['trial'] else 'none is that sure'}.",
        f"Shown to have a residue under {shown['limit']}, with false discoveries over the sweep's candidates held to "
        f"{shown['rate']:.0%}: {', '.join(named(t) for t in shown['trials']) or 'none'}.",
    ]
    left = data.front["undecided"]
    if left:
        lines.append(
            f"Still uncertain after {max(p.audits or 0 for p in data.candidates())} audits: {', '.join(left)} (audit.rounds)."
        )
    return lines


def _front_row(data: ReportData, p: FrontRow) -> dict[str, Any]:
    probe = "-" if p.probe_residue is None else f"{p.probe_residue:.3f} / {p.probe_damage:.3f}"
    return {
        "trial": p.trial,
        "method": p.method or "anchor",
        "colour": data.styles.get(p.method, ("#888888", ""))[0],
        "residue": _with_error(p, "residue"),
        "damage": _with_error(p, "damage"),
        "probe": probe,
        "over": f"{p.over_forgetting:.3f}",
        "front": {True: "yes", False: "no", None: "-"}[p.on_front],
        "own": {True: "yes", False: "no", None: "-"}[p.on_method_front],
        "p_dominated": "-" if p.p_dominated is None else f"{p.p_dominated:.2f}",
        "audits": p.audits or "-",
    }


def _method_rows(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for method in data.sweep.methods:
        mine = [t for t in data.trials if t.method == method]
        ok = [t for t in mine if t.is_complete]
        audited = [p for p in data.candidates() if p.method == method]
        best = min(audited, key=lambda p: (p.worst, p.residue + p.damage), default=None)
        rows.append(
            {
                "method": method,
                "colour": data.styles[method][0],
                "trials": f"{len(ok)} ok, {len(mine) - len(ok)} not",
                "seconds": f"{sum(t.train_s or 0 for t in ok):.0f}",
                "audited": len(audited),
                "best": best.trial if best else "-",
                "residue": _with_error(best, "residue") if best else "-",
                "damage": _with_error(best, "damage") if best else "-",
            }
        )
    return rows


def _view_row(view: dict[str, Any]) -> dict[str, Any]:
    return {
        "metric": view["metric"],
        "base": "-" if view["base"] is None else f"{view['base']:.4g}",
        "oracle": "-" if view["oracle"] is None else f"{view['oracle']:.4g}",
        "used": "yes" if view["informative"] else f"no: {view['reason']}",
    }


def _sheet(data: ReportData, subject: str) -> dict[str, Any]:
    """The audit sheet of a subject: every check with its interval, and its paired differences."""
    p = next((p for p in data.points if p.trial == subject), None)
    rows = []
    for row in data.rows:
        if row["subject"] != subject or row["tier"] != "audit" or row["paired_with"]:
            continue
        name = f"{row['check']}.{row['metric']}"
        rows.append(
            {
                "metric": name,
                "value": value(row) if row["status"] == "ok" else row["status"],
                "n": row["n"],
                "interval": "-" if row["lo"] is None else f"{row['lo']:.3g} to {row['hi']:.3g}",
                "how": _how(row, data.kind),
                "to_oracle": _delta(data.metric(subject, name, "oracle")),
                "to_base": _delta(data.metric(subject, name, "base")),
                "direction": row["direction"],
                "status": row["status"],
            }
        )
    notes = [data.front["standing"][subject]] if p is not None and p.is_candidate else []
    if p is not None and notes and p.over_forgetting > 0.1:
        notes.append("over-forgotten: counted as damage")
    return {
        "trial": subject,
        "method": (p.method if p is not None else "") or "anchor",
        "note": "; ".join(notes),
        "rows": rows,
    }


def _how(row: dict[str, Any], kind: str) -> str:
    """How the interval was made, or why there is none, and what limits the check."""
    if row["status"] != "ok":
        return row["reason"]
    made = "" if row["interval"] == "none" else row["interval"]
    return "; ".join(filter(None, (made, row["reason"], caveat(kind, f"{row['check']}.{row['metric']}"))))


def _attacks(data: ReportData) -> dict[str, Any]:
    """Presence after each attack by subject, with the excess over the oracles, and the verdicts."""
    tried = {r["subject"] for r in data.rows if r["tier"] == "durability"}
    subjects = [name for name in data.subjects if name in tried]
    found = {
        (r["subject"], r["check"], r["metric"]): r
        for r in data.rows
        if r["tier"] == "durability" and not r["paired_with"] and r["status"] == "ok"
    }
    rows: dict[tuple[str, str], list[str]] = {}
    for _, check, metric in found:
        kind, _, strength = metric.partition("@")
        if kind == "presence" and strength and (strength != "none" or check == "relearning"):
            rows.setdefault(("no attack", "") if strength == "none" else (check, strength), [])
    table = []
    for check, strength in sorted(rows, key=lambda k: (k[0] != "no attack", k)):
        cells = []
        for subject in subjects:
            at = ("relearning", "none") if check == "no attack" else (check, strength)
            value = found.get((subject, at[0], f"presence@{at[1]}"))
            excess = found.get((subject, at[0], f"excess@{at[1]}"))
            shown = "-" if value is None else f"{value['value']:.2f}"
            if excess is not None and not subject.startswith("oracle"):
                error = "" if excess["se"] is None else f", SE {excess['se']:.2f}"
                shown += f" (excess {excess['value']:+.2f}{error})"
            cells.append(shown)
        table.append({"attack": f"{check} {strength}".strip(), "cells": cells})
    verdicts = [{"trial": n, "text": v["sentence"]} for n, v in data.front.get("verdicts", {}).items()]
    gaps = [f"{name}: {why}." for name, why in data.front.get("attacks_without_verdict", {}).items()]
    return {"subjects": subjects, "rows": table, "verdicts": verdicts, "gaps": gaps}


def _flattery(objective: str, gap: dict[str, Any]) -> str:
    if gap["gap"] is None:
        return f"{objective}: fewer than two audited candidates say nothing about the search's optimism."
    rank = "not defined" if gap["rank_correlation"] is None else f"{gap['rank_correlation']:.2f}"
    return (
        f"{objective}: audit minus search {gap['gap']:+.3f} on average ({gap['lo']:+.3f} to {gap['hi']:+.3f}, n = {gap['n']}); "
        f"rank correlation {rank}."
    )


def _with_error(p: FrontRow, objective: Objective) -> str:
    return f"{p.value(objective):.3f} ({p.se(objective):.3f})"


def _delta(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:+.3g}" + ("" if row["lo"] is None else f" ({row['lo']:.3g} to {row['hi']:.3g})")
