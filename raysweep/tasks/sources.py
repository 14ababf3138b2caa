"""Where a user's images come from: torchvision's datasets, folders, Parquet files, webdataset shards. All of them stream.

A source yields records one at a time, so that a pass over a million rows holds no more of them than one row group or one
shard member. A record that cannot be read (a corrupt picture, a member cut short, a missing caption) is skipped and counted;
above a share of `MOST_BAD` the source is refused.
"""

from __future__ import annotations

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator

from raysweep import unpickle
from raysweep.tasks.kinds import by_key, tag

if TYPE_CHECKING:
    from PIL import Image

MOST_BAD = 0.05  # share of unreadable records above which a source is refused
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BATCH_ROWS = 64
LISTS = ("train_list", "test_list", "meta", "file_list")  # where torchvision's datasets name their files and hashes
MD5 = re.compile(r"[0-9a-f]{32}")
URL = re.compile(r"(https?|s3|gs)://[\w./+=%~,:{}-]+")
TORCHVISION = {
    "CIFAR10": "cifar-10-batches-py", "STL10": "stl10_binary", "MNIST": "MNIST", "FashionMNIST": "FashionMNIST",
    "CelebA": "celeba",
}  # fmt: skip


class SourceError(ValueError):
    """A source that is missing or unreadable; the message names it, and says what it should be."""


@dataclass(frozen=True)
class Record:
    """One image and what is known of it. key: its name within the source; other: its label in a second domain."""

    key: str
    open: Callable[[], Image.Image]
    label: str | None = None
    caption: str | None = None
    other: str | None = None


@dataclass
class Tally:
    """How many records a pass met, and why some were skipped."""

    seen: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def skip(self, why: str, key: str) -> None:
        """Counts a record that could not be used."""
        self.bad[why] = self.bad.get(why, 0) + 1
        self.first = self.first or f"{key}: {why}"

    def check(self, source: object) -> None:
        """Raises SourceError if there was nothing, or too much of it was bad."""
        bad = sum(self.bad.values())
        if self.seen == 0:
            raise SourceError(f"{source}: holds no images")
        if bad > MOST_BAD * self.seen:
            raise SourceError(
                f"{source}: {bad} of {self.seen} records cannot be used (first: {self.first}); at most {MOST_BAD:.0%} may be"
            )


