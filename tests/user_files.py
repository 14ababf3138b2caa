"""Pictures, captions and prompts, written as users have them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tiny import LATENT

from raysweep.tasks.prompts import PromptFile, PromptGrid
from raysweep.tasks.sources import (
    FolderSource,
    ParquetSource,
    ShardSource,
)

KINDS = ("cat", "dog", "fox")
# long enough for the prompts, whose words it spells letter by letter
LONG = LATENT | {"text_encoder": LATENT["text_encoder"] | {"max_position_embeddings": 32}}
CAPTIONS = {"cat": "a cat on a mat", "dog": "A DOG in the sun", "fox": "a quick fox"}


def picture(number: int, size: int = 12) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def encoded(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture(number).save(out, kind)
    return out.getvalue()


def labelled(count: int, start: int = 0) -> list[tuple[int, str]]:
    return [(start + i, KINDS[i % 3]) for i in range(count)]


def write_folder(folder: Path, rows: list[tuple[int, str]], captions: str = "txt") -> FolderSource:
    lines = []
    for number, kind in rows:
        path = folder / kind / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
        if captions == "txt":
            path.with_suffix(".txt").write_text(CAPTIONS[kind] + "\n")
        lines.append(json.dumps({"file_name": f"{kind}/{path.name}", "text": CAPTIONS[kind]}))
    if captions == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return FolderSource(folder=folder)


def write_parquet(path: Path, rows: list[tuple[int, str]]) -> ParquetSource:
    """As the Hugging Face hub keeps images: a struct of bytes and path."""
    images = [{"bytes": encoded(n, "JPEG"), "path": f"{n}.jpg"} for n, _ in rows]
    table = pa.table({"image": images, "text": [CAPTIONS[k] for _, k in rows], "kind": [k for _, k in rows]})
    pq.write_table(table, path, row_group_size=4)
    return ParquetSource(parquet=str(path), caption="text", label="kind")


def write_shards(folder: Path, rows: list[tuple[int, str]]) -> ShardSource:
    """As img2dataset writes them."""
    folder.mkdir(exist_ok=True)
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as tar:
            for n, kind in rows[shard::2]:
                tar.write({"__key__": f"{n:09}", "jpg": encoded(n, "JPEG"), "txt": CAPTIONS[kind], "cls": kind})
    return ShardSource(shards=str(folder / "{00000..00001}.tar"), label="cls")


def write_prompts(folder: Path) -> tuple[PromptFile, PromptGrid]:
    rows = [{"text": CAPTIONS[k], "animal": k} for k in KINDS] + [{"text": "a wolf", "animal": "wolf"}]
    (folder / "p.json").write_text(json.dumps(rows))
    grid = PromptGrid(template="a {mood} {animal}", slots={"mood": ("calm", "wild"), "animal": KINDS}, label="animal")
    return PromptFile(file=folder / "p.json", prompt="text", label="animal"), grid
