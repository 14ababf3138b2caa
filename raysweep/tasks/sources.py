"""Where a user's images come from: torchvision's datasets, folders, Parquet files, webdataset shards. All of them stream.

A source yields records one at a time, so that a pass over a million rows holds no more of them than one row group or the shard
members of one name. A record that cannot be read (a corrupt picture, a caption that is not text) is skipped and counted, as is a
file of many records; above a share of `MOST_BAD` the source is refused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, field_validator

from raysweep.storage import unpickle
from raysweep.storage.places import Location, Place, location
from raysweep.storage.texts import TextError, decode
from raysweep.tasks import tables, tars, tree
from raysweep.tasks.decoding import opened
from raysweep.tasks.records import KNOWN, Name, Record, SourceError, Tally, Unreadable, check_met, plain
from raysweep.tasks.unions import by_key, tag

if TYPE_CHECKING:
    from PIL import Image

LISTS = ("train_list", "test_list", "meta", "file_list")  # where torchvision's datasets name their files and hashes
MD5 = re.compile(r"[0-9a-f]{32}")
URL = re.compile(r"(https?|s3|gs)://[\w./+=%~,:{}-]+")
TORCHVISION = {
    "CIFAR10": "cifar-10-batches-py", "STL10": "stl10_binary", "MNIST": "MNIST", "FashionMNIST": "FashionMNIST",
    "CelebA": "celeba",
}  # fmt: skip


class _Source(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid")

    only: tuple[Name, ...] = Field((), description="records with these labels alone; empty: all")
    keys: tuple[Name, ...] = Field((), description="records of these names alone; empty: all")
    labelled: Name | None = Field(None, description="label of all its records")
    captioned: str | None = Field(
        None, description="caption of all its records, with {label} and {other}, for example: a photo of {label}"
    )
    repeat: int = Field(1, ge=1, description="how often each record counts, as a duplicate in training data does")

    @abstractmethod
    def _all(self, tally: Tally) -> Iterator[Record]:
        """All records, in an order that depends on the data alone."""

    def records(self, tally: Tally) -> Iterator[Record]:
        """The records that are wanted, in an order that depends on the data alone.

        Raises SourceError at the end if `only` or `keys` name what is not there.
        """
        labels, keys = set[str](), set[str]()
        for record in self._all(tally):
            record = self._named(record)
            if record.label is not None and (len(labels) < KNOWN or record.label in self.only):
                labels.add(record.label)
            if (self.only and record.label not in self.only) or (self.keys and record.key not in self.keys):
                tally.passed_over += 1
                keys |= {record.key} if len(keys) < KNOWN else set()
                continue
            keys |= {record.key} if self.keys else set()
            yield from [record] * self.repeat
        check_met(self, "only", self.only, labels, tally)
        check_met(self, "keys", self.keys, keys, tally)

    def _named(self, record: Record) -> Record:
        """The record with the label and the caption that the source's settings give it."""
        label = record.label if self.labelled is None else self.labelled
        label, other = (None if name is None else plain(name) for name in (label, record.other))
        caption = record.caption
        if self.captioned is not None:
            caption = self.captioned.format(label=label, other=other)
        return replace(record, label=label, caption=None if caption is None else plain(caption), other=other)

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
    """Image files below a folder, with labels from folders' names and captions from `NAME.txt` or a metadata file.

    Metadata files are `metadata.jsonl` and `metadata.csv`, in any folder, with `file_name` relative to it.
    """

    folder: Place = Field(description="folder; images are found at any depth, hidden files and folders left out")
    label: Literal["parent", "grandparent"] | None = Field(
        "parent", description="whose name is the label (UnlearnCanvas: parent is the object, grandparent the style)"
    )
    other: Literal["parent", "grandparent"] | None = Field(
        None, description="whose name is the label of the second domain"
    )
    caption: str | None = Field(None, description="key of captions in metadata files; null: text, or else caption")

    def __str__(self) -> str:
        return str(self.folder)

    def _all(self, tally: Tally) -> Iterator[Record]:
        if not self.folder.is_dir():
            raise SourceError(f"{self.folder}: no such folder")
        tally.orders.add(())
        for found in tree.pictures(self.folder, tally, self.caption):
            tally.seen += 1
            try:
                caption = found.caption()
            except Unreadable as error:
                tally.skip(str(error), found.key, place=error.place)
                continue
            label, other = (self._name(found.path, which) for which in (self.label, self.other))
            yield Record(found.key, partial(_read, found.path), label, caption, other)

    def _name(self, path: Path, which: str | None) -> str | None:
        place = {"parent": path.parent, "grandparent": path.parent.parent}.get(which or "")
        return place.name if place is not None and self.folder in place.parents else None


