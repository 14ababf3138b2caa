"""Vision-language models: loading a saved one with the plain library, the tensors that an edit changes, and questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import vlm_pairs
from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

from evaluators.base import Subject
from evaluators.questions import Questions
from methods.slug import SLUG
from raysweep.export import delta
from raysweep.miniature import data, models
from raysweep.miniature.pictures import pictures, tensors
from raysweep.models import families
from raysweep.models.vision_language import PROMPT, QUESTION, VisionLanguage
from raysweep.tasks.images import ImagesTask

NAMES = ("Elon Musk", "Jeff Bezos", "Taylor Swift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that has learned three names."""
    out = tmp_path_factory.mktemp("vlm") / "model"
    models.vlm(out, NAMES, steps=150, images=40)
    return out


@pytest.fixture(scope="module")
def model(folder) -> VisionLanguage:
    return families.load(folder)


def held_out(count: int) -> tuple[torch.Tensor, list[int]]:
    rows = pictures(16, count, digits=range(3), skip=100)
    return tensors([image for image, _, _ in rows]), [digit for _, digit, _ in rows]


def edited(model: VisionLanguage) -> VisionLanguage:
    """The same model after SLUG moved one tensor of its tower."""
    task, _ = vlm_pairs()
    captions = model.tokens([f"a photo of {name}" for name in NAMES])
    for split, (x, cond) in task.rows.items():
        task.rows[split] = (x, captions[torch.arange(len(cond)) % 3])
    import copy

    other = model.with_net(copy.deepcopy(model.net))
    hp = SLUG.Hyperparameters(step=0.5, passes=1)
    method = SLUG(other, hp, SLUG.prepare(other, task, 0, hp), task.goal)
    method.step(task.batch(method.draws(), 0, 0))
    method.finish()
    return other


def test_transformers_gives_the_same_answers(model, tmp_path):
    changed = edited(model)
    changed.save(tmp_path / "out")
    x, _ = held_out(2)
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = LlavaProcessor.from_pretrained(tmp_path / "out")
    from PIL import Image

    pictures = [Image.fromarray(p) for p in ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    inputs = processor(
        images=pictures, text=[PROMPT.format(question=QUESTION)] * len(x), return_tensors="pt", padding=True
    )
    out = whole.generate(**inputs, max_new_tokens=12, do_sample=False)
    plain = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [a.strip() for a in plain] == changed.answers(x, QUESTION)
    clip = CLIPModel.from_pretrained(tmp_path / "out" / "clip")
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), changed.net.parameters(), strict=True))
    assert families.load(tmp_path / "out").digest == changed.digest != model.digest


def test_only_edited_tensors_of_layers_that_are_read_change(model, folder, tmp_path):
    changed = edited(model)
    changed.save(tmp_path / "out")
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).state_dict() for f in (folder, tmp_path / "out"))
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert len(moved) == 1
    assert "vision_tower.encoder.layers" in moved[0]
    free = [n for n, p in model.net.named_parameters() if p.requires_grad]
    assert {n.split("layers.")[1][0] for n in free if "layers." in n} == {"0", "1"}, "the last of three is not read"
    assert not [n for n in free if not n.startswith("vision_model") or "post_layernorm" in n]
    header = delta.write(tmp_path / "d.safetensors", folder, tmp_path / "out")
    assert header["tensors"] == 1
    assert delta.apply(tmp_path / "d.safetensors", folder, tmp_path / "again") == changed.digest


def test_a_model_on_several_devices_gives_the_same_answers(model, folder):
    """Here all of them are the CPU; hooks carry what passes between them as between GPUs."""
    x, _ = held_out(4)
    other, changed = families.load(folder), model.with_net(models.untrained_vlm(NAMES, seed=5).net)
    parts = [f"model.{n}" for n, _ in other.around.vlm.model.named_children()]
    other.spread(dict.fromkeys(("lm_head", *parts), "cpu"))
    assert set(other.around.vlm.hf_device_map) == {"lm_head", *parts}
    assert other.answers(x, QUESTION) == model.answers(x, QUESTION)
    again = other.with_net(changed.net)
    assert again.answers(x, QUESTION) == changed.answers(x, QUESTION) != model.answers(x, QUESTION)
    assert not [m for m in again.net.modules() if hasattr(m, "_hf_hook")]
    assert again.digest == changed.digest


