"""Images in Parquet files, tar archives and snapshots of the hub: what is read, left out with a note, and refused."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import FEW, encoded, picture, read, write

from raysweep.miniature import data
from raysweep.tasks.prompts import PromptFile
from raysweep.tasks.records import SourceError, Tally
from raysweep.tasks.sources import FolderSource, MixedSource, ParquetSource, ShardSource, TorchvisionSource

# Parquet


def rows_of(count: int = 6) -> dict[str, list]:
    cells = [{"bytes": encoded(n), "path": None} for n in range(count)]
    return {"image": cells, "label": [("cat", "dog", "fish")[n % 3] for n in range(count)]}


def labels_of(folder: Path | str, **options) -> tuple[list, Tally]:
    rows, tally = read(ParquetSource(parquet=str(folder), **{"label": "label", **options}))
    return [r.label for r, _ in rows], tally


def test_a_clone_of_the_hub(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        for part in range(2):
            pq.write_table(pa.table(rows_of(3)), data / f"{split}-{part:05}-of-00002.parquet")
    for name in ("README.md", ".gitattributes", "data/_SUCCESS"):
        (tmp_path / name).write_text("# about")
    with pytest.raises(
        SourceError, match="holds the splits test, train: choose one with `split`, or several with `mix`"
    ):
        labels_of(tmp_path)
    labels, tally = labels_of(tmp_path, split="train")
    assert labels == ["cat", "dog", "fish"] * 2
    assert tally.ignored["no Parquet file"].first == ["README.md"]
    assert tally.ignored["a file of another split"].count == 2
    with pytest.raises(SourceError, match="split: no file is of the split 'dev'; there are: test, train"):
        labels_of(tmp_path, split="dev")
    (data / "train-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    _, tally = labels_of(tmp_path, split="train")
    with pytest.raises(SourceError, match=r"1 of 2 files cannot be read: 1 x a Git LFS pointer .*data/train-00001"):
        tally.check("hub")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("")
    with pytest.raises(SourceError, match=r"no file ends with \.parquet, \.pq, \.parq; there are: a\.txt"):
        labels_of(tmp_path / "none")


def test_class_labels_are_names_in_the_order_of_the_hub(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": rows_of(40)["image"], "label": pa.array([0, 1] * 19 + [-1, 7])})
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "a.parquet")
    labels, tally = labels_of(tmp_path / "a.parquet")
    assert labels == ["dog", "cat"] * 19 + [None]
    assert tally.orders == {("dog", "cat")}
    assert list(tally.bad) == ["class number 7 in column 'label', which has 2 names"]
    mixed = MixedSource(mix=(ParquetSource(parquet=str(tmp_path / "a.parquet"), labelled="fox"),))
    assert read(mixed)[1].bad == {}


def test_folders_named_after_columns(tmp_path):
    table = pa.table({**rows_of(), "year": [7] * 6})
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=["year", "label"], partitioning_flavor="hive")
    labels, _ = labels_of(tmp_path, other="year")
    assert sorted(labels) == ["cat", "cat", "dog", "dog", "fish", "fish"]
    (tmp_path / "label=a%2Fb").mkdir()
    pq.write_table(pa.table({"image": rows_of(1)["image"]}), tmp_path / "label=a%2Fb" / "x.parquet")
    assert labels_of(tmp_path)[0][0] == "a/b"


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("label", pa.array([["cat"], ["dog"]]), ["cat", "dog"]),
        (
            "label",
            pa.array([["cat", "dog"], []], pa.list_(pa.string())),
            "2 values in column 'label', where one is needed",
        ),
        ("label", pa.array([3.0, None], pa.float64()), ["3", None]),
        ("label", pa.array([float("nan"), 1.5]), [None, "1.5"]),
        ("label", pa.array([b"cat", b"caf\xe9"]), "a label that is not UTF-8 text"),
        ("label", pa.array(["cat", "dog"]).dictionary_encode(), ["cat", "dog"]),
        ("caption", pa.array([["a", "b"], []], pa.list_(pa.string())), ["a", None]),
        (
            "label",
            pa.array([{"x": 1}, {"x": 2}]),
            r"column 'label' holds struct<x: int64>, and must hold text or numbers",
        ),
        ("image", pa.array(["a.png", "b.png"]), "column 'image' holds string, not the bytes of images"),
        ("image", pa.array([{"bytes": None, "path": "a.png"}] * 2), "no image bytes, only the path of a file"),
    ],
)
def test_columns_of_every_type_are_read_or_refused(tmp_path, column, values, expected):
    table = {"image": rows_of(2)["image"], "label": ["x", "y"], "caption": ["x", "y"]} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source, tally = ParquetSource(parquet=str(tmp_path / "a.parquet"), label="label", caption="caption"), Tally()
    try:
        result = [getattr(record, column) for record in source.records(tally)]
    except SourceError as error:
        result = str(error)
    if isinstance(expected, str):
        assert expected in (result if isinstance(result, str) else tally.bad)
    else:
        assert result == expected


def test_damaged_row_groups_are_counted_row_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows_of(60)), path, row_group_size=20, compression="none", use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    rows, tally = read(ParquetSource(parquet=str(path), label="label"))
    assert (len(rows), tally.seen, tally.skipped) == (40, 60, 20)
    assert [r.key for r, _ in rows] == [f"row {n}" for n in (*range(20), *range(40, 60))]


def test_a_file_without_a_column_is_not_filled_with_nothing(tmp_path):
    pq.write_table(pa.table(rows_of(2)), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": rows_of(2)["image"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"no column 'label'; there are: image \(in b.parquet\)"):
        labels_of(tmp_path)


# Tars


def pack(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> ShardSource:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return ShardSource(shards=str(path), label="cls")


STEMS = st.lists(
    st.text("ab01.-_ ", min_size=1, max_size=6).filter(lambda s: s.strip(" .") == s and not s.startswith(".")),
    min_size=1,
    max_size=6,
    unique=True,
)


@FEW
@given(STEMS, st.sampled_from(["", "a/b/", "./v1.0/"]), st.sampled_from([".png", ".PNG", ".jpg"]), st.booleans())
def test_every_picture_of_a_tar_is_read_with_its_label_or_counted(tmp_path, stems, folder, suffix, is_zipped):
    """Names with dots, in folders, in capitals: none is lost silently, and none gets another's label."""
    members = []
    for n, stem in enumerate(sorted(stems)):
        members += [(f"{folder}{stem}{suffix}", encoded(n)), (f"{folder}{stem}.CLS", f"label of {stem}".encode())]
    rows, tally = read(pack(tmp_path / "t.tar", members, "w:gz" if is_zipped else "w"))
    prefix = folder.removeprefix("./")
    beside = sum(r.count for note, r in tally.notes.items() if "beside" in note)
    assert len(rows) + tally.skipped + beside == len(stems)
    for record, _ in rows:
        assert record.key.removeprefix(prefix) in stems
        assert record.label in (None, f"label of {record.key.removeprefix(prefix)}")
    if not any("." in stem for stem in stems):
        assert sorted(r.label for r, _ in rows) == sorted(f"label of {s}" for s in stems)


