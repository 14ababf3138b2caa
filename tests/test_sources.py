"""Image sources in every format, written by the formats' own libraries; unreadable records; tasks cut from them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from tiny import LATENT, tiny_config

from raysweep.miniature import data
from raysweep.miniature.pictures import pictures
from raysweep.models import families
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.prompts import PromptError, PromptFile, PromptGrid, PromptMix
from raysweep.tasks.records import SourceError, Tally
from raysweep.tasks.sampling import Sample, pixels
from raysweep.tasks.sources import (
    FolderSource,
    MixedSource,
    ParquetSource,
    ShardSource,
    Source,
    TorchvisionSource,
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
    """Other bytes than CIFAR-10's fail torchvision's own hash check, and say how to get the data."""
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
            sample.add(images[i], str(i), None)
        return [p.label for p in sample.images()]

    first = taken(range(30))
    assert len(first) == len(set(first)) == 8
    assert taken(reversed(range(30))) == first
    assert taken(range(30), seed=1) != first
    assert taken([*range(30), *range(30)]) == first
    assert len(taken([3] * 5, repeats=True)) == 5


def class_conditional(folder: Path, classes: int = 3) -> str:
    config = tiny_config(classes)
    config["unet"] |= {"sample_size": 8, "in_channels": 3, "out_channels": 3}
    PixelDDPM.build(config, 0).save(folder)
    return str(folder)


def test_a_class_of_a_users_model(tmp_path):
    base = class_conditional(tmp_path / "base")
    config = ImagesTask(
        kind="class",
        base=base,
        train=write_parquet(tmp_path / "train.parquet", labelled(60)),
        forget={"labels": ["dog"]},
        holdout=write_folder(tmp_path / "held", labelled(30, 1000)),
        override="fox",
        retain_images=30,
    )
    task = config.build()
    assert task.family == "pixel-ddpm"
    assert (task.forget_class, task.override_class, task.class_names) == (1, 2, KINDS)
    assert len(task.splits["forget"]) == 20
    assert len(task.splits["retain"]) == 30
    assert set(task.splits["retain"].groups.tolist()) == {0, 2}
    assert set(task.splits["forget_holdout"].groups.tolist()) == {1}
    assert not set(task.splits["judge_probe"].ids) & set(task.splits["judge_audit"].ids)
    assert task.digest == config.build().digest
    assert task.sampling == {"steps": config.steps, "guidance": config.guidance}
    released = config.model_copy(update={"guidance": 3.0, "eta": 1.0}).build()  # w = 2 with the noise of DDPM
    assert released.sampling == {"steps": config.steps, "guidance": 3.0, "eta": 1.0}
    assert released.digest != task.digest


def test_pictures_of_a_captioned_model(tmp_path):
    LatentText.build(LATENT, 0).save(tmp_path / "base")
    config = ImagesTask(
        base=str(tmp_path / "base"),
        train=write_shards(tmp_path / "train", labelled(30)),
        forget={"captions": ["dog"]},
        holdout=write_folder(tmp_path / "held", labelled(40, 1000)),
    )
    task = config.build()
    assert task.family == "text-ddpm"
    assert len(task.splits["forget"]) == 10
    assert task.splits["forget"].cond.shape == (10, 6)
    assert task.forget_class is None
    without = config.model_copy(update={"holdout": write_folder(tmp_path / "bare", labelled(40, 2000), "none")})
    with pytest.raises(SourceError, match="40 of 40 records cannot be used: 40 x no caption, which the model needs"):
        without.build()


def test_selections_that_cannot_work(tmp_path):
    base = class_conditional(tmp_path / "base")
    rows = {
        "base": base,
        "train": write_folder(tmp_path / "t", labelled(30)),
        "holdout": write_folder(tmp_path / "h", labelled(30, 500)),
    }
    with pytest.raises(ValidationError, match="name what must be forgotten"):
        ImagesTask(**rows, forget={})
    with pytest.raises(ValidationError, match="a class is named by exactly one label"):
        ImagesTask(**rows, kind="class", forget={"labels": ["cat", "dog"]})
    with pytest.raises(ValidationError, match="no such folder, and not an id on the Hugging Face hub"):
        ImagesTask(**rows | {"base": str(tmp_path / "none")}, forget={"labels": ["cat"]})
    with pytest.raises(ValueError, match="not a diffusers pipeline folder"):
        ImagesTask(**rows | {"base": str(tmp_path)}, forget={"labels": ["cat"]}).build()
    with pytest.raises(SourceError, match="nothing is left for the forget set"):
        ImagesTask(**rows, forget={"captions": ["unicorn"]}).build()
    with pytest.raises(SourceError, match="override: 'wolf' is not a label; there are: cat, dog, fox"):
        ImagesTask(**rows, kind="class", forget={"labels": ["cat"]}, override="wolf").build()
    with pytest.raises(SourceError, match="classes: the sources also have the labels fox"):
        ImagesTask(**rows, kind="class", forget={"labels": ["cat"]}, classes=("dog", "cat")).build()


def write_prompts(folder: Path) -> tuple[PromptFile, PromptGrid]:
    rows = [{"text": CAPTIONS[k], "animal": k} for k in KINDS] + [{"text": "a wolf", "animal": "wolf"}]
    (folder / "p.json").write_text(json.dumps(rows))
    grid = PromptGrid(template="a {mood} {animal}", slots={"mood": ("calm", "wild"), "animal": KINDS}, label="animal")
    return PromptFile(file=folder / "p.json", prompt="text", label="animal"), grid


def test_prompts_of_files_and_grids(tmp_path):
    file, grid = write_prompts(tmp_path)
    assert file.rows()[:2] == [("a cat on a mat", "cat", None), ("A DOG in the sun", "dog", None)]
    assert len(grid.rows()) == 6
    assert ("a wild fox", "fox", None) in grid.rows()
    both = grid.model_copy(update={"other": "mood"})
    assert ("a wild fox", "fox", "wild") in both.rows()
    i2p = tmp_path / "i2p.csv"
    i2p.write_text('prompt,categories,evaluation_seed\n"a, b",violence,7\n"a, b",violence,8\nc,hate,9\n')
    assert PromptFile(file=i2p, label="categories").rows() == [("a, b", "violence", None), ("c", "hate", None)]
    every = PromptFile(file=i2p, labelled="nude")
    assert every.rows() == [("a, b", "nude", None), ("c", "nude", None)]
    assert PromptMix(mix=(every, grid, every)).rows() == every.rows() + grid.rows()
    lines = tmp_path / "lines.csv"
    lines.write_text('prompt,label\n"two\nlines",cat\n')
    assert PromptFile(file=lines).rows() == [("two\nlines", "cat", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt,label\na,\n",
            "1 of 1 records cannot be used: 1 x a row without 'label' \\(it has: label, prompt; .*p.csv:2",
        ),
        (
            "text,label\na,b\n",
            "1 of 1 records cannot be used: 1 x a row without 'prompt' \\(it has: label, text\\) .*p.csv:2",
        ),
        ("", "p.csv: holds no prompts"),
        (None, "p.csv: No such file"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.csv").write_text(content)
    with pytest.raises(PromptError, match=message):
        PromptFile(file=tmp_path / "p.csv").rows()


def test_grids_that_do_not_fit():
    with pytest.raises(ValidationError, match="template and slots differ in place"):
        PromptGrid(
            template="a {mood} {animal}", slots={"mood": ("x",), "animal": ("y",), "place": ("z",)}, label="animal"
        )
    with pytest.raises(ValidationError, match="'kind' is not a slot"):
        PromptGrid(template="a {animal}", slots={"animal": ("y",)}, label="kind")


def test_a_concept_of_a_users_model(tmp_path):
    LatentText.build(LONG, 0).save(tmp_path / "base")
    search, audit = write_prompts(tmp_path)
    rows = {
        "base": str(tmp_path / "base"),
        "train": write_parquet(tmp_path / "t.parquet", labelled(60)),
        "holdout": write_parquet(tmp_path / "h.parquet", labelled(30, 700)),
        "forget": {"labels": ["dog"]},
    }
    task = ImagesTask(**rows, kind="concept", search_prompts=search, audit_prompts=audit).build()
    assert (task.kind, task.forget_class, task.thing) == ("concept", 1, "the concept 'dog'")
    assert task.texts["prompts_probe"] == tuple(CAPTIONS[k] for k in KINDS)  # of a wolf there is no image
    assert len(task.splits["prompts_audit"]) == 6
    assert task.splits["forget"].cond.shape == (20, 32)
    with pytest.raises(ValueError, match="prompts are used both by the search and by the audit"):
        ImagesTask(**rows, kind="concept", search_prompts=search, audit_prompts=search).build()
    with pytest.raises(ValidationError, match="a concept needs both"):
        ImagesTask(**rows, kind="concept")
    pixel = class_conditional(tmp_path / "pixel")
    with pytest.raises(SourceError, match="is a pixel-ddpm model"):
        ImagesTask(**rows | {"base": pixel}, kind="concept", search_prompts=search, audit_prompts=audit).build()


def test_a_model_on_the_hub(tmp_path, monkeypatch):
    """From the hub's own cache layout, without a network; what is not there says how to get it."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    class_conditional(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    rows = {
        "train": write_folder(tmp_path / "t", labelled(40)),
        "holdout": write_folder(tmp_path / "h", labelled(40, 500)),
        "kind": "class",
        "forget": {"labels": ["cat"]},
    }
    pinned = ImagesTask(**rows, base="someone/tiny", revision=commit)
    assert pinned.warnings == []
    assert Path(pinned.build().base) == repository / "snapshots" / commit
    loose = ImagesTask(**rows, base="someone/tiny")
    assert loose.build().digest == pinned.build().digest
    assert "someone/tiny is not pinned to a commit" in loose.warnings[0]
    with pytest.raises(ValueError, match="run `hf download someone/other --revision abc` where it can"):
        ImagesTask(**rows, base="someone/other", revision="abc").build()