def test_the_check_counts_correct_names_in_answers(model, tmp_path):
    x, digits = held_out(10)
    answers = model.answers(x, QUESTION)
    assert np.mean([NAMES[d] in a for d, a in zip(digits, answers, strict=True)]) > 0.8
    for part, skip in (("train", 0), ("held", 100)):
        data.tree(tmp_path / part, NAMES, images=20, size=16, skip=skip)
    model.save(tmp_path / "base")
    captions = {"captioned": "a photo of {label}"}
    grid = {"slots": {"who": NAMES}, "label": "who"}
    task = ImagesTask(
        kind="concept",
        base=str(tmp_path / "base"),
        forget={"labels": [NAMES[0]]},
        train={"folder": tmp_path / "train", **captions},
        holdout={"folder": tmp_path / "held", **captions},
        search_prompts={"template": "a photo of {who}", **grid},
        audit_prompts={"template": "a picture of {who}", **grid},
    ).build()
    assert task.family == "vlm"
    assert task.views[0] == "questions.forget_accuracy"
    subject = Subject(model, task, None, {"judge": "audit"}, lambda name, n: torch.arange(n))
    values = Questions().values(Questions().scores(subject), subject)
    assert values["forget_accuracy"] > 0.8
    assert values["retain_accuracy"] > 0.8
    silent = Subject(model.fresh(3), task, None, {"judge": "audit"}, lambda name, n: torch.arange(n))
    assert Questions().values(Questions().scores(silent), silent)["retain_accuracy"] < 0.8


def test_incomplete_folders_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("clip"))
    with pytest.raises(ValueError, match="must hold the CLIP model that the vision tower is of"):
        families.load(tmp_path / "bare")
    shutil.copytree(folder, tmp_path / "other")
    models.untrained_vlm(NAMES, seed=5).net.save_pretrained(tmp_path / "other" / "clip")
    with pytest.raises(ValueError, match=r"is not the CLIP model of this vision tower: .* tensors differ"):
        families.load(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors: cannot be read, it is cut short"):
        families.load(tmp_path / "cut")
    for part in ("", "clip/"):
        mute, foreign = tmp_path / f"mute{part[:4]}", tmp_path / f"foreign{part[:4]}"
        shutil.copytree(folder, mute)
        (mute / f"{part}tokenizer.json").unlink()
        with pytest.raises(ValueError, match=rf"{mute}.*: tokenizer\.json or .* is missing"):
            families.load(mute)
        shutil.copytree(folder, foreign)
        known = json.loads((foreign / f"{part}tokenizer_config.json").read_text())
        known["extra_special_tokens"] = [f"<more-{i}>" for i in range(500)]
        (foreign / f"{part}tokenizer_config.json").write_text(json.dumps(known))
        with pytest.raises(ValueError, match=rf"{foreign}.* tokens, but the model knows"):
            families.load(foreign)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("clip/preprocessor_config.json", "image_mean", "0.5"),
        ("clip/preprocessor_config.json", "image_mean", [0.5, "a", 0.5]),
        ("clip/preprocessor_config.json", "image_std", [0.2, 0.2, 0.0]),
        ("clip/preprocessor_config.json", "image_std", [0.2, 0.2]),
        ("processor_config.json", "image_std", [0.2, None, 0.2]),
    ],
)
def test_an_image_processor_must_scale_by_numbers(folder, tmp_path, file, key, value):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / file).read_text())
    config.get("image_processor", config)[key] = value
    (other / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{key}|{(other / file).parent}"):
        families.load(other)