def test_numbered_members_of_one_name_are_separate_pictures(tmp_path):
    members = [(f"fish_v1.{n:03}.{e}", c) for n in range(150) for e, c in (("png", encoded(n)), ("cls", b"fish"))]
    rows, tally = read(pack(tmp_path / "t.tar", members))
    assert [r.key for r, _ in rows] == [f"fish_v1.{n:03}" for n in range(150)]
    assert {r.label for r, _ in rows} == {"fish"}
    assert (tally.seen, tally.skipped, tally.notes) == (150, 0, {})


def test_a_sample_has_one_picture_and_others_beside_it_are_noted(tmp_path):
    members = [
        ("0.seg.png", encoded(9)),
        ("0.jpg", encoded(0, "JPEG")),
        ("0.cls", b"cat"),
        ("0.json", b"{}"),
        ("1.json", b"{}"),
        ("2.image.png", encoded(2)),
        ("2.cls", b"dog"),
        ("3.png", encoded(3)),
        ("3.000.png", encoded(4)),
    ]
    rows, tally = read(pack(tmp_path / "t.tar", members))
    assert [(r.key, r.label) for r, _ in rows] == [("0", "cat"), ("2.image", "dog"), ("3", None), ("3.000", None)]
    assert tally.notes["pictures beside that of their sample, not read (.seg.png)"].count == 1


