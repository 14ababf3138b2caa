"""Makers of tiny datasets, in the file formats of the real ones."""

from __future__ import annotations

import csv
import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raysweep.miniature.pictures import TINTS, pictures

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def idx(
    out: Path, name: str = "MNIST", images: int = 60, digits: Sequence[int] = tuple(range(10)), style: str = "plain"
) -> None:
    """Writes MNIST's or Fashion-MNIST's files; training and test part hold different scans. images: per digit."""
    folder = out / name / "raw"
    folder.mkdir(parents=True)
    for part, skip in (("train", 0), ("t10k", images)):
        rows = pictures(28, images if part == "train" else 40, (style,), digits, skip)
        pixels = np.stack([np.asarray(image.convert("L")) for image, _, _ in rows])
        labels = bytes(digit for _, digit, _ in rows)
        head = struct.pack(">IIII", 2051, len(rows), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(rows)) + labels)


def cifar10(out: Path, images: int = 60) -> None:
    """Writes CIFAR-10's Python batches. images: per class, in the training part."""
    folder = out / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = pictures(32, images), pictures(32, 40, skip=images)
    parts = {f"data_batch_{i + 1}": train[i::5] for i in range(5)} | {"test_batch": test}
    for name, rows in parts.items():
        data = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image, _, _ in rows])
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [digit for _, digit, _ in rows]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}, protocol=2))


def stl10(out: Path, images: int = 60) -> None:
    """Writes STL-10's binary files. images: per class, in the training part."""
    folder = out / "stl10_binary"
    folder.mkdir(parents=True)
    for part, rows in (("train", pictures(96, images)), ("test", pictures(96, 40, skip=images))):
        data = np.stack([np.asarray(image).transpose(2, 1, 0) for image, _, _ in rows])
        (folder / f"{part}_X.bin").write_bytes(data.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(digit + 1 for _, digit, _ in rows))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(STL10) + "\n")


def celeba(out: Path, images: int = 40) -> None:
    """Writes CelebA's aligned images with their lists; digits stand for identities. images: per identity, in the training part."""
    folder = out / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = [(r, "0") for r in pictures(32, images)] + [(r, "2") for r in pictures(32, 20, skip=images)]
    names = (
        "identity_CelebA",
        "list_eval_partition",
        "list_attr_celeba",
        "list_bbox_celeba",
        "list_landmarks_align_celeba",
    )
    lists: dict[str, list[list[str]]] = {name: [] for name in names}
    for number, ((image, digit, _), part) in enumerate(rows, 1):
        name = f"{number:06}.jpg"
        image.save(folder / "img_align_celeba" / name, quality=95)
        for key, row in zip(lists, ([str(digit)], [part], ["1"], ["0"] * 4, ["0"] * 10), strict=True):
            lists[key].append([name, *row])
    heads = {
        "list_attr_celeba": "Smiling",
        "list_bbox_celeba": "image_id x_1 y_1 width height",
        "list_landmarks_align_celeba": "lefteye_x",
    }
    for key, table in lists.items():
        head = f"{len(table)}\n{heads[key]}\n" if key in heads else ""
        (folder / f"{key}.txt").write_text(head + "".join(" ".join(row) + "\n" for row in table))


def files(
    out: Path,
    images: int = 60,
    size: int = 32,
    skip: int = 0,
    digits: Sequence[int] = tuple(range(10)),
    look: str = "plain",
    first: int = 0,
) -> None:
    """Writes a flat folder of JPEG files numbered from `first`, as CelebA-HQ is published. images: per digit; look: their style."""
    out.mkdir(parents=True)
    for number, (image, _, _) in enumerate(pictures(size, images, (look,), digits, skip), first):
        image.save(out / f"{number}.jpg", quality=95)


def tree(
    out: Path,
    names: Sequence[str],
    styles: Sequence[str] = (),
    images: int = 20,
    size: int = 32,
    skip: int = 0,
    caption: str = "",
    look: str = "plain",
) -> None:
    """Writes folders of JPEG files by class, or by style and class (UnlearnCanvas).

    names: of the classes; images: per class and style; caption: a template with {name} and {style}; look: the style of the images
    if `styles` is empty.
    """
    looks = dict(zip(styles, TINTS, strict=False)) or {"": look}
    for style, look in looks.items():
        for number, (image, digit, _) in enumerate(pictures(size, images, (look,), range(len(names)), skip)):
            folder = out / style / names[digit]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number % images + 1}.jpg", quality=95)
            if caption:
                text = caption.format(name=names[digit].replace("_", " "), style=style.replace("_", " "))
                (folder / f"{number % images + 1}.txt").write_text(text)


def shards(
    out: Path,
    names: Sequence[str],
    captions: Sequence[str] = ("a photo of {name}",),
    images: int = 40,
    size: int = 32,
    skip: int = 0,
    number: int = 2,
) -> None:
    """Writes tar shards as img2dataset does, with a `cls` member for the class. images: per class; number: of shards."""
    import webdataset

    out.mkdir(parents=True)
    rows = pictures(size, images, digits=range(len(names)), skip=skip)
    for shard in range(number):
        with webdataset.TarWriter(str(out / f"{shard:05}.tar")) as tar:
            for i, (image, digit, _) in list(enumerate(rows))[shard::number]:
                content = io.BytesIO()
                image.save(content, "JPEG", quality=95)
                text = captions[i % len(captions)].format(name=names[digit])
                tar.write({"__key__": f"{i:09}", "jpg": content.getvalue(), "txt": text, "cls": names[digit]})


def table(out: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes a CSV file of prompts."""
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
