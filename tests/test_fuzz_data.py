"""For any damage to a data file, each of its records is used or reported, or the source is refused by its name."""

from __future__ import annotations

import csv
import io
import json
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from mutation import answering, bounded, check, mutate_folder, mutated_bytes, mutated_tree, seeds, wrong_of
from PIL import Image

from raysweep.miniature import data
from raysweep.tasks.decoding import flat
from raysweep.tasks.prompts import PromptError, PromptFile
from raysweep.tasks.records import SourceError, Tally, Unreadable
from raysweep.tasks.sources import FolderSource, ParquetSource, ShardSource, TorchvisionSource

pytestmark = pytest.mark.slow
SUFFIXES = (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp")
KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")


def drain(source: FolderSource | ParquetSource | ShardSource | TorchvisionSource) -> tuple[int, Tally]:
    """How many pictures of a source can be used, and its account."""
    tally, used = Tally(), 0
    for record in source.records(tally):
        try:
            pixels = flat(record.open(), 3, lambda note: None)
            assert np.asarray(pixels).shape[2:] == (3,)
            used += 1
        except Unreadable as error:
            tally.skip(str(error), record.key)
    tally.check(source)
    return used, tally


def encoded(number: int) -> bytes:
    out = io.BytesIO()
    size = (12, 12, 3) if number % 4 else (12, 12)
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8))
    image.save(out, KINDS[number % 6])
    return out.getvalue()


def tree(folder: Path, count: int, captions: str) -> FolderSource:
    lines = []
    for n in range(count):
        file = folder / "abc"[n % 3] / f"{n:03}{SUFFIXES[n % 6]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(n))
        lines.append({"file_name": f"{file.parent.name}/{file.name}", "text": f"picture {n}"})
        if captions == "txt":
            file.with_suffix(".txt").write_text(f"picture {n}")
    if captions == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if captions == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "text"], *(line.values() for line in lines)])
    return FolderSource(folder=folder)


def parquet(folder: Path, count: int) -> ParquetSource:
    folder.mkdir()
    for part in range(2):
        numbers = range(part, count, 2)
        images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
        table = pa.table(
            {"image": images, "text": [f"picture {n}" for n in numbers], "label": [n % 3 for n in numbers]}
        )
        pq.write_table(table, folder / f"train-0000{part}-of-00002.parquet", row_group_size=8)
    return ParquetSource(parquet=str(folder), caption="text", label="label")


def shards(folder: Path, count: int) -> ShardSource:
    folder.mkdir()
    for part in range(2):
        with webdataset.TarWriter(str(folder / f"{part}.tar")) as tar:
            for n in range(part, count, 2):
                suffix = SUFFIXES[n % 6][1:]
                tar.write({"__key__": f"{n:05}", suffix: encoded(n), "txt": f"picture {n}", "cls": str(n % 3)})
    return ShardSource(shards=str(folder / "{0..1}.tar"), label="cls")


def torchvision(folder: Path, count: int, name: str) -> TorchvisionSource:
    if name == "CIFAR10":
        data.cifar10(folder, count // 10)  # of each class
    else:
        data.idx(folder, name, count // 10)
    return TorchvisionSource(torchvision=name, root=folder, checksums=False)


SOURCES = {
    "folder with NAME.txt": partial(tree, captions="txt"), "folder with metadata.jsonl": partial(tree, captions="jsonl"),
    "folder with metadata.csv": partial(tree, captions="csv"), "Parquet": parquet, "tars": shards,
    "CIFAR-10": partial(torchvision, name="CIFAR10"), "MNIST": partial(torchvision, name="MNIST"),
}  # fmt: skip


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, tmp_path):
    """A source is refused with its name, or each of its records is used or reported."""
    failures, refused, count = {}, 0, 30
    for seed in seeds(1000, 0, 1):
        rng, folder = np.random.default_rng([9, seed]), tmp_path / f"source-{seed}"
        source = SOURCES[name](folder, count)
        mutation = mutate_folder(folder, rng, removing=False)
        try:
            with answering(), bounded():
                used, tally = drain(source)
            ignored = sum(r.count for r in tally.ignored.values())
            if name == "Parquet":  # where a file that is not taken for one holds many records
                ignored *= count
            accounted = tally.skipped + ignored + count * len(tally.lost_parts)
            if used + tally.skipped != tally.chosen:
                failures[seed] = f"{mutation}: {used} used and {tally.skipped} left out of {tally.chosen}"
            elif used + accounted < count:
                failures[seed] = f"{mutation}: {count - used} records are gone and {accounted} accounted for"
        except SourceError as error:
            refused += 1
            if folder.name not in str(error):
                failures[seed] = f"{mutation}: the message does not name the source: {error}"
        except Exception as error:
            failures[seed] = f"{mutation}: {wrong_of(error)}"
        shutil.rmtree(folder)
    check(failures, [2] * refused)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".txt"])
def test_prompt_files(suffix, tmp_path):
    failures, refused = {}, 0
    rows = [{"prompt": f"a {a} {b}, at dusk", "artist": b, "seed": i} for i, (a, b) in enumerate(product("xyz", "klm"))]
    text = {
        ".csv": "prompt,artist,seed\n" + "".join(f'"{r["prompt"]}",{r["artist"]},{r["seed"]}\n' for r in rows),
        ".json": json.dumps(rows),
        ".jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        ".txt": "".join(r["prompt"] + "\n" for r in rows),
    }[suffix]
    for seed in seeds(1000, 0, 1):
        rng, file = np.random.default_rng([10, seed]), tmp_path / f"prompts-{seed}{suffix}"
        if suffix.startswith(".json") and rng.integers(2):
            changed = mutated_tree(rows, rng, 2)
            content = (json.dumps(changed) if suffix == ".json" else "\n".join(json.dumps(r) for r in changed)).encode()
        else:
            content = mutated_bytes(text.encode(), rng)
        file.write_bytes(content)
        source = PromptFile(
            file=file, **({"labelled": "k"} if suffix == ".txt" else {"label": "artist", "seed": "seed"})
        )
        try:
            with answering(), bounded():
                source.rows(Tally())
        except PromptError as error:
            refused += 1
            if file.name not in str(error):
                failures[seed] = f"the message does not name the file: {error}"
        except Exception as error:
            failures[seed] = wrong_of(error)
    check(failures, [2] * refused)
