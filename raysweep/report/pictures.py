"""Strips of pictures as data addresses. Sensitive ones are veiled in their pixels, not by a style sheet alone."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from raysweep.report.data import ReportData

ZOOM = 5  # largest enlargement of small pictures
SIDE = 160  # pixels up to which small pictures are enlarged, and to which large ones are reduced
QUALITY = 90  # of the JPEG files of reduced pictures
CELLS = 4  # per side of a veiled picture

TITLES = {
    "strip.noised": "the forgotten picture, noised (what every model starts from)",
    "strip.rebuilt": "rebuilt from the same noised picture",
    "strip.forgotten": "generated under the forgotten label, same seeds",
    "strip.samples": "generated from the same seeds",
}


@dataclass(frozen=True)
class Strip:
    """Pictures of one model side by side, as data addresses. veiled: the same as a mosaic; "" if not sensitive."""

    subject: str
    image: str
    veiled: str


@dataclass(frozen=True)
class Strips:
    """One kind of picture, a strip per model."""

    title: str
    sensitive: bool
    rows: list[Strip]


def strips(data: ReportData) -> list[Strips]:
    """The report's pictures, a group per kind.

    In a sensitive task every group is sensitive: a base may draw what it must forget from any seed, and noise hides little.
    """
    order = sorted(data.subjects, key=lambda name: (not name.startswith(("base", "oracle")), name == "destroyed"))
    groups = [_group("what must be forgotten", [("original", data.original)], data.sensitive)]
    for score, title in TITLES.items():
        rows = [
            (subject, data.scores[subject, score].reshape(-1, *data.shape))
            for subject in order
            if (subject, score) in data.scores
        ]
        if score == "strip.noised":  # the same for every model
            rows = [("input", images) for _, images in rows[:1]]
        if rows:
            groups.append(_group(title, rows, data.sensitive))
    return groups


def _group(title: str, rows: list[tuple[str, np.ndarray]], sensitive: bool) -> Strips:
    return Strips(
        title,
        sensitive,
        [Strip(name, address(images), address(veiled(images)) if sensitive else "") for name, images in rows],
    )


def veiled(images: np.ndarray) -> np.ndarray:
    """Images (n, C, H, W) as mosaics of at most `CELLS` cells per side, each the mean of at least 4 pixels per side.

    The details are not in the result, so they stay hidden in print and in readers that ignore style sheets.
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


def address(images: np.ndarray) -> str:
    """Images (n, C, H, W) in [-1, 1] side by side, as a data address.

    Small ones are enlarged, pixel by pixel. Large ones are reduced, because a page of them would be too large to open; the audit's
    scores keep them whole.
    """
    tiles = [np.pad(np.clip((im + 1) * 127.5, 0, 255), ((0, 0), (0, 0), (0, 1)), constant_values=255) for im in images]
    row = np.concatenate(tiles, axis=2).astype(np.uint8)
    image = Image.fromarray(row[0] if row.shape[0] == 1 else row.transpose(1, 2, 0))
    side, out = max(images.shape[2:]), io.BytesIO()
    if side > SIDE:
        size = (round(image.width * SIDE / side), round(image.height * SIDE / side))
        image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY)
        kind = "jpeg"
    else:
        zoom = max(1, min(ZOOM, SIDE // images.shape[2]))
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(
            out, "PNG", optimize=True
        )
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
