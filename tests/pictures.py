"""Small pictures on disk, and the records that a source reads from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from PIL import Image

from raysweep.tasks.records import Tally
from raysweep.tasks.sampling import pixels

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(number: int, size: int = 8) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def encoded(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture(number).save(out, kind)
    return out.getvalue()


def write(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


def read(source, required=()):
    """(records with pixels, tally) of a pass."""
    tally = Tally()
    return list(pixels(source, (3, 8, 8), tally, required)), tally


def keys_of(source):
    return [record.key for record, _ in read(source)[0]]
