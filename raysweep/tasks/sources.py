"""Sources of a user's images: folders, Parquet files, webdataset shards, torchvision's datasets. All of them stream.

A source yields records one at a time: a pass over a million rows holds no more in memory than one row group, or the shard
members of one name. Records that cannot be read (a corrupt picture, a caption that is not text) and unreadable files of many
records are skipped and counted; if their share exceeds `records.MOST_BAD`, the source is refused.
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

LISTS = ("train_list", "test_list", "meta", "file_list")  # attributes of torchvision's datasets: files and their hashes
MD5 = re.compile(r"[0-9a-f]{32}")
URL = re.compile(r"(https?|s3|gs)://[\w./+=%~,:{}-]+")
# The folder of each dataset below torchvision's root.
TORCHVISION = {
    "CIFAR10": "cifar-10-batches-py",
    "STL10": "stl10_binary",
    "MNIST": "MNIST",
    "FashionMNIST": "FashionMNIST",
    "CelebA": "celeba",
}


class _Source(BaseModel, ABC):
    model_config = ConfigDict(frozen=True, extra="forbid")

    only: tuple[Name, ...] = Field((), description="use only records with these labels; empty: all")
    keys: tuple[Name, ...] = Field((), description="use only records with these names; empty: all")
    exclude: tuple[Name, ...] = Field((), description="leave out the records with these names")
    labelled: Name | None = Field(None, description="one label for all records, instead of their labels in the source")
    captioned: str | None = Field(
        None,
        description="one caption for all records, in which {label} and {other} are filled in, for example: a photo of {label}",
    )
    repeat: int = Field(
        1, ge=1, description="number of times that each record is used, as a duplicate in training data"
    )

    @abstractmethod
    def _all(self, tally: Tally) -> Iterator[Record]:
        """Yields all records, in an order that depends on the data alone."""

    def records(self, tally: Tally) -> Iterator[Record]:
        """Yields the records that `only`, `keys` and `exclude` leave, in an order that depends on the data alone.

        Raises SourceError at the end if an entry of one of these matched no record.
        """
        labels, keys, named = set[str](), set[str](), {*self.keys, *self.exclude}
        for record in self._all(tally):
            record = self._relabelled(record)
            if record.label is not None and (len(labels) < KNOWN or record.label in self.only):
                labels.add(record.label)
            if len(keys) < KNOWN or record.key in named:
                keys.add(record.key)
            if (
                record.key in self.exclude
                or (self.only and record.label not in self.only)
                or (self.keys and record.key not in self.keys)
            ):
                tally.passed_over += 1
                continue
            yield from [record] * self.repeat
        check_met(self, "only", self.only, labels, tally)
        check_met(self, "keys", self.keys, keys, tally)
        check_met(self, "exclude", self.exclude, keys, tally)

    def _relabelled(self, record: Record) -> Record:
        """The record with the label and caption that the settings give it."""
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

    folder: Place = Field(description="folder with images at any depth; hidden files and folders are ignored")
    label: Literal["parent", "grandparent"] | None = Field(
        "parent",
        description="the folder whose name is an image's label (UnlearnCanvas: parent is the object, grandparent the style); "
        "null: no labels",
    )
    other: Literal["parent", "grandparent"] | None = Field(
        None, description="the folder whose name is the label in a second domain; null: none"
    )
    caption: str | None = Field(None, description="key of captions in metadata files; null: `text`, else `caption`")

    def __str__(self) -> str:
        return str(self.folder)

    def _all(self, tally: Tally) -> Iterator[Record]:
        if not self.folder.is_dir():
            raise SourceError(f"{self.folder}: no such folder")
        tally.orders.add(())
        for picture in tree.pictures(self.folder, tally, self.caption):
            tally.seen += 1
            try:
                caption = picture.caption()
            except Unreadable as error:
                tally.skip(str(error), picture.key, location=error.location)
                continue
            label, other = (self._name_of(picture.path, folder) for folder in (self.label, self.other))
            yield Record(picture.key, partial(_read, picture.path), label, caption, other)

    def _name_of(self, path: Path, ancestor: str | None) -> str | None:
        """The name of a picture's parent or grandparent folder, if that is below the source's folder."""
        folder = {"parent": path.parent, "grandparent": path.parent.parent}.get(ancestor or "")
        return folder.name if folder is not None and self.folder in folder.parents else None


class ParquetSource(_Source):
    """Parquet rows with encoded images, read one row group at a time, from any path or URI that pyarrow supports (S3, GCS).

    Of a folder, files that are not Parquet are ignored, and folders such as `label=cat` are columns. ClassLabel columns of the
    Hugging Face hub are read as class names.
    """

    parquet: Location = Field(description="a file, a folder of files, or a URI such as s3://bucket/path")
    split: str | None = Field(
        None,
        description="the split to read of a folder with files such as train-00000-of-00002.parquet; null: all files",
    )
    image: str = Field("image", description="column of encoded images: bytes, or a struct with `bytes`")
    caption: str | None = Field(None, description="column of captions; null: none")
    label: str | None = Field(None, description="column of labels; null: none")
    other: str | None = Field(None, description="column of labels in a second domain; null: none")

    def __str__(self) -> str:
        return self.parquet

    def _all(self, tally: Tally) -> Iterator[Record]:
        tally.hint = "`caption` names a column" if self.caption is None else f"`caption` is the column {self.caption!r}"
        columns = tables.Columns(self.image, self.caption, self.label, self.other)
        for row in tables.rows(self.parquet, self.split, columns, tally):
            key, image = f"row {row.number}", partial(opened, row.content)
            yield Record(key, image, row.label, row.caption, row.other, row.location)


class ShardSource(_Source):
    """Tar shards in webdataset's layout, as img2dataset writes them (LAION): NNNN.jpg, NNNN.txt, NNNN.json."""

    shards: str = Field(description="path or URL pattern of the shards, for example data/{00000..00009}.tar")
    caption: str | None = Field("txt", description="extension of captions; null: none")
    label: str | None = Field(None, description="extension of labels, for example cls; null: none")
    other: str | None = Field(None, description="extension of labels in a second domain; null: none")

    @field_validator("shards")
    @classmethod
    def _no_commands(cls, shards: str) -> str:
        """Refuses what webdataset would run: it passes URLs to a shell, and executes what follows `pipe:`."""
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
                tally.skip("a caption or label that is not UTF-8 text", sample.key, location=sample.location)
                continue
            yield Record(sample.key, partial(opened, sample.content), label, caption, other, sample.location)