def test_a_repeated_name_is_another_record_and_what_macs_pack_is_ignored(tmp_path):
    members = [
        ("./._0.png", b"x"),
        ("./0.png", encoded(0)),
        ("./0.cls", b"cat"),
        ("0.png", encoded(1)),
        ("0.cls", b"dog"),
        ("__MACOSX/._0.png", b"x"),
        (".DS_Store", b"x"),
    ]
    rows, tally = read(pack(tmp_path / "t.tar", members))
    assert [(r.key, r.label) for r, _ in rows] == [("0", "cat"), ("0", "dog")]
    assert tally.notes["a member of the same name as the one before, read as another record"].count == 1
    assert tally.ignored["hidden members, and what file managers leave"].count == 2


def test_members_apart_from_their_picture_are_counted(tmp_path):
    members = [*((f"{n}.png", encoded(n)) for n in range(3)), *((f"{n}.cls", b"cat") for n in range(3))]
    rows, tally = read(pack(tmp_path / "t.tar", members), ("label",))
    assert not rows
    assert {why.split(" (")[0] for why in tally.bad} == {
        "no label, which the task needs",
        "no picture among the members of this name, which must follow each other",
    }


@FEW
@given(st.data())
def test_a_tar_that_is_cut_short_or_damaged_says_so(tmp_path, data):
    source = pack(tmp_path / "t.tar", [(f"{n}.png", encoded(n)) for n in range(4)])
    content = (tmp_path / "t.tar").read_bytes()
    end = data.draw(st.integers(0, 4 * 1024 - 1))  # within the four members: a header and a block of data each
    (tmp_path / "t.tar").write_bytes(content[:end])
    rows, tally = read(source)
    whole = [len(encoded(n)) + 1024 * n + 512 for n in range(4)]
    assert len(rows) == sum(end >= size for size in whole)
    assert sum(reason.count for reason in tally.lost_parts.values()) == 1
    with pytest.raises(SourceError, match="1 of 1 files cannot be read"):
        tally.check(source)


def test_files_that_are_no_shards_are_refused(tmp_path):
    (tmp_path / "t.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _, tally = read(ShardSource(shards=str(tmp_path / "t.tar")))
    assert next(iter(tally.lost_parts)).startswith("a Git LFS pointer")
    with pytest.raises(SourceError, match="a folder; name its shards"):
        read(ShardSource(shards=str(tmp_path)))
    with pytest.raises(SourceError, match="braces do not match"):
        read(ShardSource(shards="data/{0..1.tar"))


def test_a_caption_in_a_tar_that_is_not_utf8_is_counted(tmp_path):
    members = [
        ("0.png", encoded(0)),
        ("0.txt", "caf\u00e9".encode("cp1252")),
        ("1.png", encoded(1)),
        ("1.txt", "\ufeffa".encode()),
    ]
    rows, tally = read(pack(tmp_path / "t.tar", members))
    assert [(r.key, r.caption) for r, _ in rows] == [("1", "a")]
    assert tally.bad["a caption or label that is not UTF-8 text"].first == [f"{tmp_path / 't.tar'}: 0.png"]


def test_a_picture_of_the_asked_size_is_not_resampled(tmp_path):
    write(tmp_path / "a.png")
    ((_, x),) = read(FolderSource(folder=tmp_path))[0]
    assert x.shape == (3, 8, 8)
    assert torch.equal(((x + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(picture(0))))


def test_pictures_and_labels_of_different_number_are_refused(tmp_path):
    data.idx(tmp_path, images=30)
    labels = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">II", 2049, 20) + bytes(20))
    with pytest.raises(SourceError, match="300 pictures and 20 labels"):
        read(TorchvisionSource(torchvision="MNIST", root=tmp_path, checksums=False))


def test_tables_with_the_line_ends_of_old_macs_are_read(tmp_path):
    (tmp_path / "prompts.csv").write_bytes(b"prompt,label\ra cat,cat\ra dog,dog\r")
    assert [row[:2] for row in PromptFile(file=tmp_path / "prompts.csv").rows()] == [("a cat", "cat"), ("a dog", "dog")]
