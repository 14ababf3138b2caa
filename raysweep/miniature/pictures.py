"""Pictures of scikit-learn's scans of digits: digits are the classes, tints the styles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

TINTS = {"plain": (1.0, 1.0, 1.0), "inverted": (-1.0, -1.0, -1.0), "red": (1.0, 0.2, 0.2), "blue": (0.2, 0.4, 1.0)}
Picture = tuple[Image.Image, int, str]  # image, digit, style


def pictures(
    size: int, images: int, styles: Sequence[str] = ("plain",), digits: Sequence[int] = tuple(range(10)), skip: int = 0
) -> list[Picture]:
    """`images` colour pictures of each digit in each style, size x size, from the scans after the first `skip` of each digit."""
    x, labels = _scans()
    rows = []
    for style in styles:
        for digit in digits:
            index = np.flatnonzero(labels == digit)[skip : skip + images]
            if len(index) < images:
                raise ValueError(f"there are only {int((labels == digit).sum())} scans of the digit {digit}")
            rows += [(_tinted(x[i], style, size), digit, style) for i in index]
    return rows


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32) / 8 - 1, data.target


def _tinted(scan: np.ndarray, style: str, size: int) -> Image.Image:
    """A scan (8, 8) in [-1, 1] as a colour picture."""
    pixels = np.stack([scan * tint for tint in TINTS[style]], -1)
    image = Image.fromarray(np.uint8(np.round((pixels + 1) * 127.5)))
    return image.resize((size, size), Image.Resampling.BILINEAR)


def tensors(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as (n, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2) / 127.5 - 1).contiguous()
