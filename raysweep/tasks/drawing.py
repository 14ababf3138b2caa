"""Images that a text-to-image model draws for prompts, as folders that a task reads: what an experiment forgets may be nothing else.

SISS (arXiv:2503.01034) takes samples of a memorised caption and labels them by a k-means of two clusters on pixels; SLUG's release
(arXiv:2407.11867) takes pictures of a character that the model draws itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raysweep.models.noise import row_seeds
from raysweep.storage.seeds import derive_seed

AT_ONCE = 8  # images in memory and on the device
MEMORISED, OTHER = "memorised", "other"


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: `count` per folder, each from a seed of its own that `seed`, its prompt and how often that was drawn
    before decide."""

    count: int
    seed: int
    steps: int
    guidance: float


def folder_of(prompt: str) -> str:
    """The name of a prompt's folder, or of a label's, which a task takes for the label."""
    return re.sub(r"[^\w ,.'-]+", "_", prompt).strip(" .")[:100] or "_"


def by_prompt(prompts: Sequence[str]) -> dict[str, list[str]]:
    """A folder for each prompt; raises ValueError for two of one name."""
    return _folders([(folder_of(prompt), prompt, prompt) for prompt in prompts])


def by_label(rows: Sequence[tuple[str, str, str | None]]) -> dict[str, list[str]]:
    """A folder for each label of (prompt, label, ...), as `Prompts.rows` gives them, with all of its prompts."""
    return _folders([(folder_of(label), label, text) for text, label, *_ in rows])


def _folders(rows: Sequence[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Folder -> prompts, of (folder, what it is named after, prompt)."""
    named: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for folder, name, prompt in rows:
        if named.setdefault(folder, name) != name:
            raise ValueError(f"{named[folder]!r} and {name!r} would share the folder {folder!r}")
        found.setdefault(folder, []).append(prompt)
    return found


def draw(model: Any, wanted: dict[str, list[str]], how: Drawing, out: Path, tick: Callable[[int, int], None]) -> None:
    """Writes OUT/FOLDER/NUMBER.png for the prompts of each folder in turn, and beside each image its prompt."""
    done = 0
    for name, prompts in wanted.items():
        (out / name).mkdir(parents=True)
        for number, (prompt, image) in enumerate(_images(model, prompts, how)):
            image.save(out / name / f"{number:05}.png")
            (out / name / f"{number:05}.txt").write_text(prompt, encoding="utf-8")
            done += 1
            tick(done, len(wanted) * how.count)


def _images(model: Any, prompts: list[str], how: Drawing) -> Iterator[tuple[str, Image.Image]]:
    rows = [(prompts[n % len(prompts)], n // len(prompts)) for n in range(how.count)]
    for start in range(0, how.count, AT_ONCE):
        part = rows[start : start + AT_ONCE]
        seeds = torch.cat([row_seeds(derive_seed("draw", how.seed, prompt), n, 1) for prompt, n in part])
        cond = model.tokens([prompt for prompt, _ in part]).to(model.device)
        x = model.sample(cond, seeds, how.steps, how.guidance, batch=AT_ONCE)
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        yield from ((prompt, Image.fromarray(p)) for (prompt, _), p in zip(part, pixels, strict=True))


@dataclass(frozen=True)
class Cluster:
    """One of two kinds of images. spread: root mean square distance of its pixels, 0 to 255, from their mean image."""

    name: str
    images: int
    spread: float


def sort_in_two(folder: Path) -> tuple[Cluster, Cluster]:
    """Puts folders `memorised` and `other` in the place of a folder of images, by a k-means of two clusters on pixels: memorised
    is the one whose images are the more alike. Raises ValueError if there are fewer than four, or all are the same."""
    from sklearn.cluster import KMeans

    files = sorted(folder.glob("*.png"))
    if len(files) < 4:
        raise ValueError(f"{folder}: {len(files)} images are too few to tell two kinds of them")
    pixels = np.stack([np.asarray(Image.open(f), dtype=np.float32).ravel() for f in files])
    if not pixels.std(0).any():
        raise ValueError(f"{folder}: all images are the same")
    label = KMeans(2, n_init=20, random_state=0).fit(pixels).labels_
    spread = [float(np.sqrt(np.square(pixels[label == k] - pixels[label == k].mean(0)).mean())) for k in (0, 1)]
    alike = int(np.argmin(spread))
    found, aside = [], folder.rename(folder.with_name(f".{folder.name}"))  # a prompt may be "other", too
    for name, k in ((MEMORISED, alike), (OTHER, 1 - alike)):
        place = folder.parent / name
        place.mkdir()
        for file in (f for f, own in zip(files, label, strict=True) if own == k):
            for part in (file.name, file.with_suffix(".txt").name):
                (aside / part).rename(place / part)
        found.append(Cluster(name, int((label == k).sum()), spread[k]))
    aside.rmdir()
    return found[0], found[1]


def device() -> torch.device:
    """Where drawing is fastest."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
