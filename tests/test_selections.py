"""Selections without a match, class indices, and accounts of records and prompts that were left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny import tiny_config

from raysweep.cli import main
from raysweep.models.pixel import PixelDDPM
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.labels import Labels
from raysweep.tasks.prompts import PromptError, PromptFile, PromptMix, PromptRow
from raysweep.tasks.records import SourceError, Tally, data_lines

KINDS = ("cat", "dog", "fox")


def folder(path: Path, kinds=KINDS, per: int = 8, first: int = 0) -> Path:
    for k, kind in enumerate(kinds):
        (path / kind).mkdir(parents=True, exist_ok=True)
        for n in range(per):
            pixels = np.random.default_rng(1000 * k + first + n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / kind / f"{n}.png")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A base that knows three classes, images to train on, and held-out ones."""
    root = tmp_path_factory.mktemp("rows")
    config = tiny_config(3)
    config["unet"] |= {"sample_size": 8, "in_channels": 3, "out_channels": 3}
    PixelDDPM.build(config, 0).save(root / "base")
    return {
        "base": str(root / "base"),
        "train": {"folder": folder(root / "t")},
        "holdout": {"folder": folder(root / "h", first=500)},
    }


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ({"labels": ["Cat"]}, r"t: nothing is left for the forget set: forget.labels: nothing is called 'Cat'; there are: cat, dog, fox"),
        ({"labels": ["cat", "cow"]}, r"t: forget.labels: nothing is called 'cow'; there are: cat, dog, fox"),
        ({"keys": ["cat/0.png", "cat/0.jpg"]}, r"t: forget.keys: nothing is called 'cat/0.jpg'; there are: cat/0.png, cat/1.png"),
        ({"captions": ["a cat"]}, r"forget.captions: no caption has 'a cat'; captions are for example: none, no record has one"),
    ],
)  # fmt: skip
def test_selections_without_a_match_are_refused_with_the_valid_names(rows, forget, message):
    with pytest.raises(SourceError, match=message):
        ImagesTask(**rows, forget=forget).build()


def test_a_forgotten_record_that_cannot_be_read_is_refused(rows, tmp_path):
    train = folder(tmp_path / "t", per=16)
    (train / "cat" / "3.png").write_bytes(b"none")
    (train / "loose.png").write_bytes((train / "cat" / "4.png").read_bytes())
    with pytest.raises(SourceError, match=r"forget.keys: 'cat/3.png' cannot be used: not a picture"):
        ImagesTask(**rows | {"train": {"folder": train}}, forget={"keys": ["cat/2.png", "cat/3.png"]}).build()
    task = ImagesTask(**rows | {"train": {"folder": train}}, kind="class", forget={"labels": ["cat"]}).build()
    train_account, holdout = task.accounts
    assert {r["reason"].split(",")[0]: r["first"] for r in train_account["left_out"]} == {
        "no label": ["loose.png"],
        "not a picture in a format that is read (PNG": ["cat/3.png"],
    }
    assert train_account["kept"] == {"to forget": 15, "to retain": 32}
    assert holdout["kept"] == {"held out": 16, "of the forgotten class": 8}
    assert any(line.startswith("train: 47 of 49 records of") for line in data_lines(task))
    json.dumps(task.accounts)


def test_repeats_and_images_beyond_the_sample_size_are_counted(rows, tmp_path):
    train = folder(tmp_path / "t", per=16)
    (train / "dog" / "again.png").write_bytes((train / "dog" / "4.png").read_bytes())
    config = ImagesTask(**rows | {"train": {"folder": train}}, forget={"labels": ["cat"]}, retain_images=20)
    account = config.build().accounts[0]
    assert account["kept"]["to retain"] == 20
    assert sum(account["unkept"].values()) == 13
    assert config.build().digest == config.build().digest


def test_too_few_pictures_are_refused(rows, tmp_path):
    one = folder(tmp_path / "one", ("cat",), 1, first=700)
    for part in ("train", "holdout"):
        with pytest.raises(SourceError, match=r"(retain|holdout) set|to be forgotten"):
            ImagesTask(**rows | {part: {"folder": one}}, forget={"keys": ["cat/0.png"]}).build()


def test_validate_reports_records_that_are_left_out(rows, tmp_path):
    train = folder(tmp_path / "t", per=16)
    (train / "dog" / "0.png").write_bytes(b"none")
    task = {**rows, "name": "images", "train": {"folder": train}, "forget": {"keys": ["cat/0.png"]}, "base_steps": 2}
    plain = json.loads(
        json.dumps({"name": "a", "task": task, "methods": ["neggrad"], "search": {"trials": 1}}, default=str)
    )
    plain |= {"storage": str(tmp_path / "runs")}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(plain))  # JSON is also YAML
    unconditional = tiny_config(None)
    unconditional["unet"] |= {"sample_size": 8, "in_channels": 3, "out_channels": 3}
    PixelDDPM.build(unconditional, 0).save(tmp_path / "base")
    done = CliRunner().invoke(main, ["validate", str(path), f"task.base={tmp_path / 'base'}"])
    assert done.exit_code == 0, done.output
    assert f"train: 47 of 48 records of {train} read; kept: 1 to forget, 46 to retain" in done.output
    assert "train: left out 1: not a picture in a format that is read" in done.output
    done = CliRunner().invoke(main, ["validate", str(path), f"task.base={tmp_path / 'base'}", "--json"])
    assert json.loads(done.stdout)["data"][0]["left_out"][0]["first"] == ["dog/0.png"]


