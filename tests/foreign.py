"""A third-party package with a method, an evaluator, an attack and a task, as pip installs one."""

from __future__ import annotations

from pathlib import Path

POINTS = """
[raysweep.methods]
nudge = oddments.method:Nudge
[raysweep.evaluators]
brightness = oddments.check:Brightness
brittle = oddments.check:Brittle
planted = oddments.attack:Planted
[raysweep.tasks]
patches = oddments.task:Patches
"""

FILES = {
    "__init__.py": "",
    "method.py": '''
from methods.neggrad import NegGrad


class Nudge(NegGrad):
    """Gradient ascent, by another name."""

    name = "nudge"
    space = {"fixed": {"batch_size": 16}, "space": {"steps": {"logint": [2, 4]}}}
''',
    "numbers.py": "SCALE = 1.0\n",
    "check.py": '''
import numpy as np

from evaluators.base import Evaluator, Metric
from oddments.numbers import SCALE


class Brightness(Evaluator):
    """How bright samples are."""

    name = "brightness"
    directions = {"mean": "target"}
    needs = "nothing"
    cost = "the shared samples"

    def scores(self, subject):
        return {"mean": SCALE * subject.samples()[0].double().flatten(1).mean(1).numpy()}

    def values(self, scores, subject):
        return {"mean": float(scores["mean"].mean())}

    def rows(self, scores, subject, replicates):
        value = self.values(scores, subject)["mean"]
        return [Metric.jackknife("mean", value, len(scores["mean"]), replicates["mean"], over="samples")]


class Brittle(Brightness):
    """The same check, which fails on oracles."""

    name = "brittle"

    def scores(self, subject):
        if any(peer is subject for name, peer in subject.peers.items() if name.startswith("oracle")):
            raise RuntimeError("oracles break it")
        return super().scores(subject)
''',
    "attack.py": '''
import numpy as np

from evaluators.durability import Durability


class Planted(Durability):
    """Reports the forgotten data in every model except the oracles."""

    name = "planted"
    reach = "input"
    cost = "nothing"

    def attacks(self, subject):
        def found(s):
            oracle = any(peer is s for name, peer in s.peers.items() if name.startswith("oracle"))
            return np.zeros(20) if oracle else np.ones(20)

        return {"at once": found}
''',
    "task.py": '''
from dataclasses import replace
from typing import Literal

from pydantic import Field

from raysweep.tasks.base import TaskSettings


class Patches(TaskSettings):
    """Forget a patch of the other photograph."""

    name: Literal["patches"] = "patches"
    base_steps: int = Field(70, ge=1, description="steps of base and oracles")

    def build(self):
        from raysweep.tasks.digits import PictureTask

        task = PictureTask(photograph="china.jpg", base_steps=self.base_steps, seed=self.seed).build()
        return replace(task, name=self.name, views=(*task.views, "brittle.mean"))
''',
}


def install(folder: Path, files: dict[str, str] = FILES, points: str = POINTS, name: str = "oddments") -> Path:
    """Writes the package and its installation record into a folder for `sys.path`; returns the folder."""
    package, info = folder / name, folder / f"{name}-1.5.dist-info"
    for made in (package, info):
        made.mkdir(parents=True)
    for file, text in files.items():
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(points)
    (info / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files) + f"{name}-1.5.dist-info/METADATA,,\n")
    return folder
