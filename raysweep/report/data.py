"""Gathers what the report shows from a run's tables. All arithmetic and wording is done here, none in the template."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from raysweep import presets
from raysweep.config import Sweep
from raysweep.informative import caveat
from raysweep.results import trial_table
from raysweep.rundir import RunDir
from raysweep.store import FRONT, ROWS, SCORES, read_table

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")  # colour-blind safe
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagon", "star-triangle-down")
ZOOM = 5
EASY = 0.2  # the worse objective under which a short front says that the task is easy


@dataclass
class ReportData:
    """A run's tables as plain data, with a colour and a symbol per method."""

    sweep: Sweep
    manifest: dict[str, Any]
    front: dict[str, Any]
    points: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    scores: dict[tuple[str, str], np.ndarray]
    anchors: dict[str, Any]
    styles: dict[str, tuple[str, str]]
    shape: tuple[int, int, int]
    kind: str
    sensitive: bool
    original: np.ndarray

    def candidates(self) -> list[dict[str, Any]]:
        return [p for p in self.points if p["kind"] == "candidate"]

    def metric(self, subject: str, name: str, paired_with: str = "") -> dict[str, Any] | None:
        """One audit row of a subject, or None."""
        for row in self.rows:
            key = f"{row['check']}.{row['metric']}"
            if (row["subject"], key, row["paired_with"], row["tier"]) == (subject, name, paired_with, "audit"):
                return row
        return None