class TorchvisionSource(_Source):
    """One of torchvision's datasets, already on disk: nothing is downloaded."""

    torchvision: Literal["CIFAR10", "STL10", "MNIST", "FashionMNIST", "CelebA"] = Field(
        description="name of the dataset in torchvision.datasets"
    )
    root: Place = Field(description="torchvision's root folder, which holds the dataset's folder")
    split: Literal["train", "test"] = Field("train", description="the part to read")
    checksums: bool = Field(
        True, description="check the files' checksums; false: for a subset of the dataset in the same format"
    )

    def __str__(self) -> str:
        return f"{self.torchvision} ({self.split}) in {self.root}"

    @property
    def _folder(self) -> Path:
        return self.root / TORCHVISION[self.torchvision]

    def _all(self, tally: Tally) -> Iterator[Record]:
        data = self._dataset()
        names = getattr(data, "classes", None)
        tally.orders.add(tuple(names or ()))
        tally.hint = f"{self.torchvision} has labels alone"
        for i in range(len(data)):
            tally.seen += 1
            try:
                image, target = data[i]
            except (OSError, SyntaxError, ValueError) as error:  # CelebA's pictures are files, read only now
                tally.skip(f"a damaged or missing picture ({type(error).__name__})", str(i))
                continue
            if names is not None and not 0 <= int(target) < len(names):
                tally.skip(f"a label that {self.torchvision} does not have", str(i))
                continue
            label = names[int(target)] if names is not None else str(int(target))
            yield Record(str(i), partial(_identity, image), label)

    def _dataset(self) -> Any:
        """The dataset as torchvision reads it; raises SourceError if it is missing, damaged or incomplete."""
        import torchvision.datasets as datasets

        cls = getattr(datasets, self.torchvision)
        if not self.checksums:
            cls = self._without_checksums(cls)
        settings: dict[str, Any] = {"train": self.split == "train"}
        if self.torchvision in ("STL10", "CelebA"):
            settings = {"split": self.split}
        if self.torchvision == "CelebA":
            settings |= {"target_type": "identity"}
        try:
            data = cls(str(self.root), download=False, **settings)
        except (RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
            raise SourceError(
                f"{self._folder}: {self.torchvision} is not there; fetch it with "
                f"torchvision.datasets.{self.torchvision}({str(self.root)!r}, download=True)"
            ) from error
        except (
            Exception
        ) as error:  # torchvision asserts, and its parsers raise exceptions of many kinds on damaged bytes
            raise SourceError(
                f"{self._folder}: a file of {self.torchvision} is damaged or cut short "
                f"({type(error).__name__}{f': {error}' if str(error) else ''}); download it again"
            ) from error
        sizes = {n: len(getattr(data, n)) for n in ("data", "targets", "labels") if getattr(data, n, None) is not None}
        if len(set(sizes.values())) > 1:
            counts = " and ".join(f"{count} {'pictures' if n == 'data' else 'labels'}" for n, count in sizes.items())
            raise SourceError(f"{self._folder}: holds {counts}: a file is cut short or another's")
        return data

    def _without_checksums(self, cls: type) -> type:
        """The dataset's class without its files' hashes; refuses pickled batches that hold more than plain data."""
        for path in self._folder.glob("*batch*"):  # torchvision unpickles these
            try:
                unpickle.check(path)
            except unpickle.Unsafe as error:
                raise SourceError(str(error)) from error
        lists = {name: _without_hashes(getattr(cls, name)) for name in LISTS if hasattr(cls, name)}
        return type(self.torchvision, (cls,), lists)


SingleSource = Annotated[  # any source but a mix
    Annotated[FolderSource, Tag(tag("folder"))]
    | Annotated[ParquetSource, Tag(tag("parquet"))]
    | Annotated[ShardSource, Tag(tag("shards"))]
    | Annotated[TorchvisionSource, Tag(tag("torchvision"))],
    by_key("folder", "parquet", "shards", "torchvision"),
]


class MixedSource(_Source):
    """Several sources, read one after the other."""

    mix: tuple[SingleSource, ...] = Field(min_length=1, description="the sources, in order")

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
    """torchvision's lists of files with every MD5 replaced by None, so that it checks none."""
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


def _identity(image: Image.Image) -> Image.Image:
    return image


def _text_of(sample: tars.Sample, extension: str | None) -> str | None:
    """The member of a sample with this extension as text, if there is one; raises TextError."""
    content = None if extension is None else sample.beside.get(extension.lower().removeprefix("."))
    return None if content is None else decode(content, sample.location).strip()
