"""Image sources in every format, written by the formats' own libraries, and unreadable records."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from user_files import CAPTIONS, encoded, labelled, picture, write_folder, write_parquet, write_shards

from raysweep.miniature import data
from raysweep.miniature.pictures import pictures
from raysweep.tasks.records import Record, SourceError, Tally
from raysweep.tasks.sampling import Sample, pixels
from raysweep.tasks.sources import (
    FolderSource,
    MixedSource,
    ParquetSource,
    ShardSource,
    Source,
    TorchvisionSource,
)


def write_cifar(root: Path) -> TorchvisionSource:
    """The files of CIFAR-10 with a few rows; torchvision checks their hashes, so those are left out of the check."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (base / name).write_bytes(pickle.dumps(rows))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return TorchvisionSource(torchvision="CIFAR10", root=root)


WRITERS = {
    "folder": lambda p, rows: write_folder(p / "f", rows),
    "jsonl": lambda p, rows: write_folder(p / "f", rows, "jsonl"),
    "parquet": lambda p, rows: write_parquet(p / "p.parquet", rows),
    "shards": lambda p, rows: write_shards(p / "s", rows),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_labels_captions_and_pixels(tmp_path, name):
    source, tally = WRITERS[name](tmp_path, labelled(10)), Tally()
    rows = list(pixels(source, (3, 12, 12), tally))
    assert tally.seen == len(rows) == 10
    assert not tally.bad
    assert sorted(r.label for r, _ in rows) == sorted(k for _, k in labelled(10))
    assert all(r.caption == CAPTIONS[r.label] for r, _ in rows)
    loss = 0.25 if name in ("parquet", "shards") else 1e-6  # JPEG
    expected = {float(torch.from_numpy(np.asarray(picture(n), dtype=np.float32)).mean() / 127.5 - 1) for n in range(10)}
    assert all(min(abs(float(x.mean()) - e) for e in expected) < loss for _, x in rows)
    assert all(x.shape == (3, 12, 12) and float(x.min()) >= -1 and float(x.max()) <= 1 for _, x in rows)
    again = TypeAdapter(Source).validate_python(source.model_dump())
    assert again == source


def test_grey_images_and_other_sizes_are_fitted(tmp_path):
    source = write_folder(tmp_path / "f", labelled(2))
    assert all(x.shape == (1, 8, 6) for _, x in pixels(source, (1, 8, 6), Tally()))


def test_styles_and_objects_of_a_tree(tmp_path):
    path = tmp_path / "Van_Gogh" / "Dogs"
    path.mkdir(parents=True)
    (path / "1.png").write_bytes(encoded(1))
    record = next(FolderSource(folder=tmp_path, label="parent", other="grandparent").records(Tally()))
    assert (record.label, record.other) == ("Dogs", "Van_Gogh")
    (tmp_path / "2.png").write_bytes(encoded(2))
    record = next(FolderSource(folder=tmp_path, other="grandparent").records(Tally()))
    assert (record.key, record.label, record.other) == ("2.png", None, None)


TORCHVISION = {
    "MNIST": (data.idx, (1, 28, 28), "3 - three"),
    "FashionMNIST": (lambda out, images: data.idx(out, "FashionMNIST", images), (1, 28, 28), "Dress"),
    "CIFAR10": (data.cifar10, (3, 32, 32), "cat"),
    "STL10": (data.stl10, (3, 96, 96), "cat"),
    "CelebA": (data.celeba, (3, 32, 32), "3"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(tmp_path, name, split):
    """Each dataset in its own files, read by torchvision: the fourth class shows the digit three."""
    make, shape, label = TORCHVISION[name]
    make(tmp_path, images=6)
    source, tally = TorchvisionSource(torchvision=name, root=tmp_path, split=split, checksums=False), Tally()
    rows = list(pixels(source, shape, tally))
    wanted = [(image, digit) for image, digit, _ in pictures(shape[1], 1, skip=0 if split == "train" else 6)]
    assert len({r.label for r, _ in rows}) == 10
    mine = torch.stack([x for r, x in rows if r.label == label]).mean(1)
    three = np.asarray(wanted[3][0].convert("L"), dtype=np.float32) / 127.5 - 1
    assert float((mine - torch.from_numpy(three)).abs().mean((1, 2)).min()) < 0.05


def test_a_long_table_is_streamed(tmp_path):
    """Of forty row groups of 200 kB, pyarrow holds a few at most at any row."""
    schema = pa.schema([("image", pa.binary())])
    draw = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "long.parquet", schema, compression="none") as out:
        for _ in range(40):
            out.write_table(pa.table({"image": [draw.bytes(4000) for _ in range(50)]}, schema=schema))
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for _ in ParquetSource(parquet=str(tmp_path / "long.parquet")).records(Tally()):
        most, rows = max(most, pa.total_allocated_bytes() - before), rows + 1
    assert rows == 2000
    assert 0 < most < 1e6


def test_a_part_of_a_dataset_is_not_the_dataset(tmp_path):
    data.cifar10(tmp_path, images=6)
    with pytest.raises(SourceError, match=r"CIFAR10 is not there; fetch it with torchvision\.datasets\.CIFAR10"):
        list(TorchvisionSource(torchvision="CIFAR10", root=tmp_path).records(Tally()))


class Evil:
    def __reduce__(self):
        return eval, ("print('this ran')",)


def test_files_that_could_run_code_are_refused(tmp_path, capsys):
    data.cifar10(tmp_path, images=6)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(SourceError, match=r"data_batch_3: not a pickle of plain data: it names builtins\.eval"):
        list(TorchvisionSource(torchvision="CIFAR10", root=tmp_path, checksums=False).records(Tally()))
    assert "this ran" not in capsys.readouterr().out
    for shards in ("pipe:cat x.tar", "https://host/a.tar; rm -rf x", "s3://bucket/$(id).tar"):
        with pytest.raises(ValidationError, match="commands are not run"):
            ShardSource(shards=shards)
    assert ShardSource(shards="https://host/{00000..00009}.tar").shards


def test_parts_of_several_sources(tmp_path):
    first, second = write_folder(tmp_path / "a", labelled(9)), write_folder(tmp_path / "b", labelled(9, 100))
    source = MixedSource(
        mix=(
            first.model_copy(update={"only": ("cat",)}),
            second.model_copy(update={"keys": ("dog/00101.png",), "repeat": 5, "captioned": "this is a {label}"}),
            second.model_copy(update={"labelled": "wolf", "only": ("wolf",)}),
        )
    )
    rows = list(source.records(Tally()))
    assert [r.label for r in rows] == ["cat"] * 3 + ["dog"] * 5 + ["wolf"] * 9
    assert {r.caption for r in rows[3:8]} == {"this is a dog"}
    assert str(source) == f"{tmp_path / 'a'} and {tmp_path / 'b'} and {tmp_path / 'b'}"
    assert TypeAdapter(Source).validate_python(source.model_dump()) == source
    with pytest.raises(ValidationError, match=r"may hold \{label\} and \{other\}"):
        FolderSource(folder=tmp_path, captioned="a {thing}")


def test_torchvision_cifar_checks_its_files(tmp_path):
    """Other bytes than CIFAR-10's fail torchvision's hash check; the message says how to get the data."""
    with pytest.raises(SourceError, match=r"CIFAR10 is not there; fetch it with torchvision.datasets.CIFAR10"):
        list(write_cifar(tmp_path).records(Tally()))


@pytest.mark.parametrize("name", ["CIFAR10", "STL10", "MNIST", "FashionMNIST", "CelebA"])
def test_absent_datasets_say_how_to_get_them(tmp_path, name):
    with pytest.raises(SourceError, match=f"{name} is not there; fetch it with torchvision.datasets.{name}"):
        list(TorchvisionSource(torchvision=name, root=tmp_path).records(Tally()))


def test_corrupt_pictures_are_skipped_and_counted_and_refused_when_many(tmp_path):
    source = write_folder(tmp_path / "f", labelled(40))
    bad = sorted((tmp_path / "f").rglob("*.png"))
    bad[0].write_bytes(bad[0].read_bytes()[:60])
    bad[1].write_bytes(b"not an image")
    tally = Tally()
    assert len(list(pixels(source, (3, 12, 12), tally))) == 38
    assert tally.skipped == 2
    tally.check(source)
    for path in bad[2:6]:
        path.write_bytes(b"")
    tally = Tally()
    list(pixels(source, (3, 12, 12), tally))
    with pytest.raises(
        SourceError,
        match=r"6 of 40 records cannot be used: 1 x a damaged .*; 1 x not a picture .*; 4 x an empty file .*; at most 5%",
    ):
        tally.check(source)


def test_a_shard_that_is_cut_short_is_counted(tmp_path):
    source = write_shards(tmp_path / "s", labelled(12))
    shard = tmp_path / "s" / "00001.tar"
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[4].offset_data + 10
    shard.write_bytes(shard.read_bytes()[:end])
    tally = Tally()
    rows = list(source.records(tally))
    assert 6 <= len(rows) < 12
    assert [str(reason) for reason in tally.lost_parts.values()] == [f"{shard} after {len(rows) - 6} records"]
    with pytest.raises(
        SourceError, match=r"1 of 2 files cannot be read: 1 x cut short or unreadable \(.*\); at most 5%"
    ):
        tally.check(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FolderSource(folder=p / "none"), "none: no such folder"),
        (lambda p: ParquetSource(parquet=str(p / "none.parquet")), "not readable Parquet"),
        (
            lambda p: ParquetSource(parquet=str(p / "p.parquet"), image="picture"),
            "no column 'picture'; there are: image, text",
        ),
        (lambda p: ShardSource(shards=str(p / "{0..2}.tar")), r"0.tar: no such shard \(3 of 3 are missing\)"),
    ],
)
def test_missing_sources_are_named(tmp_path, make, message):
    write_parquet(tmp_path / "p.parquet", labelled(3))
    with pytest.raises(SourceError, match=message):
        list(make(tmp_path).records(Tally()))


def test_an_empty_source_is_refused(tmp_path):
    tally = Tally()
    list(FolderSource(folder=tmp_path).records(tally))
    with pytest.raises(SourceError, match="holds no images"):
        tally.check(tmp_path)


def test_a_sample_depends_on_content_and_seed_alone():
    g = torch.Generator().manual_seed(0)
    images = [torch.rand((1, 2, 2), generator=g) for _ in range(30)]

    def taken(order, seed=0, repeats=False):
        sample = Sample(8, seed, repeats)
        for i in order:
            sample.add(Record(str(i), lambda: None), images[i])
        return [p.key for p in sample.images()]

    first = taken(range(30))
    assert len(first) == len(set(first)) == 8
    assert taken(reversed(range(30))) == first
    assert taken(range(30), seed=1) != first
    assert taken([*range(30), *range(30)]) == first
    assert len(taken([3] * 5, repeats=True)) == 5
