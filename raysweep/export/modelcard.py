"""The README of an exported candidate: its origin, how to load it, its audit results, and their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from raysweep.auditing.untested import StoredFacts, not_implemented
from raysweep.models import samplers
from raysweep.models.folders import INDEX, read_json
from raysweep.models.song import SongUNet
from raysweep.records import Family
from raysweep.registry import resolve
from raysweep.results.choice import MEANING
from raysweep.results.front_row import OBJECTIVES, FrontRow
from raysweep.rundir import RunDir

LIMITS = (
    "These are figures of the checks that were made, on the task's data, judges and seeds; they are not a proof of erasure. "
    "Residue counts what is left relative to models retrained without the forgotten "
    "data, so it says nothing about the base's knowledge outside the task."
)


def page(folder: RunDir, card: dict[str, Any], model: Path) -> str:
    """Markdown with the front matter that model hubs read. card: the candidate's own card; model: its folder, in its library's layout."""
    task = json.loads((folder.task / "task.json").read_text())
    family: Family = resolve("family", task["family"])
    front = json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}
    matter = {"library_name": family.library, "tags": ["machine-unlearning", "raysweep", card["method"]]}
    sampler = (
        f" raysweep draws its images with the sampler in `{samplers.FILE}`."
        if (model / samplers.FILE).is_file()
        else ""
    )
    source = f", settings of {card['source']}" if card.get("source") else ""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(matter, sort_keys=True).strip(),
            "---",
            f"# {card['trial']}: {task['name']} unlearned by {card['method']}",
            "",
            f"Made by raysweep from the base model with hash `{card['base_digest']}`, to forget {_forgotten(task)} of the task "
            f"{task['name']} (hash `{card['task_digest']}`). Weights: hash `{card['outcome']['digest']}`.{sampler}",
            "",
            f"    {loading_line(family, model)}",
            "",
            "## Settings",
            f"Method `{card['method']}`, seed {card['seed']}{source}:",
            "",
            *(f"- `{name}`: {value}" for name, value in sorted(card["hyperparameters"].items())),
            "",
            "## Audit results",
            *_findings(front, card["trial"]),
            "",
            "## Limits",
            LIMITS,
            "",
            *(f"- {sentence}" for sentence in not_implemented(StoredFacts.of(task))),
            "",
        ]
    )


def _forgotten(task: dict[str, Any]) -> str:
    """The task's forgotten data, in words."""
    index = task["forget_class"]
    if task["class_names"] and index is not None:
        return f"{task['kind']} {task['class_names'][index]!r}"
    return "images" if task["kind"] == "points" else f"class {index}"


def _findings(front: dict[str, Any], trial: str) -> list[str]:
    """Lines on a candidate's place in the answer, its objectives and its verdict under attack, from front.json."""
    standing = front.get("standing", {}).get(trial)
    lines = [f"By the run's answer this candidate is {standing}.", ""] if standing else []
    row = next((FrontRow(**p) for p in front.get("points", ()) if p["trial"] == trial), None)
    if row is None:
        lines.append("This candidate was not audited: only the search has probed it.")
    else:
        lines.append(" ".join(f"{row.in_words(o).capitalize()}: {MEANING[o]}." for o in OBJECTIVES))
    verdict = front.get("verdicts", {}).get(trial, {}).get("sentence")
    unknown = "It was not attacked, so whether the forgotten data come back is unknown."
    return [*lines, "", f"Under attack: {verdict}." if verdict else unknown]


def write(folder: RunDir, card: dict[str, Any], out: Path) -> None:
    """Writes the page into an exported folder."""
    (out / "README.md").write_text(page(folder, card, out), encoding="utf-8")


def loading_line(family: Family, folder: Path) -> str:
    """The line of Python that reads a model folder of a family, which it calls FOLDER."""
    index = folder / INDEX
    entries = read_json(index).items() if index.is_file() else ()
    parts = {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    homes = {"raysweep": SongUNet.__module__}  # libraries whose classes are not importable from their top
    return family.loading.format(**{name: f"{homes.get(lib, lib)}.{kind}" for name, (lib, kind) in parts.items()})