def test_starting_weights_and_their_recipe(tmp_path):
    base = class_conditional(tmp_path / "base")
    rows = {
        "base": base,
        "train": write_folder(tmp_path / "t", labelled(60)),
        "kind": "class",
        "holdout": write_folder(tmp_path / "h", labelled(60, 500)),
        "forget": {"labels": ["cat"]},
    }
    with pytest.raises(ValidationError, match="base_steps: must be at least 1"):
        ImagesTask(**rows, trained=False)
    with pytest.raises(ValidationError, match="recipe: depth: not a setting of `retrain`"):
        ImagesTask(**rows, recipe={"depth": 3})
    with pytest.raises(ValidationError, match="lr"):
        ImagesTask(**rows, recipe={"lr": -1})
    task = ImagesTask(**rows, trained=False, base_steps=7, recipe={"lr": 1e-3}).build()
    assert task.given_base is None
    assert task.recipe == {"lr": 1e-3, "steps": 7}
    assert families.build(task, 5).digest == families.load(task.base).digest
    given = ImagesTask(**rows).build()
    assert given.given_base == given.base
    assert families.build(given, 5).digest != families.load(task.base).digest


def test_styles_besides_objects(tmp_path):
    """A tree of styles and objects with captions by a template: the second domain reaches judges and prompts."""
    LatentText.build(LONG, 0).save(tmp_path / "base")
    for part, skip in (("train", 0), ("held", 30)):
        data.tree(tmp_path / part, ("ring", "bar", "dot"), ("Photo", "Monet"), images=20, size=16, skip=skip)
    grid = {"slots": {"what": ("ring", "bar", "dot"), "style": ("Photo", "Monet")}, "label": "style", "other": "what"}
    folders = {"label": "grandparent", "other": "parent", "captioned": "a {other} in {label} style"}
    config = ImagesTask(
        kind="concept",
        base=str(tmp_path / "base"),
        forget={"labels": ["Monet"]},
        train={"folder": tmp_path / "train", **folders},
        holdout={"folder": tmp_path / "held", **folders},
        search_prompts={"template": "a {what} in {style} style", **grid},
        audit_prompts={"template": "the {what} in {style} style", **grid},
    )
    task = config.build()
    assert task.class_names == ("Monet", "Photo")
    assert task.forget_class == 0
    for name in ("judge_audit", "holdout", "prompts_audit", "prompts_probe"):
        assert set(task.splits[name].other.tolist()) == {0, 1, 2}
    plain = config.model_copy(update={"audit_prompts": config.audit_prompts.model_copy(update={"other": None})}).build()
    assert plain.splits["prompts_audit"].other is None


def test_duplicates_of_a_forgotten_image_go_with_it(tmp_path):
    """A picture slipped in three times: once as it is named, once under another name, and once as a coarse JPEG."""
    base = class_conditional(tmp_path / "base")
    train = write_folder(tmp_path / "t", labelled(40)).folder
    smooth = pictures(12, 1)[3][0]
    smooth.save(train / "cat" / "named.png")
    smooth.save(train / "dog" / "copy.png")
    smooth.save(train / "fox" / "again.jpg", quality=80)
    config = ImagesTask(
        base=base,
        train={"folder": train},
        forget={"keys": ["cat/named.png"]},
        holdout=write_folder(tmp_path / "h", labelled(40, 900)),
    )
    task = config.build()
    assert len(task.splits["forget"]) == 3
    assert len(task.splits["forget"].distinct()) == 2
    assert len(task.splits["retain"]) == 40
    assert not task.near_duplicates()