def gather(folder: RunDir) -> ReportData:
    """Reads a finished run; raises StoreError or ConfigError if a part is missing."""
    sweep = folder.sweep()
    front = json.loads(folder.front_json.read_text())
    points = read_table(folder.front_table, FRONT).to_pylist()
    subjects = {p["trial"] for p in points}
    keys = [r for r in read_table(folder.rows, ROWS).to_pylist() if r["subject"] in subjects]
    task = json.loads((folder.task / "task.json").read_text())
    original = load_file(folder.task / "splits.safetensors")["forget.x"][:8]
    styles = {m: (COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, m in enumerate(sweep.methods)}
    return ReportData(
        sweep=sweep,
        manifest=folder.read_manifest(),
        front=front,
        points=points,
        trials=trial_table(folder, f"{sweep.name}-{sweep.digest[:8]}"),
        rows=keys,
        scores=_scores(folder, subjects),
        anchors={t: json.loads(folder.anchors(t).read_text()) for t in ("probe", "audit")},
        styles=styles,
        shape=original.shape[1:],
        kind=task["kind"],
        sensitive=task["sensitive"],
        original=original,
    )


def _preset(sweep: Sweep) -> str:
    """Which paper's experiment this is, and at which scale; "" if none."""
    text = ""
    if sweep.preset in presets.names():
        about = presets.about(sweep.preset)
        text = f"{about.title}, after {about.paper}. "
    if sweep.scale == "tiny":
        text += "At scale tiny: on miniatures of its models and data, which say nothing about the paper's figures."
    return text


def _scores(folder: RunDir, subjects: set[str]) -> dict[tuple[str, str], np.ndarray]:
    """(subject, score) -> array, for what the report draws."""
    table = read_table(folder.scores, SCORES)
    wanted: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    for row in table.to_pylist():
        drawn = row["score"].startswith(("strip.", "loss."))
        if row["tier"] == "audit" and row["subject"] in subjects and drawn:
            wanted.setdefault((row["subject"], row["score"]), []).append((row["unit"], row["values"]))
    return {key: np.array([v for _, v in sorted(units)]) for key, units in wanted.items()}


def page_context(data: ReportData) -> dict[str, Any]:
    """Everything that the template shows, as text and tables."""
    best = next((p for p in data.candidates() if p["trial"] == data.front["recommended"]["trial"]), None)
    volume = data.front["hypervolume"]
    failed = [t for t in data.trials if t["state"] == "FAIL"]
    absent = [r for r in data.rows if r["status"] != "ok" and r["tier"] == "audit" and not r["paired_with"]]
    reasons = sorted({(r["check"], r["status"], r["reason"]) for r in absent})
    return {
        "name": data.sweep.name,
        "preset": _preset(data.sweep),
        "manifest": data.manifest,
        "badges": ["INCOMPLETE"] if any(r["status"] == "failed" for r in absent) else [],
        "answer": _answer(data, best),
        "answer_rows": _answer_rows(data, best),
        "hypervolume": f"{volume['value']:.3f} (95 % {volume['lo']:.3f} to {volume['hi']:.3f})",
        "probe_hypervolume": f"{data.front['probe_hypervolume']:.3f}",
        "front_rows": [_front_row(data, p) for p in data.points],
        "method_rows": _method_rows(data),
        "picks": _picks(data),
        "views": [_view_row(v) for v in data.anchors["audit"]["views"]],
        "sheets": [_sheet(data, p) for p in data.points],
        "attacks": _attacks(data),
        "flattery": [_flattery(name, gap) for name, gap in data.front["search_against_audit"].items()],
        "strips": _strips(data),
        "failures": [{"trial": t["trial"], "reason": t["reason"]} for t in failed],
        "absent": [{"check": c, "status": s, "reason": why} for c, s, why in reasons],
        "untested": untested(data),
        "config": data.sweep.recipe(),
        "versions": sorted(data.manifest["versions"].items()),
        "command": f"raysweep run {data.sweep.name}.yaml",
    }


def untested(data: ReportData) -> list[str]:
    """What nobody should read into this report."""
    attacked = [name for name in data.front["verdicts"] if name in {p["trial"] for p in data.candidates()}]
    others = [p["trial"] for p in data.candidates() if p["trial"] not in attacked]
    lines = [
        "Adversarial prompts were not tried.",
        "Intervals cover the sampling of images and noise, not the retraining of a candidate with another seed.",
        "Candidates were picked for the audit by their probe values; the audit's seeds and judge are fresh, its task is not.",
    ]
    if others:
        lines.append(f"Attacks that might bring the forgotten thing back were not made on {', '.join(others)}.")
    if data.sweep.oracles < 3:
        lines.append(
            f"The oracle is the mean of {data.sweep.oracles} retrained models, too few for an interval on its spread."
        )
    return lines


def _answer(data: ReportData, best: dict[str, Any] | None) -> list[str]:
    if best is None and not data.candidates():
        return ["No candidate was audited."]
    unmet = data.front["unmet"]
    if best is None and unmet and all(unmet.values()):
        missed = sorted({r for reasons in unmet.values() for r in reasons})
        return [
            f"None of the {len(data.candidates())} audited candidates is recommended: none shows, with its whole interval, what "
            f"was required ({'; '.join(missed)})."
        ]
    if best is None:
        return [
            f"None of the {len(data.candidates())} audited candidates is recommended: each has forgotten no more than the "
            "base (residue 1) or is as damaged as a destroyed model (damage 1)."
        ]
    share = data.front["recommended"]["share_of_resamples"]
    members = [p for p in data.candidates() if p["on_front"]]
    settings = ", ".join(f"{k} {_short(v)}" for k, v in json.loads(best["hyperparameters"]).items())
    lines = [
        f"Recommended: {best['trial']} ({settings}), the audited candidate whose worse objective is smallest; it stays the "
        f"choice in {share:.0%} of paired resamples.",
        f"Residue {_pm(best, 'residue')} (0 like a model that never saw the forgotten data, 1 like the base) at damage "
        f"{_pm(best, 'damage')} (0 like the oracle, 1 like a destroyed model).",
        f"{len(members)} of {len(data.candidates())} audited candidates are on the front.",
    ]
    if best["trial"] in data.front["verdicts"]:
        lines.insert(2, f"Under attack: {data.front['verdicts'][best['trial']]['sentence']}.")
    if len(members) <= 2 and max(best["residue"], best["damage"]) < EASY:
        lines.append(
            "The task is easy for the best methods, so the overall front is short; see each method's own front."
        )
    return lines


def _answer_rows(data: ReportData, best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The main numbers of base, recommended candidate and oracles side by side."""
    chosen = [
        "base",
        *([best["trial"]] if best else []),
        *(p["trial"] for p in data.points if p["trial"].startswith("oracle")),
    ]
    wanted = [v["metric"] for v in data.anchors["audit"]["views"]]
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
        cells = [_value(data.metric(subject, name)) for subject in chosen]
        if any(cell != "-" for cell in cells):
            rows.append({"metric": name, "cells": cells})
    return [{"metric": "", "cells": chosen}, *rows]


def _picks(data: ReportData) -> list[str]:
    """Other ways to choose, how stable each is, and what the sweep may claim at all."""
    picks = data.front["picks"]
    if not picks:
        return []
    sure, shown = picks["sure"], picks["forgotten"]
    lines = [
        f"Smallest worse objective: {picks['balanced']['trial']}, chosen in {picks['balanced']['share']:.0%} of paired resamples.",
        f"Knee of the front: {picks['knee']['trial']}, chosen in {picks['knee']['share']:.0%}.",
        f"Least damage among candidates whose residue is at most {sure['limit']} with probability {sure['certain']}: "
        f"{sure['trial'] or 'none is that sure'}.",
        f"Shown to have a residue under {shown['limit']}, with false discoveries over the sweep's candidates held to "
        f"{shown['rate']:.0%}: {', '.join(shown['trials']) or 'none'}.",
    ]
    left = data.front["undecided"]
    if left:
        lines.append(
            f"Still uncertain after {max(p['audits'] for p in data.candidates())} audits: {', '.join(left)} (audit.rounds)."
        )
    return lines


def _front_row(data: ReportData, p: dict[str, Any]) -> dict[str, Any]:
    probe = "-" if p["probe_residue"] is None else f"{p['probe_residue']:.3f} / {p['probe_damage']:.3f}"
    return {
        "trial": p["trial"],
        "method": p["method"] or "anchor",
        "colour": data.styles.get(p["method"], ("#888888", ""))[0],
        "residue": _pm(p, "residue"),
        "damage": _pm(p, "damage"),
        "probe": probe,
        "over": f"{p['over_forgetting']:.3f}",
        "front": {True: "yes", False: "no", None: "-"}[p["on_front"]],
        "own": {True: "yes", False: "no", None: "-"}[p["on_method_front"]],
        "p_dominated": "-" if p["p_dominated"] is None else f"{p['p_dominated']:.2f}",
        "audits": p["audits"] or "-",
    }


def _method_rows(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for method in data.sweep.methods:
        mine = [t for t in data.trials if t["method"] == method]
        ok = [t for t in mine if t["state"] == "COMPLETE"]
        audited = [p for p in data.candidates() if p["method"] == method]
        best = min(audited, key=lambda p: (max(p["residue"], p["damage"]), p["residue"] + p["damage"]), default=None)
        rows.append(
            {
                "method": method,
                "colour": data.styles[method][0],
                "trials": f"{len(ok)} ok, {len(mine) - len(ok)} not",
                "seconds": f"{sum(t['train_s'] or 0 for t in ok):.0f}",
                "audited": len(audited),
                "best": best["trial"] if best else "-",
                "residue": _pm(best, "residue") if best else "-",
                "damage": _pm(best, "damage") if best else "-",
            }
        )
    return rows


def _view_row(view: dict[str, Any]) -> dict[str, Any]:
    return {
        "metric": view["metric"],
        "base": f"{view['base']:.4g}",
        "oracle": f"{view['oracle']:.4g}",
        "used": "yes" if view["informative"] else f"no: {view['reason']}",
    }


def _sheet(data: ReportData, p: dict[str, Any]) -> dict[str, Any]:
    """The audit sheet of a subject: every check with its interval, and its paired differences."""
    rows = []
    for row in data.rows:
        if row["subject"] != p["trial"] or row["tier"] != "audit" or row["paired_with"]:
            continue
        name = f"{row['check']}.{row['metric']}"
        rows.append(
            {
                "metric": name,
                "value": _value(row) if row["status"] == "ok" else row["status"],
                "n": row["n"],
                "interval": "-" if row["lo"] is None else f"{row['lo']:.3g} to {row['hi']:.3g}",
                "how": _how(row, data.kind),
                "to_oracle": _delta(data.metric(p["trial"], name, "oracle")),
                "to_base": _delta(data.metric(p["trial"], name, "base")),
                "direction": row["direction"],
                "status": row["status"],
            }
        )
    note = "over-forgotten: counted as damage" if p["over_forgetting"] > 0.1 and p["kind"] == "candidate" else ""
    return {"trial": p["trial"], "method": p["method"] or "anchor", "note": note, "rows": rows}


def _how(row: dict[str, Any], kind: str) -> str:
    """How the interval was made, or why there is none, and what limits the check."""
    if row["status"] != "ok":
        return row["reason"]
    made = "" if row["interval"] == "none" else row["interval"]
    return "; ".join(filter(None, (made, row["reason"], caveat(kind, f"{row['check']}.{row['metric']}"))))


def _attacks(data: ReportData) -> dict[str, Any]:
    """Presence after each attack by subject, with the excess over the oracles, and the verdicts."""
    subjects = [
        p["trial"] for p in data.points if p["trial"] in {r["subject"] for r in data.rows if r["tier"] == "durability"}
    ]
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
                shown += f" ({excess['value']:+.2f} ± {excess['se']:.2f})"
            cells.append(shown)
        table.append({"attack": f"{check} {strength}".strip(), "cells": cells})
    verdicts = [{"trial": n, "text": v["sentence"]} for n, v in data.front["verdicts"].items()]
    return {"subjects": subjects, "rows": table, "verdicts": verdicts}


def _flattery(objective: str, gap: dict[str, Any]) -> str:
    if gap["gap"] is None:
        return f"{objective}: one candidate says nothing about the search's optimism."
    rank = "not defined" if gap["rank_correlation"] is None else f"{gap['rank_correlation']:.2f}"
    return (
        f"{objective}: audit minus search {gap['gap']:+.3f} on average ({gap['lo']:+.3f} to {gap['hi']:+.3f}, n = {gap['n']}); "
        f"rank correlation {rank}."
    )


def _strips(data: ReportData) -> list[dict[str, Any]]:
    """One row of pictures per subject and kind, as PNG data addresses."""
    titles = {
        "strip.noised": "the forgotten picture, noised (what every model starts from)",
        "strip.rebuilt": "rebuilt from the same noised picture",
        "strip.forgotten": "generated under the forgotten label, same seeds",
        "strip.samples": "generated from the same seeds",
    }
    order = sorted(
        data.points, key=lambda p: (not p["trial"].startswith(("base", "oracle")), p["trial"] == "destroyed")
    )
    original = {"subject": "original", "image": _png(data.original)}
    groups = [{"title": "what must be forgotten", "rows": [original], "sensitive": data.sensitive}]
    for key, title in titles.items():
        rows = []
        for p in order:
            images = data.scores.get((p["trial"], key))
            if images is not None:
                rows.append({"subject": p["trial"], "image": _png(images.reshape(-1, *data.shape))})
        if key == "strip.noised":
            rows = [{"subject": "input", "image": rows[0]["image"]}] if rows else []
        if rows:
            sensitive = data.sensitive and key in ("strip.rebuilt", "strip.forgotten")
            groups.append({"title": title, "rows": rows, "sensitive": sensitive})
    return groups


def _png(images: np.ndarray) -> str:
    """Images (n, C, H, W) in [-1, 1] side by side, enlarged, as a data address."""
    tiles = [np.pad(np.clip((im + 1) * 127.5, 0, 255), ((0, 0), (0, 0), (0, 1)), constant_values=255) for im in images]
    row = np.concatenate(tiles, axis=2).astype(np.uint8)
    pixels = row[0] if row.shape[0] == 1 else row.transpose(1, 2, 0)
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _pm(p: dict[str, Any], key: str) -> str:
    return f"{p[key]:.3f} ± {p[key + '_se']:.3f}"


def _value(row: dict[str, Any] | None) -> str:
    return "-" if row is None or row["value"] is None else f"{row['value']:.3g}"


def _delta(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:+.3g}" + ("" if row["lo"] is None else f" ({row['lo']:.3g} to {row['hi']:.3g})")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
