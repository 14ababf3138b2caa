"""Images on disk, in folders with captions: what is read, left out with a note, and refused."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import FEW, encoded, keys_of, picture, read, write
from PIL import Image

from raysweep.tasks.decoding import flat, opened
from raysweep.tasks.records import NAMED, SourceError, Tally, Unreadable, lines_of, listed, plain
from raysweep.tasks.sources import FolderSource

# Folders


def test_files_of_file_managers_are_no_pictures(tmp_path):
    for n, name in enumerate(
        (
            "cat/0.png",
            "cat/.ipynb_checkpoints/0-checkpoint.png",
            "cat/._0.png",
            "__MACOSX/cat/0.png",
            "dog/@eaDir/0.png/THUMB.png",
            "dog/1.PNG",
            "dog/$RECYCLE.BIN/2.png",
            ".git/x.png",
        )
    ):
        write(tmp_path / name, n)
    for name in (".DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    rows, tally = read(FolderSource(folder=tmp_path))
    assert [(r.key, r.label) for r, _ in rows] == [("cat/0.png", "cat"), ("dog/1.PNG", "dog")]
    assert (tally.seen, tally.skipped) == (2, 0)
    ignored, others = tally.ignored.values()
    assert (others.count, others.first) == (1, ["README.md"])
    assert set(ignored.first) <= {
        ".git",
        "__MACOSX",
        "cat/.ipynb_checkpoints",
        "cat/._0.png",
        "dog/$RECYCLE.BIN",
        "dog/@eaDir",
    }
    assert ignored.count == 6
    assert keys_of(FolderSource(folder=tmp_path / "cat" / ".ipynb_checkpoints")) == ["0-checkpoint.png"]


def test_links_are_followed_once_and_dead_ones_counted(tmp_path):
    write(tmp_path / "store" / "a.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "train" / "folder.png").mkdir()
    rows, tally = read(FolderSource(folder=tmp_path / "train"))
    assert [(r.key, r.label) for r, _ in rows] == [("cat/a.png", "cat")]
    assert list(tally.bad) == ["a file that cannot be read (No such file or directory)"]


def test_names_of_macs_and_of_other_encodings(tmp_path):
    write(tmp_path / "cafe\u0301" / "0.png")
    source = FolderSource(folder=tmp_path, only=("caf\u00e9",))
    assert [r.label for r, _ in read(source)[0]] == ["caf\u00e9"]
    assert plain(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\\udce9.png"
    assert plain("\ud800") == "\\ud800"


def test_pictures_that_are_not_read_are_counted_and_named(tmp_path):
    for n in range(60):
        write(tmp_path / "cat" / f"{n:02}.png", n)
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"x")
    (tmp_path / "cat" / "11.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    rows, tally = read(FolderSource(folder=tmp_path))
    assert (len(rows), tally.seen, tally.skipped) == (59, 61, 2)
    tally.check("train")
    lines = lines_of(tally.account("train", tmp_path, {"to retain": 59}))
    assert lines == [
        f"train: 59 of 61 records of {tmp_path} read; kept: 59 to retain",
        "train: left out 1: a Git LFS pointer instead of the file (run `git lfs pull`) (cat/11.png)",
        "train: left out 1: a format that is not read (.heic) (cat/phone.HEIC)",
    ]
    json.dumps(tally.account("train", tmp_path))


def test_a_repeated_record_is_left_out_once(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"none")
    rows, tally = read(FolderSource(folder=tmp_path, repeat=3))
    assert (len(rows), tally.seen, tally.skipped) == (3, 2, 1)


def test_shares_are_of_what_was_asked_for(tmp_path):
    for n in range(100):
        write(tmp_path / ("cat" if n < 5 else "dog") / f"{n:03}.png", n)
    (tmp_path / "cat" / "000.png").write_bytes(b"none")
    _, tally = read(FolderSource(folder=tmp_path, only=("cat",)))
    with pytest.raises(SourceError, match="1 of 5 records cannot be used"):
        tally.check("train")
    with pytest.raises(SourceError, match=r"only: nothing is called 'cow'; there are: cat, dog"):
        read(FolderSource(folder=tmp_path, only=("cat", "cow")))
    with pytest.raises(SourceError, match=r"keys: nothing is called 'cat/9.png'; there are: cat/000.png, cat/001.png"):
        read(FolderSource(folder=tmp_path, keys=("cat/9.png",)))


def test_reasons_name_a_few_and_count_all():
    tally = Tally()
    for n in range(2000):
        tally.skip("broken", str(n))
    (reason,) = tally.account("train", "x")["left_out"]
    assert (reason["count"], len(reason["first"])) == (2000, NAMED)
    assert listed(map(str, range(30))).endswith("18, 19, ... (30 in all)")


# Captions


def captions(folder, **options):
    return {record.key: record.caption for record, _ in read(FolderSource(folder=folder, **options))[0]}


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).map(plain).filter(str.strip)


@FEW
@given(st.lists(TEXTS, min_size=1, max_size=4), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_every_caption_of_a_metadata_file_arrives(tmp_path, texts, as_table, encoding):
    """Captions with commas, quotes, U+2028 and the like, with a byte order mark or without, with empty lines between."""
    out = tmp_path / "f"
    rows = [{"file_name": f"cat/{n}.png", "text": text} for n, text in enumerate(texts)]
    for row in rows:
        write(out / row["file_name"])
    for old in out.glob("metadata.*"):
        old.unlink()
    if as_table:
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, ["file_name", "text"])
        table.writeheader()
        table.writerows(rows)
        (out / "metadata.csv").write_bytes(text.getvalue().encode(encoding))
    else:
        lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (out / "metadata.jsonl").write_bytes((lines + "\n\n").encode(encoding))
    by_file = captions(out)
    assert [by_file[row["file_name"]] for row in rows] == texts


def test_a_metadata_file_per_folder_and_captions_beside(tmp_path):
    for name in ("cat/a.png", "cat/deep/b.png", "dog/c.png", "dog/d.png"):
        write(tmp_path / name)
    (tmp_path / "cat" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "prompt": "inner a"}\n{"file_name": ".\\\\deep\\\\b.png", "prompt": "inner b"}\n'
        '{"file_name": "e.png", "prompt": "x"}\n'
    )
    (tmp_path / "metadata.csv").write_text("file_name;prompt\ncat/a.png;outer a\ndog/c.png;outer c\n")
    (tmp_path / "dog" / "d.TXT").write_text("\ufeffbeside d\n", encoding="utf-8")
    assert captions(tmp_path, caption="prompt") == {
        "cat/a.png": "inner a",
        "cat/deep/b.png": "inner b",
        "dog/c.png": "outer c",
        "dog/d.png": "beside d",
    }
    _, tally = read(FolderSource(folder=tmp_path), ("caption",))
    assert tally.notes["metadata.jsonl names a picture that is not there"].first == ["e.png"]
    with pytest.raises(SourceError, match=r"3 x no caption.*metadata.csv has file_name, prompt \(`caption: KEY` says"):
        tally.check("train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file_name": \n', r"metadata.jsonl:2: not a line such as"),
        ("metadata.jsonl", b'["a.png"]\n', r"metadata.jsonl:1: not a line such as"),
        (
            "metadata.jsonl",
            b'{"image": "a.png", "text": "b"}\n',
            r"metadata.jsonl:1: no file_name, .* it has: image, text",
        ),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ["b"]}\n', r"metadata.jsonl:1: the caption must be text"),
        (
            "metadata.jsonl",
            '{"file_name": "caf\u00e9.png"}'.encode("cp1252"),
            r"metadata.jsonl:1: not UTF-8 text \(byte 0xe9",
        ),
        ("metadata.csv", b"image,text\na.png,b\n", r"metadata.csv:2: no file_name, .* it has: image, text"),
        ("metadata.csv", b'file_name,text\na.png,"b\n', r"metadata.csv:\d: not valid CSV"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused_by_its_line(tmp_path, name, content, message):
    write(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(FolderSource(folder=tmp_path))


def test_a_caption_of_another_encoding_is_left_out_and_named(tmp_path):
    for n in range(40):
        write(tmp_path / "cat" / f"{n:02}.png", n).with_suffix(".txt").write_text("a cat")
    (tmp_path / "cat" / "03.txt").write_bytes("un caf\u00e9".encode("cp1252"))
    rows, tally = read(FolderSource(folder=tmp_path), ("caption",))
    assert (len(rows), tally.seen) == (39, 40)
    assert tally.bad["a caption that is not UTF-8 text (save it as UTF-8)"].first == [f"{tmp_path}/cat/03.txt:1"]
    tally.check("train")


# Pictures


def grey(image: Image.Image, channels: int = 1, kind: str = "PNG", **options):
    """(pixels as the network's input has them, notes) of an image that was stored in a file."""
    out, notes = io.BytesIO(), []
    image.save(out, kind, **options)
    return np.asarray(flat(opened(out.getvalue()), channels, notes.append)).astype(int), notes


RAMP = np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    values, notes = grey(Image.fromarray(RAMP), kind=kind)
    assert np.abs(values - RAMP / 257).max() <= 0.5
    assert notes == ["16-bit grey scaled to 8 bit"]
    colour, _ = grey(Image.fromarray(RAMP), 3, kind=kind)
    assert (colour == values[..., None]).all()
    assert grey(Image.fromarray(RAMP // 16), kind=kind)[1] == [
        "16-bit grey scaled to 8 bit (nearly black: 12-bit data?)"
    ]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_have_no_white(kind):
    with pytest.raises(Unreadable, match="32-bit pixels, whose white is not fixed"):
        grey(Image.fromarray(RAMP.astype(kind)), kind="TIFF")


@given(st.integers(1, 8), st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP"]))
@FEW
def test_orientation_tags_are_followed(orientation, kind):
    upright = Image.fromarray(np.kron(np.arange(12).reshape(3, 4) * 20, np.ones((8, 8))).astype(np.uint8)).convert(
        "RGB"
    )
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that undoes each orientation
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    values, notes = grey(stored, 3, kind, exif=exif)
    assert values.shape == (24, 32, 3)
    assert np.abs(values - np.asarray(upright)).mean() < 6
    if kind != "TIFF":  # which Pillow turns itself
        assert notes == (["turned upright as the orientation tag says"] if orientation > 1 else [])


def test_transparency_is_laid_on_white():
    clear = Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8))
    for image, options in (
        (clear, {}),
        (clear.convert("LA"), {}),
        (Image.new("P", (8, 8)), {"transparency": 0}),
        (Image.new("L", (8, 8)), {"transparency": 0}),
    ):
        for channels in (1, 3):
            values, notes = grey(image, channels, **options)
            assert (values == 255).all()
            assert notes == ["transparency laid on white"]
    opaque = picture(1).convert("RGBA")
    values, notes = grey(opaque, 3)
    assert (values == np.asarray(picture(1))).all()
    assert not notes


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used(kind):
    first, second = (Image.new("RGB", (8, 8), c) for c in ((200, 0, 0), (0, 0, 200)))
    values, notes = grey(first, 3, kind, save_all=True, append_images=[second])
    assert np.abs(values - np.array([200, 0, 0])).max() < 8
    assert notes == ["several frames or pages, of which the first is used"]


def test_a_picture_as_large_as_a_scan_is_one_record_that_is_left_out(tmp_path):
    Image.new("1", (15000, 12500)).save(tmp_path / "scan.png")
    write(tmp_path / "a.png")
    rows, tally = read(FolderSource(folder=tmp_path))
    assert [r.key for r, _ in rows] == ["a.png"]
    assert tally.bad["a picture of more than 179 million pixels"].first == ["scan.png"]


def test_programs_are_no_pictures():
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"<svg/>",
        b"<html>404</html>",
        b"",
        bytes(100),
    ):
        with pytest.raises(Unreadable, match=r"not a picture in a format that is read|an empty file"):
            opened(content)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]), st.data())
def test_damaged_pictures_are_read_or_left_out(kind, data):
    content = bytearray(encoded(1, kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content)[: data.draw(st.integers(1, len(content)))]
    try:
        size = flat(opened(content), 3, lambda _: None).size
    except Unreadable as error:
        size = str(error)
    assert size
