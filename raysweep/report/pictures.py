"""Strips of pictures for the report as PNG data addresses. Sensitive ones are veiled in their pixels, not by style alone."""

from __future__ import annotations

import base64
import io
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from raysweep.report.data import ReportData

ZOOM = 5  # at most; small pictures are enlarged
SIDE = 160  # pixels, up to which they are
CELLS = 4  # per side of a veiled picture

TITLES = {
    "strip.noised": "the forgotten picture, noised (what every model starts from)",
    "strip.rebuilt": "rebuilt from the same noised picture",
    "strip.forgotten": "generated under the forgotten label, same seeds",
    "strip.samples": "generated from the same seeds",
}


def strips(data: ReportData) -> list[dict[str, Any]]:
    """One group per kind of picture: {"title", "sensitive", "rows"}, a row per subject: {"subject", "image", "veiled"}.

    In a sensitive task every group is: a base may draw what it must forget from any seed, and noise hides little of it.
    """
    order = sorted(data.subjects, key=lambda name: (not name.startswith(("base", "oracle")), name == "destroyed"))
    groups = [_group("what must be forgotten", [("original", data.original)], data.sensitive)]
    for key, title in TITLES.items():
        found = [(name, data.scores[(name, key)]) for name in order if (name, key) in data.scores]
        rows = [(subject, images.reshape(-1, *data.shape)) for subject, images in found]
        if key == "strip.noised":
            rows = [("input", images) for _, images in rows[:1]]
        if rows:
            groups.append(_group(title, rows, data.sensitive))
    return groups


def _group(title: str, rows: list[tuple[str, np.ndarray]], sensitive: bool) -> dict[str, Any]:
    made = [
        {"subject": subject, "image": png(images), "veiled": png(veiled(images)) if sensitive else ""}
        for subject, images in rows
    ]
    return {"title": title, "sensitive": sensitive, "rows": made}


def veiled(images: np.ndarray) -> np.ndarray:
    """Images (n, C, H, W) as mosaics of at most `CELLS` cells per side, each the mean of at least 4 pixels per side.

    What it hides is not in the result, whatever shows it: a screen, a print, a reader without style sheets.
    """
    mosaic = np.empty_like(images)
    for rows in _cells(images.shape[2]):
        for columns in _cells(images.shape[3]):
            mosaic[:, :, rows, columns] = images[:, :, rows, columns].mean(axis=(2, 3), keepdims=True)
    return mosaic


def _cells(side: int) -> list[slice]:
    """A side cut into the mosaic's cells."""
    edges = np.linspace(0, side, max(1, min(CELLS, side // 4)) + 1).round().astype(int)
    return [slice(int(low), int(high)) for low, high in pairwise(edges)]


def png(images: np.ndarray) -> str:
    """Images (n, C, H, W) in [-1, 1] side by side, small ones enlarged, as a data address."""
    tiles = [np.pad(np.clip((im + 1) * 127.5, 0, 255), ((0, 0), (0, 0), (0, 1)), constant_values=255) for im in images]
    row = np.concatenate(tiles, axis=2).astype(np.uint8)
    pixels = row[0] if row.shape[0] == 1 else row.transpose(1, 2, 0)
    image = Image.fromarray(pixels)
    zoom = max(1, min(ZOOM, SIDE // images.shape[2]))
    out = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
