"""Tasks cut from users' sources, prompts and models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny import FLOW, LATENT, flow_model, tiny_config
from user_files import CAPTIONS, KINDS, LONG, labelled, write_folder, write_parquet, write_prompts, write_shards

import raysweep
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.model_checks import check_fits
from raysweep.miniature import data
from raysweep.miniature.pictures import pictures
from raysweep.models import families
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM
from raysweep.tasks.images import ImagesTask
from raysweep.tasks.prompts import PromptError, PromptFile, PromptGrid, PromptMix, PromptRow
from raysweep.tasks.records import SourceError, data_lines


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


def test_prompts_of_files_and_grids(tmp_path):
    file, grid = write_prompts(tmp_path)
    assert file.rows()[:2] == [PromptRow("a cat on a mat", "cat"), PromptRow("A DOG in the sun", "dog")]
    assert len(grid.rows()) == 6
    assert PromptRow("a wild fox", "fox") in grid.rows()
    both = grid.model_copy(update={"other": "mood"})
    assert PromptRow("a wild fox", "fox", "wild") in both.rows()
    i2p = tmp_path / "i2p.csv"
    i2p.write_text('prompt,categories,evaluation_seed\n"a, b",violence,7\n"a, b",violence,8\nc,hate,9\n')
    assert PromptFile(file=i2p, label="categories").rows() == [PromptRow("a, b", "violence"), PromptRow("c", "hate")]
    every = PromptFile(file=i2p, labelled="nude")
    assert every.rows() == [PromptRow("a, b", "nude"), PromptRow("c", "nude")]
    assert PromptMix(mix=(every, grid, every)).rows() == every.rows() + grid.rows()
    lines = tmp_path / "lines.csv"
    lines.write_text('prompt,label\n"two\nlines",cat\n')
    assert PromptFile(file=lines).rows() == [PromptRow("two\nlines", "cat")]


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
    assert task.texts["prompts_probe"] == tuple(CAPTIONS[k] for k in KINDS)  # there is no image of a wolf
    assert len(task.splits["prompts_audit"]) == 6
    assert task.splits["forget"].cond.shape == (20, 32)
    with pytest.raises(ValueError, match="prompts are used both by the search and by the audit"):
        ImagesTask(**rows, kind="concept", search_prompts=search, audit_prompts=search).build()
    with pytest.raises(ValidationError, match="a concept needs both"):
        ImagesTask(**rows, kind="concept")
    pixel = class_conditional(tmp_path / "pixel")
    with pytest.raises(SourceError, match="is a pixel-ddpm model"):
        ImagesTask(**rows | {"base": pixel}, kind="concept", search_prompts=search, audit_prompts=audit).build()


def test_a_sweep_on_a_users_flow_model(tmp_path):
    """What an encoder does not read is stated; a method that cannot serve the family is refused with the reason."""
    longer = {name: FLOW[name] | {"max_position_embeddings": 32} for name in ("text_encoder", "text_encoder_2")}
    flow_model(**longer).save(tmp_path / "base")
    search, audit = write_prompts(tmp_path)
    train = write_parquet(tmp_path / "t.parquet", labelled(60))
    task = {
        "name": "images",
        "kind": "concept",
        "base": str(tmp_path / "base"),
        "base_steps": 5,
        "train": train.model_dump(mode="json", exclude_none=True),
        "holdout": write_parquet(tmp_path / "h.parquet", labelled(30, 700)).model_dump(mode="json", exclude_none=True),
        "forget": {"labels": ["dog"]},
        "override": "cat",
        "search_prompts": search.model_dump(mode="json", exclude_none=True),
        "audit_prompts": audit.model_dump(mode="json", exclude_none=True),
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"methods": ["graddiff", "esd", "sfd"], "task": task}))
    built, spaces = resolve_sweep(load(tmp_path / "sweep.yaml", ()))
    assert built.family == "flow"
    assert [space.method for space in spaces] == ["graddiff", "esd", "sfd"]
    cut = [line for line in data_lines(built) if "longer than the 8 tokens that text_encoder_3 reads" in line]
    assert {line.split(":")[0] for line in cut} == {"captions", "search_prompts", "audit_prompts"}
    with pytest.raises(ConfigError, match=r"sld cannot serve .* offers safe sampling, and flow models do not"):
        resolve_sweep(load(tmp_path / "sweep.yaml", ("methods=[sld]",)))


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
    trained = ImagesTask(**rows).build()
    assert trained.given_base == trained.base
    assert families.build(trained, 5).digest != families.load(task.base).digest


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


def test_near_duplicates_are_left_out_by_name_and_a_holdout_full_of_them_is_refused(tmp_path):
    base = class_conditional(tmp_path / "base")
    train = write_folder(tmp_path / "t", labelled(60)).folder
    held = write_folder(tmp_path / "h", labelled(60, 900)).folder
    smooth = [image for image, _, _ in pictures(12, 1)]
    for k, (folder, name) in enumerate(((train, "dog/known.png"), (train, "cat/gone.png"), (train, "cat/one.png"))):
        smooth[k].save(folder / name)
    smooth[0].save(held / "fox" / "known.jpg", quality=80)
    smooth[1].save(train / "fox" / "gone.jpg", quality=80)
    smooth[2].save(train / "dog" / "two.jpg", quality=80)
    config = ImagesTask(
        base=base, kind="class", train={"folder": train}, forget={"labels": ["dog"]}, holdout={"folder": held}
    )
    task = config.build()
    assert not task.near_duplicates()
    train_account, held_account = task.accounts
    left = {r["reason"]: r["first"] for r in train_account["left_out"]}
    assert left == {"nearly a picture that must be forgotten": ["cat/one.png"]}
    assert [r["first"] for r in held_account["left_out"]] == [["fox/known.jpg"]]
    assert held_account["kept"]["held out"] == len(task.splits["holdout"]) == 40
    assert train_account["kept"]["to retain"] == len(task.splits["retain"]) == 42
    for number in range(3):
        (held / "cat" / f"copy-{number}.png").write_bytes((train / "cat" / f"{3 * number:05}.png").read_bytes())
    message = r"h: 4 of 44 pictures held out are nearly pictures of .*t: .*copy-0.png.*; at most 5% may be: leave these out \(`exclude`\)"
    with pytest.raises(SourceError, match=message):
        config.build()
    rest = {"folder": held, "exclude": [f"cat/copy-{k}.png" for k in range(3)]}
    assert len(ImagesTask(**config.model_dump() | {"holdout": rest}).build().splits["holdout"]) == 40
    with pytest.raises(SourceError, match=r"exclude: nothing is called 'cat/4\.png'"):
        ImagesTask(**config.model_dump() | {"holdout": rest | {"exclude": ["cat/4.png"]}}).build()


def test_single_pictures_of_a_class_conditional_model(tmp_path):
    """Each is drawn and noised under its own label, by methods and by checks."""
    base = class_conditional(tmp_path / "base")
    config = ImagesTask(
        base=base,
        train=write_folder(tmp_path / "t", labelled(60)),
        forget={"keys": ["dog/00001.png"]},
        holdout=write_folder(tmp_path / "h", labelled(60, 900)),
        steps=3,
    )
    task = config.build()
    assert (task.kind, task.class_names, task.forget_class) == ("points", (), None)
    assert task.splits["forget"].cond.tolist() == [1]
    assert torch.equal(task.splits["retain"].cond, task.splits["retain"].groups)
    model = families.load(base)
    check_fits(model, base, task)
    changed = raysweep.unlearn(model, task, "siss", steps=2, batch_size=4, lr=1e-3)
    small = {
        "samples": 20,
        "noises": 20,
        "loss_noises": 20,
        "loss_images": 2,
        "timesteps": 2,
        "membership_images": 10,
        "injection_steps": 2,
    }
    checks = ["denoising", "reconstruction", "generation", "altered", "loss", "fidelity"]
    rows = raysweep.measure(changed, task, checks, base=model, **small).to_pylist()
    assert {r["check"] for r in rows if r["status"] == "ok"} == set(checks)
    assert not [r for r in rows if r["status"] == "failed"]
    bare = config.model_dump() | {"holdout": {"folder": tmp_path / "h", "label": None}}
    with pytest.raises(SourceError, match="no label, which the task needs"):
        ImagesTask(**bare).build()
