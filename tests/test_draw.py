"""Images that a model draws as data for a task: by prompt, by seed, and sorted into memorised and other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import LATENT, tiny_model, tiny_task

from raysweep.cli import main
from raysweep.config.presets import path_of
from raysweep.config.reader import load
from raysweep.models.latent import LatentText
from raysweep.storage.files import write_folder
from raysweep.tasks.drawing import Drawing, by_label, by_prompt, draw, folder_of, sort_in_two
from raysweep.tasks.prompts import PromptRow
from raysweep.tasks.records import Tally
from raysweep.tasks.sources import FolderSource


@pytest.fixture(scope="module")
def model() -> LatentText:
    return LatentText.build(LATENT, 0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "m"
    model.save(out)
    return out


def call(*arguments: str):
    return CliRunner().invoke(main, ["draw", *map(str, arguments)])


def test_a_task_reads_what_was_drawn(folder, tmp_path):
    result = call(
        folder, tmp_path / "out", "--prompt", "a ring", "--prompt", "the small box", "--count", "3", "--steps", "2"
    )
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"{tmp_path / 'out'}  3 images in each of 2 folders\n")
    records = list(FolderSource(folder=tmp_path / "out").records(Tally()))
    assert [r.label for r in records] == ["a ring"] * 3 + ["the small box"] * 3
    assert [r.caption for r in records] == [r.label for r in records]
    assert all(r.open().size == (8, 8) for r in records)


def test_an_image_depends_on_prompt_seed_and_number_alone(model, tmp_path):
    few, many, other = (Drawing(2, 5, 2, 3.0), Drawing(11, 5, 2, 3.0), Drawing(2, 6, 2, 3.0))
    ticks: list[tuple[int, int]] = []
    for name, prompts, drawing in (
        ("few", ["a ring"], few),
        ("many", ["a dot", "a ring"], many),
        ("other", ["a ring"], other),
    ):
        draw(model, by_prompt(prompts), drawing, tmp_path / name, lambda *done: ticks.append(done))
    assert ticks[-1] == (2, 2)
    for number in ("00000", "00001"):
        image = (tmp_path / "few" / "a ring" / f"{number}.png").read_bytes()
        assert image == (tmp_path / "many" / "a ring" / f"{number}.png").read_bytes()
        assert image != (tmp_path / "other" / "a ring" / f"{number}.png").read_bytes()
    assert len(list((tmp_path / "many" / "a ring").glob("*.png"))) == 11


def test_prompts_of_a_label_take_turns(model, tmp_path):
    rows = [PromptRow("a ring", "ring"), PromptRow("a box", "box"), PromptRow("the small ring", "ring")]
    assert by_label(rows) == {"ring": ["a ring", "the small ring"], "box": ["a box"]}
    draw(model, by_label(rows), Drawing(3, 0, 2, 1.0), tmp_path / "out", lambda *_: None)
    captions = [p.read_text() for p in sorted((tmp_path / "out" / "ring").glob("*.txt"))]
    assert captions == ["a ring", "the small ring", "a ring"]
    images = [p.read_bytes() for p in sorted((tmp_path / "out" / "ring").glob("*.png"))]
    assert len(set(images)) == 3


def test_the_prompts_of_a_preset_are_drawn(folder, tmp_path):
    out = tmp_path / "out"
    result = call(folder, out, "--for", "rgd-sd-artist", "--count", "2", "--steps", "1")
    assert result.exit_code == 0, result.output
    records = list(FolderSource(folder=out).records(Tally()))
    prompts = load(path_of("rgd-sd-artist"), (), absent=True).task.search_prompts.rows()
    assert {r.label for r in records} == {row.label for row in prompts}
    assert {(r.caption, r.label) for r in records} <= {(row.prompt, row.label) for row in prompts}


def pictures(folder, memorised: int, others: int) -> None:
    """Copies of one picture but for a little noise, and pictures of another kind that differ a lot."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(70, 180, (2, 8, 8, 3))
    folder.mkdir(parents=True)
    for k in range(memorised + others):
        copied = k % 2 == 0 and k // 2 < memorised
        x = kinds[int(copied)] + rng.integers(-70, 70, kinds[0].shape) // (10 if copied else 1)
        Image.fromarray(x.astype(np.uint8)).save(folder / f"{k:05}.png")
        (folder / f"{k:05}.txt").write_text("caption")


@pytest.mark.parametrize("name", ["all", "other"])
def test_the_more_alike_are_memorised(tmp_path, name):
    pictures(tmp_path / name, 8, 12)
    memorised, other = sort_in_two(tmp_path / name)
    assert (memorised.name, memorised.images, other.images) == ("memorised", 8, 12)
    assert memorised.spread < 10 < other.spread
    names = {p.name for p in (tmp_path / "memorised").iterdir()}
    assert names == {f"{2 * k:05}.{kind}" for k in range(8) for kind in ("png", "txt")}
    assert {p.name for p in tmp_path.iterdir()} == {"memorised", "other"}


def test_too_few_or_equal_images_cannot_be_sorted(tmp_path):
    pictures(tmp_path / "few", 2, 1)
    with pytest.raises(ValueError, match="3 images are too few"):
        sort_in_two(tmp_path / "few")
    (tmp_path / "same").mkdir()
    for k in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / "same" / f"{k}.png")
    with pytest.raises(ValueError, match="all images are the same"):
        sort_in_two(tmp_path / "same")


def test_sorted_images_of_one_prompt(folder, tmp_path):
    result = call(folder, tmp_path / "out", "--prompt", "a ring", "--count", "6", "--steps", "2", "--sort")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"memorised", "other"}
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6
    assert "look whether the first is one picture" in result.output


def test_mistakes_leave_nothing(folder, tmp_path):
    tiny_model(tiny_task()).save(tmp_path / "pixels")
    (tmp_path / "there").mkdir()
    for message, arguments in {
        "is a pixel-ddpm model; prompts are for text-to-image models": (
            tmp_path / "pixels",
            tmp_path / "out",
            "--prompt",
            "a",
        ),
        "there: exists already": (folder, tmp_path / "there", "--prompt", "a"),
        "--sort: takes the images of one --prompt": (
            folder,
            tmp_path / "out",
            "--prompt",
            "a",
            "--prompt",
            "b",
            "--sort",
        ),
        "'a/b' and 'a:b' would share the folder 'a_b'": (
            folder,
            tmp_path / "out",
            "--prompt",
            "a/b",
            "--prompt",
            "a:b",
        ),
        "1 images are too few": (folder, tmp_path / "out", "--prompt", "a", "--count", "1", "--steps", "1", "--sort"),
        "say what to draw: --prompt or --for": (folder, tmp_path / "out"),
        "has no task.search_prompts": (folder, tmp_path / "out", "--for", "siss-celebahq"),
        "no such folder": (tmp_path / "no/where/at all", tmp_path / "out", "--prompt", "a"),
    }.items():
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"pixels", "there"}


def test_names_of_folders():
    assert folder_of('A "cat"/dog: 3') == "A _cat_dog_ 3"
    assert folder_of("..") == "_"
    assert folder_of("雪 in Ångström's garden") == "雪 in Ångström's garden"


def test_an_interrupted_folder_is_taken_away(tmp_path):
    def fill(folder):
        (folder / "part").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", fill)
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_global_random_state(model, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draw(model, by_prompt(["a ring"]), Drawing(1, 0, 1, 1.0), tmp_path / "out", lambda *_: None)
    assert torch.equal(torch.get_rng_state(), before)