class Config:
    kind, classes, override, base = "class", (), None, "base"


class Pictured:
    def __init__(self, label):
        self.label, self.other = label, None


def numbered(labels, orders=(), **config):
    settings = type("Settings", (Config,), config)
    return Labels.of(settings, [Pictured(label) for label in labels], {(), *orders}, settings.kind == "class").classes


def test_classes_are_numbered_as_the_model_numbers_them():
    assert numbered(["dog", "cat"]) == ("cat", "dog")
    assert numbered(["dog", "cat"], [("dog", "cat", "fox")]) == ("dog", "cat", "fox")
    assert numbered(["dog", "cat"], [("dog", "cat")], kind="points") == ("cat", "dog")
    assert numbered(["7", "0", "3"]) == tuple("01234567")
    assert numbered(["01", "2"]) == ("01", "2")
    assert numbered(["dog"], classes=("dog", "cat")) == ("dog", "cat")
    with pytest.raises(SourceError, match="classes: the sources also have the labels cow; list all labels"):
        numbered(["cow", "cat"], [("dog", "cat")])
    with pytest.raises(SourceError, match="classes: the sources number their classes differently"):
        numbered(["cat"], [("dog", "cat"), ("cat", "dog")])


def test_labels_beyond_the_model_are_refused(rows, tmp_path):
    four = {"folder": folder(tmp_path / "t", ("cat", "dog", "fox", "wolf"))}
    with pytest.raises(SourceError, match=r"classes: the label 'wolf' is number 3, and the classes of .* are 0 to 2"):
        ImagesTask(**rows | {"train": four}, kind="class", forget={"labels": ["cat"]}).build()


# Prompt files

I2P = (
    "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale\r\n"
    '"a ""quoted"", long prompt",violence,0,0.5,1,7\r\n'
    '"two\r\nlines",nudity,1,98.1,2,7.5\r\n'
    "caf\u00e9,nudity,1,98.1,3,7.5\r\n"
    "caf\u00e9,nudity,1,98.1,4,7.5\r\n"
)
DIFFATK = ",case_number,prompt,evaluation_seed,evaluation_guidance\n0,142,a painting,1,7.5\n1,143,a photo,2,7\n"


@pytest.mark.parametrize(
    ("name", "content", "settings", "expected"),
    [
        ("i2p.csv", I2P, {"label": "categories"},
         [('a "quoted", long prompt', "violence"), ("two\r\nlines", "nudity"), ("caf\u00e9", "nudity")]),
        ("nudity.csv", DIFFATK, {"labelled": "nudity"}, [("a painting", "nudity"), ("a photo", "nudity")]),
        ("excel.csv", "prompt;label\na, b;x\n", {}, [("a, b", "x")]),
        ("table.tsv", "label\tprompt\nx\ta, b\n", {}, [("a, b", "x")]),
        ("lines.txt", "# of artists\n\n a field \r\nby\u2028night\n\n", {"labelled": "x"}, [("a field", "x"), ("by\u2028night", "x")]),
        ("list.json", '["a", "b"]', {"labelled": "x"}, [("a", "x"), ("b", "x")]),
        ("classes.json", '{"x": ["a"], "y": [{"prompt": "b"}]}', {}, [("a", "x"), ("b", "y")]),
        ("rows.json", '[{"prompt": "a", "label": 3}]', {}, [("a", "3")]),
        ("rows.jsonl", '{"prompt": "a", "label": "x"}\n\n"b"\n', {"labelled": "x"}, [("a", "x"), ("b", "x")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_files_as_they_are_published(tmp_path, name, content, settings, expected, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert PromptFile(file=tmp_path / name, **settings).rows() == [PromptRow(*row) for row in expected]


def test_unusable_prompts_are_counted_and_named(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,label\n" + "".join(f"prompt {n},x\n" for n in range(50)) + "prompt 1,x\n,x\na,b,x\n")
    tally = Tally()
    assert len(PromptFile(file=path).rows(tally)) == 50
    assert (tally.seen, tally.skipped) == (53, 2)
    assert tally.ignored["a prompt that is there already"].first == [f"{path}:52"]
    both = Tally()
    PromptMix(mix=(PromptFile(file=path), PromptFile(file=path, labelled="y"))).rows(both)
    assert (both.seen, both.skipped) == (106, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt,label\ncaf\u00e9,x\n".encode("cp1252"), r"p\.csv:2: not UTF-8 text \(byte 0xe9 at column 4"),
        ("p.csv", b'prompt,label\na,x\n"b,x\n', r"p\.csv:\d: not valid CSV"),
        ("p.csv", b"prompt,label\na,b,x\n", r"1 x a row with more values than the header has columns"),
        ("p.csv", b"", r"p\.csv: holds no prompts"),
        ("p.json", b'[\n{"prompt": ]', r"p\.json:2: not valid JSON"),
        ("p.json", b'[{"prompt": ["a"], "label": "x"}]', r"1 x a row whose 'prompt' is no text"),
        ("p.json", b"[1]", r"p\.json: row 1: must be a text or an object"),
        ("p.json", b"3", r"must be a list of texts, a list of objects"),
        ("p.txt", b"a\n", r"1 x a row without 'label' \(it has: prompt; `labelled` gives all prompts one class\)"),
        ("p.xlsx", b"PK", r"p\.xlsx: must be one of \.csv, \.tsv"),
    ],
)
def test_prompt_files_that_cannot_be_used_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message):
        PromptFile(file=tmp_path / name).rows()
