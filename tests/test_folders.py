"""Model folders as users have them: their tensors must be those of the network, and their configurations must make sense."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DModel
from family_folders import FILES, UNET
from safetensors.torch import load_file, save_file
from tiny import LATENT, tiny_config

from raysweep.models import families, folders
from raysweep.models.edm import EDM
from raysweep.models.folders import VARIANTS, located
from raysweep.models.latent import LatentText
from raysweep.models.noise import row_seeds
from raysweep.models.pixel import PixelDDPM
from raysweep.models.validation import check_pass
from raysweep.models.weights import ReadOtherwise

EVERY = [(family, file) for family, files in FILES.items() for file in files]


def edit(path: Path, change: Callable[[dict], dict]) -> None:
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)


def configure(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        families.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def first(state: dict) -> str:
    return min(n for n, t in state.items() if t.is_floating_point() and t.dim())


@pytest.mark.parametrize(("family", "file"), EVERY)
def test_tensors_that_are_not_the_networks_are_refused_by_name(copy, family, file):
    folder = copy(family)
    whole = load_file(folder / file)
    name = first(whole)
    shown = name.removeprefix("text_model.")  # as the encoder itself calls them
    edit(folder / file, lambda t: {n: x for n, x in t.items() if n != name})
    refused(folder, rf"1 of \d+ are missing \(.*{shown.split('.')[-2]}.*\)|is missing")
    save_file(whole | {"odd.extra": torch.zeros(2)}, folder / file)
    refused(folder, r"1 are unknown to it \(odd\.extra\)")
    save_file(whole | {name: torch.zeros(2, 3)}, folder / file)
    refused(folder, rf"1 have another shape \(.*: \(2, 3\) in the file, \({whole[name].shape[0]},")
    save_file(whole | {name: whole[name] * torch.nan}, folder / file)
    refused(folder, "1 of its tensors hold numbers that are not finite")
    save_file({f"ema.{n}": t for n, t in whole.items()}, folder / file)
    refused(folder, r"are missing .*; \d+ are unknown to it \(ema\.")


@pytest.mark.parametrize(("family", "file"), EVERY)
def test_prefixes_of_wrappers_are_removed_with_a_warning(copy, family, file):
    folder = copy(family)
    plain = families.load(folder).digest
    whole = load_file(folder / file)
    for wrapped in ("_orig_mod.{}", "module._orig_mod.{}", "base_model.model.{}"):
        save_file({wrapped.format(n): t for n, t in whole.items()}, folder / file)
        with pytest.warns(ReadOtherwise, match=wrapped.format("").split(".")[0]):
            assert families.load(folder).digest == plain
    save_file({n.replace(".", "._orig_mod.", 1): t for n, t in whole.items()}, folder / file)
    with pytest.warns(ReadOtherwise, match="wrapped model"):
        assert families.load(folder).digest == plain
    save_file(whole | {f"module.{n}": t.clone() for n, t in whole.items()}, folder / file)
    refused(folder, "holds some tensors twice")
    save_file(whole | {"x.lora_A.default.weight": torch.zeros(1)}, folder / file)
    refused(folder, r"the tensors of an adapter \(x\.lora_A.*merge it")


@pytest.mark.parametrize("family", ["pixel", "text"])
def test_a_variant_alone_is_read_with_a_warning(copy, family):
    folder = copy(family)
    plain, half = folder / UNET, folder / UNET.replace(".safe", ".fp16.safe")
    edit(plain, lambda state: {n: t.half() for n, t in state.items()})
    digest = families.load(folder).digest
    shutil.copy(plain, half)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReadOtherwise)
        assert families.load(folder).digest == digest
    plain.unlink()
    with pytest.warns(ReadOtherwise, match="holds the variant 'fp16' of the weights alone"):
        model = families.load(folder)
    assert (model.digest, model.dtype) == (digest, torch.float32)
    shutil.copy(half, folder / UNET.replace(".safe", ".non_ema.safe"))
    refused(folder, "holds the variants fp16, non_ema")


def test_shards_are_read_and_a_missing_one_is_named(copy):
    folder = copy("pixel")
    digest = families.load(folder).digest
    net = UNet2DModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    net.save_pretrained(folder / "unet", max_shard_size="20KB")
    assert families.load(folder).digest == digest
    lost = next((folder / "unet").glob("*-00002-of-*"))
    lost.unlink()
    refused(folder, lost.name)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n"), "a pointer of Git LFS"),
        (lambda file: file.write_bytes(b""), "cut short or no safetensors file"),
        (lambda file: (file.unlink(), file.symlink_to("/nowhere/blob")), "a link to /nowhere/blob, which is not there"),
        (lambda file: file.rename(file.with_name("pytorch_lora_weights.safetensors")), "that is an adapter"),
        (lambda file: (file.parent / "config.json").unlink(), r"config\.json: is missing"),
        (lambda file: (file.parent / "config.json").write_text("{,"), r"config\.json:1: not valid JSON"),
        (lambda file: (file.parent / "config.json").write_bytes(b'{"a": "\xe9"}'), "not a text in UTF-8"),
        (lambda file: configure(file.parent / "config.json", _class_name="VQModel"), "describes a VQModel"),
        (lambda file: shutil.rmtree(file.parent.parent / "scheduler"), r"scheduler_config\.json: is missing"),
    ],
)
@pytest.mark.parametrize("family", ["pixel", "edm", "text"])
def test_damaged_and_foreign_folders_are_refused(copy, family, harm, message):
    folder = copy(family)
    harm(folder / UNET)
    refused(folder, message)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"sample_size": None}, "sample_size is null: set it to the size"),
        ({"sample_size": (4,)}, r"sample_size is \(4,\)|sample_size is \[4\]"),
        ({"out_channels": 2}, "also predicts variances"),
        ({"in_channels": 3}, "in_channels is 3 and out_channels 1"),
    ],
)
def test_networks_of_another_kind_are_refused(tmp_path, unet, message):
    config = tiny_config()
    PixelDDPM.build(config | {"unet": config["unet"] | unet}, 0).save(tmp_path / "m")
    refused(tmp_path / "m", message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "divides by zero"),
        ({"beta_schedule": "linear", "beta_start": 0.0}, "step 0 adds no noise"),
        ({"trained_betas": [0.1, 0.2, 1.5]}, "betas are not between 0 and 1"),
        ({"num_train_timesteps": 1}, "has 1 steps"),
        ({"timestep_spacing": "sideways"}, "sideways is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has no schedule of betas"),
        ({"_class_name": "EDMEulerScheduler"}, "has no schedule of betas"),
        ({"_class_name": "Nothing"}, "is not a scheduler of diffusers"),
    ],
)
@pytest.mark.parametrize("family", ["pixel", "text"])
def test_schedules_that_no_sampler_can_use_are_refused(copy, family, settings, message):
    folder = copy(family)
    configure(folder / "scheduler" / "scheduler_config.json", **settings)
    refused(folder, message)


def test_defaults_of_a_schedule_are_a_warning(copy):
    folder = copy("pixel")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "beta_schedule"} | {"beta_schequle": "linear"}))
    with pytest.warns(ReadOtherwise, match="does not say beta_schedule; .* is taken: beta_schedule = linear"):
        families.load(folder)


def test_zero_snr_goes_with_v_prediction(copy):
    folder = copy("pixel")
    configure(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    model = families.load(folder)
    assert float(model.alphas[-1]) == 0
    assert bool(model.sample(None, row_seeds(0, 0, 2), 3).isfinite().all())


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDPMScheduler])
def test_latents_are_never_clipped_and_images_are(copy, scheduler):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for family in ("text", "pixel"):
        folder = copy(family)
        scheduler(**betas).save_pretrained(folder / "scheduler")
        model = families.load(folder)
        cond = model.tokens(["a ring", "a dot"]) if family == "text" else None
        *_, (_, last) = model.trajectory(cond, row_seeds(0, 0, 2), 20)
        assert model.scheduler.config.clip_sample is (family == "pixel")
        assert (float(last.abs().max()) > 1.2) is (family == "text")
        model.save(folder.with_name(f"{family}-again"))
        assert families.load(folder.with_name(f"{family}-again")).scheduler.config.clip_sample is (family == "pixel")


def test_a_tokenizer_without_its_configuration_has_the_encoders_length(copy):
    folder = copy("text")
    expected = families.load(folder).tokens(["a ring", "the small box"])
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.warns(ReadOtherwise, match="tokenizer_config.json is missing: .* the 6 tokens of the text encoder"):
        model = families.load(folder)
    assert torch.equal(model.tokens(["a ring", "the small box"]), expected)


def test_unused_parts_may_be_missing(copy):
    folder = copy("text")
    configure(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
    )
    assert families.load(folder).family == "text-ddpm"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae: is AutoencoderTiny; supported there"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder: is none; supported there: CLIPTextModel"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor is None"),
        ("vae/config.json", {"latents_mean": [0.0, 0.0]}, "latents that are shifted are not supported"),
    ],
)
def test_parts_of_another_class_are_refused(copy, file, changes, message):
    folder = copy("text")
    configure(folder / file, **changes)
    refused(folder, message)


def test_a_text_encoder_of_another_width_is_refused(tmp_path):
    wide = LATENT["unet"] | {"cross_attention_dim": 32}
    LatentText.build(LATENT | {"unet": wide}, 0).save(tmp_path / "m")
    refused(tmp_path / "m", "gives embeddings of width 16, and the U-Net attends to those of 32")


@pytest.mark.parametrize("family", ["pixel", "edm", "text"])
def test_one_pass_on_shapes_alone(originals, family):
    model = families.load(originals / family)
    cond = model.tokens(["a ring"]) if family == "text" else None
    check_pass(model, cond, "here")
    if family == "text":
        model.net["unet"].register_to_config(num_class_embeds=3)
    else:
        model.net.register_to_config(sample_size=5)  # an odd size cannot be halved and doubled
    with pytest.raises(ValueError, match=r"^here: "):
        check_pass(model, cond, "here")


def test_edm_folders_with_wrong_settings_are_refused(copy):
    folder = copy("edm")
    index = json.loads((folder / "model_index.json").read_text())
    for settings, message in (
        ({"null_label": 40}, "null_label: 40 is not a class index of the network, 0 to 6"),
        ({"training": {"p_std": 0}}, "p_std above 0"),
        ([], "raysweep.training: may hold"),
    ):
        configure(folder / "model_index.json", raysweep=settings)
        refused(folder, message)
    del index["raysweep"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert isinstance(families.load(folder), EDM)
    configure(folder / "scheduler" / "scheduler_config.json", sigma_min=100.0)
    refused(folder, "sigma_min 100.0 is not below sigma_max")


def test_a_repository_of_variants_alone_is_fetched_again(tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns=None):
        asked.append(ignore_patterns)
        if ignore_patterns is None:
            (tmp_path / "w.fp16.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert located("someone/half-a-model") == tmp_path
    assert asked == [VARIANTS, None]
    assert located("someone/half-a-model") == tmp_path
    assert len(asked) == 3


def test_the_refusal_of_another_folder_says_where_the_pipeline_is(copy, tmp_path):
    folder = copy("pixel")
    with pytest.raises(ValueError, match=f"there is one in {folder}$"):
        families.load(tmp_path)
    with pytest.raises(ValueError, match="it is a UNet2DModel alone, a part of such a folder"):
        families.load(folder / "unet")
    with pytest.raises(ValueError, match="from_single_file"):
        located(str(folder / UNET))


@pytest.mark.parametrize("family", ["pixel", "edm"])
def test_weights_with_an_output_that_is_not_finite_are_refused(copy, family):
    folder = copy(family)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit(file, lambda t: {n: x.sign() * 3e38 if x.dim() > 1 else x for n, x in t.items()})
    model = families.load(folder)
    with pytest.raises(ValueError, match="not finite: are its weights damaged"):
        check_pass(model, None, str(folder))


@pytest.mark.parametrize("family", ["pixel", "edm"])
def test_tensors_in_two_precisions_are_read_in_single(copy, family):
    folder = copy(family)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit(file, lambda t: t | {first(t): t[first(t)].half()})
    model = families.load(folder)
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    check_pass(model, None, str(folder))


def test_loading_and_saving_show_no_bars_and_leave_the_libraries_as_they_were(copy, tmp_path, monkeypatch, capfd):
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.delenv(folders.ASYNC, raising=False)
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    assert all(library.is_progress_bar_enabled() for library in libraries)
    hub = are_progress_bars_disabled()
    families.load(copy("text")).save(tmp_path / "again")
    families.load(copy("vlm")).save(tmp_path / "again-vlm")
    assert "%|" not in capfd.readouterr().err
    with folders.reading(tmp_path):
        assert not any(library.is_progress_bar_enabled() for library in libraries)
        assert os.environ[folders.ASYNC] == "1"
    assert all(library.is_progress_bar_enabled() for library in libraries)
    assert are_progress_bars_disabled() == hub
    assert folders.ASYNC not in os.environ


def test_muted_logs_stay_muted_where_they_were():
    logging.disable(logging.ERROR)
    try:
        with folders.quiet_logs():
            assert logging.root.manager.disable == logging.ERROR
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
    with folders.quiet_logs():
        assert logging.root.manager.disable == logging.WARNING
    assert logging.root.manager.disable == logging.NOTSET