class ParquetSource(_Source):
    """Rows with the bytes of images, read row group by row group; any path or URI that pyarrow knows (S3 and GCS, too).

    In a folder, files that are no Parquet are left out, and folders such as `label=cat` are columns. Columns that the Hugging Face
    hub calls a ClassLabel are read as the names of the classes.
    """

    parquet: Location = Field(description="a file, a folder of files, or a URI such as s3://bucket/path")
    split: str | None = Field(
        None, description="of a folder with train-00000-of-00002.parquet and the like: which of them"
    )
    image: str = Field("image", description="column of encoded images: bytes, or a struct with `bytes`")
    caption: str | None = Field(None, description="column of captions")
    label: str | None = Field(None, description="column of labels")
    other: str | None = Field(None, description="column of labels of a second domain")

    def __str__(self) -> str:
        return self.parquet

    def _all(self, tally: Tally) -> Iterator[Record]:
        tally.hint = "`caption` names a column" if self.caption is None else f"`caption` is the column {self.caption!r}"
        columns = tables.Columns(self.image, self.caption, self.label, self.other)
        for row in tables.rows(self.parquet, self.split, columns, tally):
            key, image = f"row {row.number}", partial(opened, row.content)
            yield Record(key, image, row.label, row.caption, row.other, row.place)


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
        return location(shards)

    def __str__(self) -> str:
        return self.shards

    def _all(self, tally: Tally) -> Iterator[Record]:
        from braceexpand import braceexpand

        try:
            files = list(braceexpand(self.shards))
        except ValueError as error:
            raise SourceError(
                f"{self.shards}: braces do not match; write for example data/{{00000..00009}}.tar"
            ) from error
        absent = [f for f in files if "://" not in f and not Path(f).is_file()]
        if absent and Path(absent[0]).is_dir():
            raise SourceError(f"{absent[0]}: a folder; name its shards, for example {absent[0]}/{{00000..00009}}.tar")
        if absent:
            raise SourceError(f"{absent[0]}: no such shard ({len(absent)} of {len(files)} are missing)")
        tally.orders.add(())
        tally.hint = "`caption` is the extension of captions" + (f", .{self.caption}" if self.caption else "")
        extensions = tuple(e.lower().removeprefix(".") for e in (self.caption, self.label, self.other) if e is not None)
        for sample in tars.samples(files, extensions, tally):
            try:
                label, caption, other = (_text_of(sample, e) for e in (self.label, self.caption, self.other))
            except TextError:
                tally.skip("a caption or label that is not UTF-8 text", sample.key, place=sample.place)
                continue
            yield Record(sample.key, partial(opened, sample.content), label, caption, other, sample.place)


class TorchvisionSource(_Source):
    """One of torchvision's datasets, which must be there already: nothing is downloaded."""

    torchvision: Literal["CIFAR10", "STL10", "MNIST", "FashionMNIST", "CelebA"] = Field(description="the dataset")
    root: Place = Field(description="torchvision's root folder")
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
        except (
            Exception
        ) as error:  # torchvision asserts, and its parsers raise whatever bytes that make no sense lead to
            raise SourceError(
                f"{self.root / TORCHVISION[self.torchvision]}: a file of {self.torchvision} is damaged or cut short "
                f"({type(error).__name__}{f': {error}' if str(error) else ''}); fetch it anew"
            ) from error
        held = {n: len(getattr(data, n)) for n in ("data", "targets", "labels") if getattr(data, n, None) is not None}
        if len(set(held.values())) > 1:
            counts = " and ".join(f"{count} {'pictures' if n == 'data' else 'labels'}" for n, count in held.items())
            raise SourceError(
                f"{self.root / TORCHVISION[self.torchvision]}: holds {counts}: a file is cut short or another's"
            )
        names = getattr(data, "classes", None)
        tally.orders.add(tuple(names or ()))
        tally.hint = f"{self.torchvision} has labels alone"
        for i in range(len(data)):
            tally.seen += 1
            try:
                image, target = data[i]
            except (OSError, SyntaxError, ValueError) as error:  # a picture that is a file of its own, as CelebA's are
                tally.skip(f"a damaged or missing picture ({type(error).__name__})", str(i))
                continue
            if names is not None and not 0 <= int(target) < len(names):
                tally.skip(f"a label that {self.torchvision} does not have", str(i))
                continue
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
            tally.prefix = f"{source}: "
            yield from source.records(tally)
            tally.prefix = ""


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


def _read(path: Path) -> Image.Image:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"a file that cannot be read ({error.strerror})") from error
    return opened(content)


def _given(image: Image.Image) -> Image.Image:
    return image


def _text_of(sample: tars.Sample, extension: str | None) -> str | None:
    """A member as text, if there is one; raises TextError."""
    content = None if extension is None else sample.beside.get(extension.lower().removeprefix("."))
    return None if content is None else decode(content, sample.place).strip()
