"""Draws images of prompts with a text-to-image model, into folders that a task can read as its forget set.

Some experiments forget what the model itself draws: SISS (arXiv:2503.01034) samples a memorised caption and labels the images by
a k-means of two clusters on pixels; SLUG's release (arXiv:2407.11867) draws pictures of a character.
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
from raysweep.tasks.prompts import PromptRow

AT_ONCE = 8  # images that are drawn and held at once
MEMORISED, OTHER = "memorised", "other"


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: `count` per folder, in `steps` sampler steps with classifier-free `guidance`.

    An image's noise depends only on `seed`, its prompt, and how often that prompt was drawn before it.
    """

    count: int
    seed: int
    steps: int
    guidance: float


def folder_of(prompt: str) -> str:
    """The folder name for a prompt or a label; a task reads it as the images' label."""
    return re.sub(r"[^\w ,.'-]+", "_", prompt).strip(" .")[:100] or "_"


def by_prompt(prompts: Sequence[str]) -> dict[str, list[str]]:
    """Folder -> prompts, with one folder per prompt; raises ValueError if two prompts would share a folder."""
    return _folders([(folder_of(prompt), prompt, prompt) for prompt in prompts])


def by_label(rows: Sequence[PromptRow]) -> dict[str, list[str]]:
    """Folder -> prompts, with one folder per label."""
    return _folders([(folder_of(row.label), row.label, row.prompt) for row in rows])


def _folders(rows: Sequence[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Folder -> prompts, from rows of (folder, the prompt or label it is named after, prompt)."""
    names: dict[str, str] = {}
    folders: dict[str, list[str]] = {}
    for folder, name, prompt in rows:
        if names.setdefault(folder, name) != name:
            raise ValueError(f"{names[folder]!r} and {name!r} would share the folder {folder!r}")
        folders.setdefault(folder, []).append(prompt)
    return folders


def draw(
    model: Any, folders: dict[str, list[str]], drawing: Drawing, out: Path, tick: Callable[[int, int], None]
) -> None:
    """Writes OUT/FOLDER/NUMBER.png for the prompts of each folder in turn, and beside each image its prompt as text.

    tick: called after each image with (images done, images in all).
    """
    done = 0
    for name, prompts in folders.items():
        (out / name).mkdir(parents=True)
        for number, (prompt, image) in enumerate(_images(model, prompts, drawing)):
            image.save(out / name / f"{number:05}.png")
            (out / name / f"{number:05}.txt").write_text(prompt, encoding="utf-8")
            done += 1
            tick(done, len(folders) * drawing.count)


def _images(model: Any, prompts: list[str], drawing: Drawing) -> Iterator[tuple[str, Image.Image]]:
    """Yields `drawing.count` pairs of prompt and image; the prompts take turns."""
    rows = [(prompts[n % len(prompts)], n // len(prompts)) for n in range(drawing.count)]
    for start in range(0, drawing.count, AT_ONCE):
        part = rows[start : start + AT_ONCE]
        seeds = torch.cat([row_seeds(derive_seed("draw", drawing.seed, prompt), n, 1) for prompt, n in part])
        cond = model.tokens([prompt for prompt, _ in part]).to(model.device)
        x = model.sample(cond, seeds, drawing.steps, drawing.guidance, batch=AT_ONCE)
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        yield from ((prompt, Image.fromarray(p)) for (prompt, _), p in zip(part, pixels, strict=True))


@dataclass(frozen=True)
class Cluster:
    """One of the two clusters of images; spread: root mean square distance of its pixels, 0 to 255, from its mean image."""

    name: str
    images: int
    spread: float


def sort_in_two(folder: Path) -> tuple[Cluster, Cluster]:
    """Replaces a folder of images by the folders `memorised` and `other`, the two clusters of a k-means on pixels.

    `memorised` is the cluster with the smaller spread. Raises ValueError for fewer than four images, or if all are the same.
    """
    from sklearn.cluster import KMeans

    files = sorted(folder.glob("*.png"))
    if len(files) < 4:
        raise ValueError(f"{folder}: {len(files)} images are too few to tell two kinds of them")
    pixels = np.stack([np.asarray(Image.open(f), dtype=np.float32).ravel() for f in files])
    if not pixels.std(0).any():
        raise ValueError(f"{folder}: all images are the same")
    label = KMeans(2, n_init=20, random_state=0).fit(pixels).labels_
    spread = [float(np.sqrt(np.square(pixels[label == k] - pixels[label == k].mean(0)).mean())) for k in (0, 1)]
    tightest = int(np.argmin(spread))
    hidden = folder.rename(folder.with_name(f".{folder.name}"))  # the folder itself may be called "other"
    clusters = []
    for name, k in ((MEMORISED, tightest), (OTHER, 1 - tightest)):
        target = folder.parent / name
        target.mkdir()
        for file in (f for f, cluster in zip(files, label, strict=True) if cluster == k):
            for part in (file.name, file.with_suffix(".txt").name):
                (hidden / part).rename(target / part)
        clusters.append(Cluster(name, int((label == k).sum()), spread[k]))
    hidden.rmdir()
    return clusters[0], clusters[1]


def device() -> torch.device:
    """The device that draws fastest: CUDA, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
