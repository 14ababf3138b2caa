"""`raysweep init`: configs of every task, and of a user's own model and images; the page that begins with it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny import ROOT, tiny_config
from user_files import labelled, write_folder, write_parquet, write_shards

from raysweep.cli import main
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import TASKS


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder with a class-conditional model of three kinds, and images of these."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(3)
    config["unet"] |= {"sample_size": 8, "in_channels": 3, "out_channels": 3}
    PixelDDPM.build(config, 0).save(tmp_path / "model")
    for part, seed in (("train", 0), ("holdout", 1000)):
        write_folder(tmp_path / "photos" / part, labelled(60, seed))
    return tmp_path


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_a_config_with_every_setting(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("init", "a", "--task", task).exit_code == 0
    text = Path("a.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["task"]["name"] == task
    checked = call("validate", "a.yaml")
    if task == "images":
        assert all(f"  # {key}: needed" in text for key in ("base", "train", "forget", "holdout"))
        assert checked.exit_code == 2
        assert "task" in checked.output
    else:
        assert checked.exit_code == 0, checked.output


def test_the_page_works_as_it_stands(mine):
    """Its first two commands; the others are the plan and the run of the config that these made."""
    page = (ROOT / "docs" / "own-model.md").read_text()
    commands = [c for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for c in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["init", "validate", "run", "run"]
    for command in commands[:2]:
        done = call(*shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
    assert commands[-2].startswith(commands[-1])
    text = Path("mine.yaml").read_text()
    assert "cat (20), dog (20), fox (20)" in " ".join(text.split())
    assert "0 cat, 1 dog, 2 fox" in " ".join(text.replace("#", " ").split())
    config = yaml.safe_load(text)
    assert config["task"]["kind"] == "class"
    assert config["task"]["train"] == {"folder": "photos/train", "label": "parent"}


def test_an_unanswered_question_is_named_by_validate(mine):
    assert call("init", "mine", "model", "photos/train").exit_code == 0
    done = call("validate", "mine.yaml")
    assert done.exit_code == 2
    assert "task.forget" in done.output
    assert "task.holdout" in done.output


def test_sources_are_recognised(mine):
    (mine / "data").mkdir()
    write_parquet(mine / "data" / "train.parquet", labelled(12))
    write_shards(mine / "shards", labelled(12))
    for name, place, keys in (("p", "data", {"parquet"}), ("s", "shards", {"shards", "mix"})):
        done = call("init", name, "model", place)
        assert done.exit_code == 0, done.output
        source = yaml.safe_load(Path(f"{name}.yaml").read_text())["task"]["train"]
        assert keys & set(source), source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone",), "gone: no such folder"),
        (("org/model",), "org/model: no such folder; download it"),
        (("photos",), "photos"),
        (("model", "gone"), "gone: no such file or folder"),
        (("model", "model"), "model: holds no image"),
        (("model", "--task", "digits-class"), "belongs to the task `images`"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(mine, arguments, message):
    done = call("init", "mine", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not Path("mine.yaml").exists()
