"""The README of an exported candidate: what it is, what its audit found, and what that does not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from raysweep.models.diffusion import SAMPLER
from raysweep.models.folders import INDEX, read_json
from raysweep.models.song import SongUNet
from raysweep.registry import Family, resolve
from raysweep.results.choice import MEANING, told
from raysweep.results.front_row import FrontRow
from raysweep.rundir import RunDir


def page(folder: RunDir, card: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read. card: the candidate's own card."""
    task = json.loads((folder.task / "task.json").read_text())
    family: Family = resolve("family", task["family"])
    front = json.loads(folder.front_json.read_text()) if folder.front_json.is_file() else {}
    point = next((FrontRow(**p) for p in front.get("points", ()) if p["trial"] == card["trial"]), None)
    verdict = front.get("verdicts", {}).get(card["trial"], {}).get("sentence")
    standing = front.get("standing", {}).get(card["trial"])
    audited = (
        f"{told(point, 'residue').capitalize()}: {MEANING['residue']}. {told(point, 'damage').capitalize()}: {MEANING['damage']}."
        if point
        else "This candidate was not audited: only the search has probed it."
    )
    candidate = folder.candidates / card["trial"]
    own = (candidate / SAMPLER).is_file()
    sampler = f" It is drawn from by a sampler of its own (`{SAMPLER}`), which raysweep knows." if own else ""
    matter = {"library_name": family.library, "tags": ["machine-unlearning", "raysweep", card["method"]]}
    thing = (
        task["class_names"][task["forget_class"]] if task["class_names"] and task["forget_class"] is not None else None
    )
    what = (
        f"{task['kind']} {thing!r}"
        if thing
        else {"points": "images"}.get(task["kind"], f"class {task['forget_class']}")
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(matter, sort_keys=True).strip(),
            "---",
            f"# {card['trial']}: {task['name']} unlearned by {card['method']}",
            "",
            f"Made by raysweep from the base model with hash `{card['base_digest']}`, to forget {what} of the task "
            f"{task['name']} (hash `{card['task_digest']}`). Weights: hash `{card['outcome']['digest']}`.{sampler}",
            "",
            f"    {loading_line(family, candidate)}",
            "",
            "## Settings",
            f"Method `{card['method']}`, seed {card['seed']}"
            + (f", settings of {card['source']}" if card.get("source") else "")
            + ":",
            "",
            *(f"- `{name}`: {value}" for name, value in sorted(card["hyperparameters"].items())),
            "",
            "## What its audit found",
            *([f"By the run's answer this candidate is {standing}.", ""] if standing else []),
            audited,
            "",
            *(
                [f"Under attack: {verdict}."]
                if verdict
                else ["It was not attacked, so whether the forgotten thing comes back is unknown."]
            ),
            "",
            "## Limits",
            "These are figures of the checks that were made, on the task's data, judges and seeds; they are not a proof of erasure. "
            "Adversarial prompts were not tried. Residue counts what is left relative to models retrained without the forgotten "
            "data, so it says nothing about what the base itself knows beyond the task.",
            "",
        ]
    )


def write(folder: RunDir, card: dict[str, Any], out: Path) -> None:
    """Puts the page into an exported folder."""
    (out / "README.md").write_text(page(folder, card), encoding="utf-8")


def loading_line(family: Family, folder: Path) -> str:
    """The line of Python that reads a model folder of a family, which it calls FOLDER."""
    index = folder / INDEX
    entries = read_json(index).items() if index.is_file() else ()
    parts = {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    homes = {"raysweep": SongUNet.__module__}  # libraries whose classes are not importable from their top
    return family.loading.format(**{name: f"{homes.get(lib, lib)}.{kind}" for name, (lib, kind) in parts.items()})