class _Source(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid")

    only: tuple[str, ...] = Field((), description="records with these labels alone; empty: all")
    keys: tuple[str, ...] = Field((), description="records of these names alone; empty: all")
    labelled: str | None = Field(None, description="label of all its records")
    captioned: str | None = Field(
        None, description="caption of all its records, with {label} and {other}, for example: a photo of {label}"
    )
    repeat: int = Field(1, ge=1, description="how often each record counts, as a duplicate in training data does")

    @abstractmethod
    def _all(self, tally: Tally) -> Iterator[Record]:
        """All records, in an order that depends on the data alone."""

    def records(self, tally: Tally) -> Iterator[Record]:
        """The records that are wanted, in an order that depends on the data alone."""
        for record in self._all(tally):
            if self.labelled is not None:
                record = replace(record, label=self.labelled)
            if self.captioned is not None:
                record = replace(record, caption=self.captioned.format(label=record.label, other=record.other))
            if (not self.only or record.label in self.only) and (not self.keys or record.key in self.keys):
                yield from [record] * self.repeat

    @field_validator("captioned")
    @classmethod
    def _known_fields(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                template.format(label="", other="")
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError("may hold {label} and {other} in braces, and nothing else") from error
        return template


class FolderSource(_Source):
    """Image files below a folder, with labels from folders' names and captions from `NAME.txt` or `metadata.jsonl`."""

    folder: Path = Field(description="folder; images are found at any depth")
    label: Literal["parent", "grandparent"] | None = Field(
        "parent", description="whose name is the label (UnlearnCanvas: parent is the object, grandparent the style)"
    )
    other: Literal["parent", "grandparent"] | None = Field(
        None, description="whose name is the label of the second domain"
    )

    def __str__(self) -> str:
        return str(self.folder)

    def _all(self, tally: Tally) -> Iterator[Record]:
        if not self.folder.is_dir():
            raise SourceError(f"{self.folder}: no such folder")
        captions = _metadata(self.folder / "metadata.jsonl")
        for path in sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES):
            tally.seen += 1
            key = path.relative_to(self.folder).as_posix()
            text = path.with_suffix(".txt")
            caption = captions.get(key) or (text.read_text(encoding="utf-8").strip() if text.is_file() else None)
            label, other = (self._name(path, which) for which in (self.label, self.other))
            yield Record(key, partial(_read, path), label, caption, other)

    def _name(self, path: Path, which: str | None) -> str | None:
        place = {"parent": path.parent, "grandparent": path.parent.parent}.get(which or "")
        return place.name if place is not None and self.folder in place.parents else None


class ParquetSource(_Source):
    """Rows with the bytes of images, read row group by row group; any path or URI that pyarrow knows (S3 and GCS, too)."""

    parquet: str = Field(description="a file, a folder of files, or a URI such as s3://bucket/path")
    image: str = Field("image", description="column of encoded images: bytes, or a struct with `bytes`")
    caption: str | None = Field(None, description="column of captions")
    label: str | None = Field(None, description="column of labels")
    other: str | None = Field(None, description="column of labels of a second domain")

    def __str__(self) -> str:
        return self.parquet

    def _all(self, tally: Tally) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.dataset as ds

        try:
            data = ds.dataset(self.parquet, format="parquet")
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{self.parquet}: not readable Parquet ({str(error).splitlines()[0]})") from error
        columns = [c for c in (self.image, self.caption, self.label, self.other) if c is not None]
        missing = [c for c in columns if c not in data.schema.names]
        if missing:
            raise SourceError(
                f"{self.parquet}: no column {', '.join(map(repr, missing))}; there are: {', '.join(data.schema.names)}"
            )
        # a row group at a time: a scan of a whole file keeps what it has read of it until its end, and reads ahead
        groups = (group for fragment in data.get_fragments() for group in fragment.split_by_row_group())
        for group in groups:
            for batch in group.to_batches(
                columns=columns, batch_size=BATCH_ROWS, batch_readahead=0, fragment_readahead=0
            ):
                for row in batch.to_pylist():
                    key, tally.seen = f"row {tally.seen}", tally.seen + 1
                    cell = row[self.image]
                    content = cell.get("bytes") if isinstance(cell, dict) else cell
                    if not content:
                        tally.skip("no image bytes", key)
                        continue
                    label, caption, other = (_text(row, c) for c in (self.label, self.caption, self.other))
                    yield Record(key, partial(_decode, content), label, caption, other)


class ShardSource(_Source):
    """Tar shards of samples in webdataset's layout, as img2dataset writes them (LAION): NNNN.jpg, NNNN.txt, NNNN.json."""

    shards: str = Field(description="path or URL pattern, for example data/{00000..00009}.tar")
    caption: str | None = Field("txt", description="extension of captions; null: there are none")
    label: str | None = Field(None, description="extension of labels, for example cls; null: there are none")
    other: str | None = Field(None, description="extension of labels of a second domain")

    @field_validator("shards")
    @classmethod
    def _no_commands(cls, shards: str) -> str:
        """webdataset hands URLs to a shell, and runs what follows `pipe:`."""
        if shards.startswith("pipe:") or ("://" in shards and not URL.fullmatch(shards)):
            raise ValueError("must be a path, or a URL of letters, digits and ./_-+=%~,:{} alone; commands are not run")
        return shards

    def __str__(self) -> str:
        return self.shards

    def _all(self, tally: Tally) -> Iterator[Record]:
        import webdataset
        from braceexpand import braceexpand

        files = list(braceexpand(self.shards))
        absent = [f for f in files if "://" not in f and not Path(f).is_file()]
        if absent:
            raise SourceError(f"{absent[0]}: no such shard ({len(absent)} of {len(files)} are missing)")

        def broken(error: Exception) -> bool:
            tally.seen += 1
            tally.skip("member cut short or unreadable", str(error).splitlines()[0] if str(error) else "shard")
            return True

        kinds = [s.removeprefix(".") for s in SUFFIXES]
        for sample in webdataset.WebDataset(files, shardshuffle=False, handler=broken, empty_check=False):
            tally.seen += 1
            content = next((sample[k] for k in kinds if k in sample), None)
            key = str(sample["__key__"])
            if content is None:
                tally.skip("no image", key)
                continue
            label, caption, other = (_decoded(sample, e) for e in (self.label, self.caption, self.other))
            yield Record(key, partial(_decode, content), label, caption, other)


class TorchvisionSource(_Source):
    """One of torchvision's datasets, which must be there already: nothing is downloaded."""

    torchvision: Literal["CIFAR10", "STL10", "MNIST", "FashionMNIST", "CelebA"] = Field(description="the dataset")
    root: Path = Field(description="torchvision's root folder")
    split: Literal["train", "test"] = Field("train", description="which part")
    checksums: bool = Field(
        True, description="false: a part of the dataset in its own format, which has other checksums"
    )

    def __str__(self) -> str:
        return f"{self.torchvision} ({self.split}) in {self.root}"

    def _all(self, tally: Tally) -> Iterator[Record]:
        import torchvision.datasets as datasets

        cls = getattr(datasets, self.torchvision)
        if not self.checksums:
            lists = {name: _without_hashes(getattr(cls, name)) for name in LISTS if hasattr(cls, name)}
            cls = type(self.torchvision, (cls,), lists)
            for path in (self.root / TORCHVISION[self.torchvision]).glob("*batch*"):  # which torchvision unpickles
                try:
                    unpickle.check(path)
                except unpickle.Unsafe as error:
                    raise SourceError(str(error)) from error
        how: dict[str, Any] = {"train": self.split == "train"}
        if self.torchvision in ("STL10", "CelebA"):
            how = {"split": self.split}
        if self.torchvision == "CelebA":
            how |= {"target_type": "identity"}
        try:
            data = cls(str(self.root), download=False, **how)
        except (RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
            raise SourceError(
                f"{self.root / TORCHVISION[self.torchvision]}: {self.torchvision} is not there; fetch it with "
                f"torchvision.datasets.{self.torchvision}({str(self.root)!r}, download=True)"
            ) from error
        names = getattr(data, "classes", None)
        for i in range(len(data)):
            tally.seen += 1
            image, target = data[i]
            label = names[int(target)] if names is not None else str(int(target))
            yield Record(str(i), partial(_given, image), label)


SingleSource = Annotated[
    Annotated[FolderSource, Tag(tag("folder"))]
    | Annotated[ParquetSource, Tag(tag("parquet"))]
    | Annotated[ShardSource, Tag(tag("shards"))]
    | Annotated[TorchvisionSource, Tag(tag("torchvision"))],
    by_key("folder", "parquet", "shards", "torchvision"),
]


class MixedSource(_Source):
    """Several sources, one after the other."""

    mix: tuple[SingleSource, ...] = Field(min_length=1, description="the sources")

    def __str__(self) -> str:
        return " and ".join(map(str, self.mix))

    def _all(self, tally: Tally) -> Iterator[Record]:
        for source in self.mix:
            yield from source.records(tally)


Source = Annotated[
    Annotated[FolderSource, Tag(tag("folder"))]
    | Annotated[ParquetSource, Tag(tag("parquet"))]
    | Annotated[ShardSource, Tag(tag("shards"))]
    | Annotated[TorchvisionSource, Tag(tag("torchvision"))]
    | Annotated[MixedSource, Tag(tag("mix"))],
    by_key("folder", "parquet", "shards", "torchvision", "mix"),
]


def _without_hashes(files: Any) -> Any:
    """torchvision's lists of files with None for each MD5, which it then does not check."""
    if isinstance(files, dict):
        return {k: _without_hashes(v) for k, v in files.items()}
    if isinstance(files, list | tuple):
        return type(files)(_without_hashes(v) for v in files)
    return None if isinstance(files, str) and MD5.fullmatch(files) else files


def _decode(content: bytes) -> Image.Image:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def _read(path: Path) -> Image.Image:
    return _decode(path.read_bytes())


def _given(image: Image.Image) -> Image.Image:
    return image


def _metadata(path: Path) -> dict[str, str]:
    """Captions by file name, from the file that the Hugging Face image-folder layout knows."""
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["file_name"]] = row.get("text") or row.get("caption") or ""
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SourceError(f'{path}:{number}: not a line such as {{"file_name": ..., "text": ...}}') from error
    return found


def _text(row: dict[str, Any], column: str | None) -> str | None:
    value = None if column is None else row[column]
    return None if value is None else str(value)


def _decoded(sample: dict[str, Any], extension: str | None) -> str | None:
    value = None if extension is None else sample.get(extension)
    return value.decode("utf-8", errors="replace").strip() if isinstance(value, bytes) else value
