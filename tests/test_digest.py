"""The hash of a model: it covers every tensor and every setting that decides the output, and nothing else in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from family_folders import FILES, UNET
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_task

from raysweep.models import families
from raysweep.models.contents import not_read
from raysweep.models.identity import Identity, clashes

SCHEDULER = "scheduler/scheduler_config.json"
# the vision tower of a vision-language model must equal its CLIP model, so a change of one alone is refused
WEIGHTS = FILES | {"vlm": ("model.safetensors",)}
DECISIVE = [  # family, file, keys down to the setting, another value
    ("pixel", "unet/config.json", ["norm_eps"], 1e-3),
    ("pixel", "unet/config.json", ["flip_sin_to_cos"], False),
    ("pixel", SCHEDULER, ["beta_end"], 0.03),
    ("pixel", SCHEDULER, ["beta_schedule"], "linear"),
    ("pixel", SCHEDULER, ["prediction_type"], "epsilon"),
    ("pixel", SCHEDULER, ["clip_sample"], False),
    ("pixel", SCHEDULER, ["timestep_spacing"], "leading"),
    ("pixel", "raysweep_sampler.json", [], {"kind": "one_step", "t": 900}),
    ("edm", SCHEDULER, ["sigma_data"], 0.6),
    ("edm", SCHEDULER, ["rho"], 6.0),
    ("edm", "model_index.json", ["raysweep", "training", "p_mean"], -1.0),
    ("edm", "model_index.json", ["raysweep", "null_label"], 5),
    ("text", "vae/config.json", ["scaling_factor"], 0.5),
    ("text", "vae/config.json", ["act_fn"], "gelu"),
    ("text", "unet/config.json", ["attention_head_dim"], 2),
    ("text", "text_encoder/config.json", ["hidden_act"], "gelu"),
    ("text", "text_encoder/config.json", ["layer_norm_eps"], 1e-3),
    ("text", "tokenizer/tokenizer_config.json", ["model_max_length"], 5),
    ("text", "tokenizer/tokenizer_config.json", ["padding_side"], "left"),
    ("text", "tokenizer/tokenizer.json", ["model", "merges"], []),
    ("text", SCHEDULER, ["set_alpha_to_one"], True),
    ("text", SCHEDULER, ["beta_start"], 0.001),
    ("flow", SCHEDULER, ["shift"], 1.0),
    ("flow", SCHEDULER, ["use_dynamic_shifting"], True),
    ("flow", "vae/config.json", ["shift_factor"], 0.2),
    ("flow", "text_encoder_3/config.json", ["relative_attention_max_distance"], 4),
    ("flow", "tokenizer_3/tokenizer_config.json", ["model_max_length"], 6),
    ("clip", "open_clip_config.json", ["preprocess_cfg", "mean"], [0.4, 0.5, 0.5]),
    ("clip", "open_clip_config.json", ["model_cfg", "quick_gelu"], True),
    ("vlm", "config.json", ["vision_feature_layer"], -1),
    ("vlm", "config.json", ["text_config", "rms_norm_eps"], 1e-3),
    ("vlm", "generation_config.json", ["repetition_penalty"], 1.5),
    ("vlm", "processor_config.json", ["image_processor", "image_mean"], [0.1, 0.1, 0.1]),
    ("vlm", "clip/preprocessor_config.json", ["image_std"], [0.3, 0.3, 0.3]),
    ("vlm", "clip/config.json", ["text_config", "hidden_act"], "gelu"),
]
NEUTRAL = [
    ("pixel", "unet/config.json", ["_diffusers_version"], "0.99.0"),
    ("pixel", "unet/config.json", ["_name_or_path"], "somewhere/else"),
    ("pixel", "unet/config.json", ["setting_of_a_later_version"], 3),
    ("pixel", SCHEDULER, ["_diffusers_version"], "0.99.0"),
    ("pixel", SCHEDULER, ["_class_name"], "DDPMScheduler"),
    ("pixel", "model_index.json", ["_diffusers_version"], "0.99.0"),
    ("edm", SCHEDULER, ["_diffusers_version"], "0.99.0"),
    ("text", "vae/config.json", ["_name_or_path"], "somewhere/else"),
    ("text", "text_encoder/config.json", ["transformers_version"], "4.50.0"),
    ("text", "text_encoder/config.json", ["architectures"], ["Other"]),
    ("text", "text_encoder/config.json", ["torch_dtype"], "float16"),
    ("text", "tokenizer/tokenizer_config.json", ["name_or_path"], "somewhere/else"),
    ("vlm", "config.json", ["transformers_version"], "4.50.0"),
    ("vlm", "generation_config.json", ["transformers_version"], "4.50.0"),
]


def set_key(path: Path, keys: list[str], value) -> None:
    """Sets an entry of a JSON file; without keys the whole file."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    if not keys:
        content = value
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if keys:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def short(value) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("family", "file", "keys", "value"), DECISIVE, ids=short)
def test_a_setting_that_decides_the_output_changes_the_hash(copy, family, file, keys, value):
    folder = copy(family)
    before = families.load(folder)
    set_key(folder / file, keys, value)
    after = families.load(folder)
    assert after.digest != before.digest
    assert after.networks == before.networks


