"""The variables of a report's template: everything that its page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysweep.config import presets
from raysweep.config.schema import Sweep
from raysweep.report import figures, tables
from raysweep.report.answer import (
    answer,
    answer_table,
    fresh_material,
    how_trials_ended,
    noise_floor,
    not_tested,
    other_picks,
    search_optimism,
    unfinished,
)
from raysweep.report.data import ReportData
from raysweep.report.glossary import GLOSSARY
from raysweep.report.pictures import Strips, strips
from raysweep.results.profile import Line, check_table, phase_table, whole
from raysweep.rundir import Manifest
from raysweep.tasks.records import lines_of

LINES = 50  # in a list of what failed


def page_context(data: ReportData) -> dict[str, Any]:
    """Everything that the template shows, as text and tables."""
    best_trial = data.front["best"]["trial"] if data.front else None
    best = next((p for p in data.candidates() if p.trial == best_trial), None)
    absent = [r for r in data.rows if r["status"] != "ok" and not r["paired_with"]]
    incomplete = data.manifest.get("incomplete", [])
    complete = not incomplete and not any(r["status"] == "failed" for r in absent)
    groups = strips(data)
    badge, lines = unfinished(data)
    return {
        "name": data.sweep.name,
        "preset": _preset(data.sweep),
        "manifest": data.manifest,
        "badges": [text for text in (badge, "" if complete else "INCOMPLETE") if text],
        "answer": [*lines, *answer(data, best)],
        "answer_table": answer_table(data, best),
        "glossary": GLOSSARY,
        "sections": _sections(data, groups),
        "membership": data.membership,
        "single": data.single,
        "audited": bool(data.front),
        "fresh_material": fresh_material(data),
        "searched": any(t.is_complete for t in data.trials),
        "hypervolume": _hypervolume(data),
        "probe_hypervolume": f"{data.front['probe_hypervolume']:.3f}" if data.front else "-",
        "front_lines": tables.front_lines(data),
        "method_lines": tables.method_lines(data),
        "picks": [line for line in (noise_floor(data), *other_picks(data)) if line],
        "views": tables.view_lines(data),
        "sheets": tables.sheets(data),
        "attacks": tables.attacks(data),
        "optimism": search_optimism(data),
        "strips": groups,
        "data": [line for account in data.manifest.get("data", ()) for line in lines_of(account)],
        "failures": tables.failure_lines(data),
        "trials": how_trials_ended(data),
        "incomplete": _first(incomplete, "manifest.json"),
        "absent": sorted({(r["check"], r["status"], r["reason"]) for r in absent}),
        "left_out": data.left_out,
        "drawn": figures.drawn_in_words(data),
        "tables": data.tables,
        "untested": not_tested(data),
        "config": data.sweep.recipe(),
        "versions": sorted(data.manifest["versions"].items()) + _plugins(data.manifest),
        "commit": ", resumed at ".join(data.commits),
        "command": f"raysweep run {data.sweep.name}.yaml",
        "useful": _useful(data.profile),
        "profile": [table for table in (phase_table(data.profile), check_table(data.profile)) if table],
    }


def _first(lines: Sequence[str], file: str) -> list[str]:
    """The first `LINES` lines, and how many more are in a file of the run."""
    more = len(lines) - LINES
    return [*lines[:LINES], *([f"{more} more, in {file}"] if more > 0 else [])]


def _hypervolume(data: ReportData) -> str:
    if "hypervolume" not in data.front:
        return "-"
    volume = data.front["hypervolume"]
    return f"{volume['value']:.3f} (95 % interval {volume['lo']:.3f} to {volume['hi']:.3f})"


def _useful(profile: Sequence[Line]) -> str:
    """How long the run took, and the share of useful work; "" for a run without a profile."""
    run = whole(profile)
    if run is None:
        return ""
    took = f"Until this report the run took {run.seconds:.0f} s"
    if run.busy is None:
        return f"{took}; the share of useful work is not known, because its workers were isolated (train.executor)."
    return f"{took}, and {run.busy:.0%} of the time of its CPUs, or of its GPUs if it had any, went to training and audits."


def _plugins(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, package) of what other packages provide."""
    return [(name, f"external, {package}") for name, package in sorted(manifest.get("plugins", {}).items())]


def _preset(sweep: Sweep) -> str:
    """The paper's experiment and its scale, in words; "" if none."""
    text = ""
    if sweep.preset in presets.names():
        about = presets.about(sweep.preset)
        text = f"{about.title}, after {about.paper}. "
    if sweep.scale == "tiny":
        text += "At scale tiny: on miniatures of its models and data, which say nothing about the paper's figures."
    return text


def _sections(data: ReportData, groups: Sequence[Strips]) -> list[tuple[str, str]]:
    """(anchor, name) of the sections that the page has."""
    sections = {
        "front": ("Front", bool(data.front)),
        "strips": ("Pictures", bool(groups)),
        "search": ("Search and audit", bool(data.front)),
        "methods": ("Methods", True),
        "effects": ("Hyperparameters", any(t.is_complete for t in data.trials)),
        "sheets": ("Audit sheets", bool(data.subjects)),
        "durability": ("Under attack", bool(data.front)),
        "membership": ("Membership", data.membership),
        "gaps": ("Failures and gaps", True),
        "glossary": ("Terms", True),
        "provenance": ("Provenance", True),
    }
    return [(anchor, name) for anchor, (name, is_shown) in sections.items() if is_shown]