@pytest.mark.parametrize(("family", "file", "keys", "value"), NEUTRAL, ids=short)
def test_notes_in_a_configuration_do_not_change_the_hash(copy, family, file, keys, value):
    folder = copy(family)
    before = families.load(folder).digest
    set_key(folder / file, keys, value)
    assert families.load(folder).digest == before


@pytest.mark.parametrize(("family", "file"), [(family, file) for family, files in WEIGHTS.items() for file in files])
def test_a_changed_number_in_any_tensor_changes_the_hash(copy, family, file):
    folder = copy(family)
    whole, digests = load_file(folder / file), [families.load(folder).digest]
    names = [n for n in sorted(whole) if "vision_tower" not in n]  # which must be that of the folder `clip`
    for name in names[:: max(1, len(names) // 12)]:
        changed = whole[name].clone()
        changed.view(-1)[-1] += 1
        save_file(whole | {name: changed}, folder / file)
        digests.append(families.load(folder).digest)
    assert len(set(digests)) == len(digests)


def test_saving_again_by_the_library_keeps_the_hash(originals, tmp_path):
    pipelines = {"pixel": DDIMPipeline, "text": StableDiffusionPipeline, "flow": StableDiffusion3Pipeline}
    for family, pipeline in pipelines.items():
        options = {"safety_checker": None} if family == "text" else {}
        pipeline.from_pretrained(originals / family, **options).save_pretrained(tmp_path / family)
        assert families.load(tmp_path / family).digest == families.load(originals / family).digest
    for family in WEIGHTS:
        model = families.load(originals / family)
        model.save(tmp_path / "again" / family)
        assert families.load(tmp_path / "again" / family).digest == model.digest


@pytest.mark.parametrize("family", list(WEIGHTS))
def test_every_file_is_read_or_listed_as_not_read(copy, family):
    folder = copy(family)
    before = families.load(folder).digest
    listed = [entry for entry in not_read(folder) if ": " not in entry]
    files = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in listed]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(b"no such content")
        with pytest.raises(ValueError, match=r".+"):
            families.load(folder)
        path.write_bytes(content)
    additions = ("README.md", "safety_checker/model.safetensors", "pytorch_lora_weights.safetensors", ".git/config")
    for name in additions:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no such content")
    assert families.load(folder).digest == before
    assert {".git/", "README.md", "pytorch_lora_weights.safetensors", "safety_checker/"} <= set(not_read(folder))


def test_unused_variants_and_settings_of_the_scheduler_are_listed(copy):
    folder = copy("pixel")
    shutil.copy(folder / UNET, folder / UNET.replace(".safe", ".fp16.safe"))
    set_key(folder / SCHEDULER, ["variance_type"], "fixed_small")
    set_key(folder / SCHEDULER, ["_class_name"], "DDPMScheduler")
    scheduler = f"{SCHEDULER}: its class DDPMScheduler (only its noise schedule is used), variance_type"
    assert not_read(folder) == (UNET.replace(".safe", ".fp16.safe"), scheduler)


def identity(name: str, seed: int, dtype=torch.float32, **settings) -> Identity:
    model = tiny_model(tiny_task(), seed, dtype=dtype)
    if settings:
        model.use_sampler(**settings)
    return Identity.of(model, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_in_another_type_or_with_another_sampler_is_the_same_network(dtype):
    one, other = identity("one", 0), identity("other", 0, dtype, kind="one_step", t=900)
    assert one.digest != other.digest
    assert one.same_network(other)
    assert not one.same_network(identity("third", 1, dtype))


def test_oracles_that_are_no_models_of_their_own_are_named():
    base, one, two = identity("base", 0), identity("one", 1), identity("two", 2)
    assert clashes([one, two], base, base) == []  # the base itself is a positive control
    twice = clashes([one, two, identity("copy", 1)], base)
    assert [text.startswith(f"copy and one are the same model (hash {one.digest})") for text in twice] == [True]
    half = clashes([one, identity("half", 1, torch.float16)], base)
    assert "the same weights, with other settings or in another type" in half[0]
    assert clashes([base, one], base)[0].startswith("base is the base base")
    assert clashes([one, two], base, one)[0].startswith("one is the audited model one")
    assert len(clashes([one, one], one, one)) == 5
