"""The CLIP model of a pipeline's text encoder, and SLUG on Stable Diffusion by its losses."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import LATENT, latent_task
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from methods.esd import ESD
from methods.layers import gradient_pass
from methods.losses import contrastive_part, forget_loss, recall
from methods.retrain import Retrain, RetrainSettings
from methods.slug import SLUG, SLUGSettings
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.checks import misfits, resolve_sweep
from raysweep.models import families
from raysweep.models.latent import Frozen, LatentText
from raysweep.models.tower import Clip, TextTower, text_tensors
from raysweep.search.spaces import load as load_space
from raysweep.tasks.images import ImagesTask
from raysweep.train.jobs import Job
from raysweep.train.loop import Resident, run

PROMPTS = ["a ring", "the small box", "a dot"]


def clip_for(model: LatentText, more: int = 0, seed: int = 3) -> CLIPModel:
    """A CLIP model with random weights whose text tower has `more` blocks than the pipeline's encoder."""
    text = model.net["text_encoder"].config.to_dict()
    text |= {"num_hidden_layers": text["num_hidden_layers"] + more, "projection_dim": 12}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 12,
    }
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def adopt(encoder: CLIPTextModel, clip: CLIPModel) -> None:
    """Gives the encoder the weights of the tower."""
    with torch.no_grad():
        theirs = text_tensors(clip.text_model)
        for name, p in text_tensors(encoder).items():
            p.copy_(theirs[name])


def save_clip(clip: CLIPModel, folder: Path) -> Path:
    clip.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def pair(folder: Path, more: int = 0) -> tuple[LatentText, CLIPModel]:
    """A pipeline whose text encoder comes from a CLIP model saved in `folder`."""
    model = LatentText.build(LATENT, 0)
    clip = clip_for(model, more)
    adopt(model.net["text_encoder"], clip)
    save_clip(clip, folder)
    return families.with_tower(model, Clip.load(folder)), clip


@pytest.mark.parametrize("more", [0, 1])
def test_prompts_and_pictures_are_embedded_as_by_the_clip_model(tmp_path, more):
    model, clip = pair(tmp_path, more)
    tokens, x = model.tokens(PROMPTS), torch.rand(3, 3, 16, 16) * 2 - 1
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    mean, std = (torch.tensor(getattr(processor, k)).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = clip(input_ids=tokens, pixel_values=((x + 1) / 2 - mean) / std)
        text, image = model.tower.encode_text(tokens), model.tower.encode_image(x)
    torch.testing.assert_close(torch.nn.functional.normalize(text, dim=-1), expected.text_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(image, dim=-1), expected.image_embeds)
    torch.testing.assert_close(model.tower.logit_scale, clip.logit_scale.exp())


def test_pictures_of_another_size_are_resized_as_by_the_processor(tmp_path):
    model, clip = pair(tmp_path)
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    prepared = CLIPImageProcessor.from_pretrained(tmp_path)(images=list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixel_values=prepared).pooler_output)
        ours = model.tower.encode_image(pixels / 127.5 - 1)
    assert float(torch.nn.functional.cosine_similarity(ours, expected).min()) > 0.999  # the processor rounds to bytes


def test_an_edit_of_the_pipeline_is_the_same_edit_of_the_clip_model(tmp_path):
    model, clip = pair(tmp_path)
    name = "encoder.layers.1.mlp.fc1.weight"
    with torch.no_grad():
        for encoder in (model.net["text_encoder"], clip.text_model):
            text_tensors(encoder)[name].mul_(1.5)
        tokens = model.tokens(PROMPTS)
        expected = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)
        torch.testing.assert_close(model.tower.encode_text(tokens), expected)


@pytest.mark.parametrize("index", [0, 1])
def test_the_clip_model_may_be_of_either_encoder_of_an_xl_model(tmp_path, index):
    base = LatentText.build(LATENT, 0)
    clip = clip_for(base)
    config = copy.deepcopy(base.net["text_encoder"].config)
    config.projection_dim = 12
    encoders = [CLIPTextModel(config), CLIPTextModelWithProjection(config)]
    adopt(encoders[index], clip)
    net = torch.nn.ModuleDict(dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=True)))
    tokenizer = base.frozen.tokenizers[0]
    model = LatentText(
        torch.nn.ModuleDict({"unet": base.net["unet"], **net}),
        Frozen(base.frozen.vae, (tokenizer, tokenizer), base.frozen.scheduler),
    )
    tower = TextTower(model, Clip.load(save_clip(clip, tmp_path)))
    assert list(tower.net) == [("text_encoder", "text_encoder_2")[index]]
    tokens = base.tokens(PROMPTS)
    with torch.no_grad():
        expected = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)
        torch.testing.assert_close(tower.encode_text(model.tokens(PROMPTS)), expected)


def slug_on(folder: Path, **settings) -> tuple[LatentText, SLUG]:
    model, _ = pair(folder, 1)
    hp = SLUGSettings(loss="clip", batch_size=5, **settings)

    def refuse(*_, **__):
        raise AssertionError("the U-Net was run")

    model.net["unet"].forward = refuse
    task = latent_task(model=model)
    return model, SLUG(model, hp, SLUG.prepare(model, task, 0, hp), task.goal)


@torch.no_grad()
def loss_of(model, task) -> float:
    return float(forget_loss(model.tower, task.all_rows("forget", 0)))


def test_one_tensor_of_the_text_encoder_moves_and_the_unet_is_never_run(tmp_path):
    model, method = slug_on(tmp_path, step=0.05)
    task, before = latent_task(model=model), {n: t.clone() for n, t in model.net.state_dict().items()}
    loss = loss_of(model, task)
    assert all(n.split("/")[1].startswith("text_encoder.") for n in method.prepared)
    method.step({})
    method.finish()
    moved = {n for n, t in model.net.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(method.chosen)
    assert len(moved) == 1
    (name,) = moved
    change = model.net.state_dict()[name] - before[name]
    assert float(change.norm() / before[name].norm()) == pytest.approx(0.05, rel=1e-4)
    assert loss_of(model, task) > loss


def test_descent_lowers_the_loss(tmp_path):
    model, method = slug_on(tmp_path, step=0.05, direction="descent")
    task = latent_task(model=model)
    before = loss_of(model, task)
    method.step({})
    assert loss_of(model, task) < before


def test_the_gradient_is_that_of_the_loss(tmp_path):
    model, _ = pair(tmp_path, 1)
    model.net.double()
    model.tower.clip.double()
    name, task = "text_encoder.encoder.layers.0.mlp.fc1.weight", latent_task(model=model)
    g = gradient_pass(model.tower, task, "forget", forget_loss, [name], 4, 1, 0)[name]
    p, h = dict(model.net.named_parameters())[name], 1e-4
    rows = task.all_rows("forget", 0).to(torch.device("cpu"), torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            p.add_(sign * h * g)
            values.append(float(forget_loss(model.tower, rows)))
            p.sub_(sign * h * g)
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float((g * g).sum()), rel=1e-4)


def test_the_search_of_the_step_uses_the_clip_model(tmp_path):
    model, method = slug_on(tmp_path, step=0.1, bisection=3)
    task = latent_task(model=model)
    for step in range(method.steps):
        scalars = method.step(task.batch(method.draws(), 0, step))
    batch = task.batch(method.draws(), 0, 2)
    assert float(scalars["forget_accuracy"]) == recall(
        contrastive_part(model), batch["forget"], batch["retain"], task.goal
    )


def job_for(folder: Path, **more) -> Job:
    """SLUG by CLIP's losses on a model and a task that are saved in `folder`."""
    model, _ = pair(folder / "clip", 1)
    task = replace(latent_task(model=model), base=str(folder / "base"), clip=str(folder / "clip"))
    (folder / "task").mkdir()
    task.save(folder / "task")
    model.save(folder / "base")
    return Job(
        id="t",
        kind="prepare",
        method="slug",
        hyperparameters={"loss": "clip", "batch_size": 5},
        seed=1,
        task=str(folder / "task"),
        base=str(folder / "base"),
        out=str(folder / "prepared.safetensors"),
        **more,
    )


def test_diffusers_reads_the_candidate_of_a_worker(tmp_path):
    preparing, resident = job_for(tmp_path, modules=("text_encoder",)), Resident()
    assert run(preparing, resident).status == "ok"
    job = replace(
        preparing,
        kind="train",
        out=str(tmp_path / "out"),
        prepared=preparing.out,
        hyperparameters={"loss": "clip", "batch_size": 5, "step": 0.2},
    )
    outcome = run(job, resident)
    assert outcome.status == "ok", outcome.reason
    base, candidate = (DiffusionPipeline.from_pretrained(tmp_path / f) for f in ("base", "out"))
    changed = {
        f"{part}.{n}"
        for part in ("unet", "text_encoder", "vae")
        for (n, a), b in zip(
            getattr(base, part).state_dict().items(), getattr(candidate, part).state_dict().values(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert len(changed) == 1
    assert changed.pop().startswith("text_encoder.")
    assert families.load(tmp_path / "out").digest == outcome.digest


def test_a_base_with_another_text_encoder_is_refused(tmp_path):
    preparing = job_for(tmp_path)
    model = families.load(tmp_path / "base")
    with torch.no_grad():
        model.net["text_encoder"].get_input_embeddings().weight.add_(0.1)
    shutil.rmtree(tmp_path / "base")
    model.save(tmp_path / "base")
    outcome = run(preparing, Resident())
    assert outcome.status == "failed"
    assert "is not the CLIP model of this text encoder: embeddings.token_embedding.weight" in outcome.reason


def test_half_precision_files_count_as_the_same_encoder(tmp_path):
    model, _ = pair(tmp_path / "clip")
    with torch.no_grad():
        for p in model.net["text_encoder"].parameters():
            p.copy_(p.half().float())
    assert TextTower(model, Clip.load(tmp_path / "clip")).name == "text_encoder"


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, missing):
    pair(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(
        ValueError, match=missing.split(".")[0] if "json" in missing else "must be in safetensors format"
    ):
        Clip.load(tmp_path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    pair(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Clip.load(tmp_path)


def test_without_the_clip_model_its_loss_is_refused(tmp_path):
    task, space = latent_task(), load_space("slug", {"loss": "clip"}, "concept")
    model = families.build(task, 0)
    assert misfits(space, task, model) == [
        "loss: clip: the model comes without the CLIP model that its text encoder is of (task.clip)"
    ]
    model.train_only(("unet",))
    model, _ = pair(tmp_path)
    model.train_only(("unet",))
    assert misfits(space, task, model) == ["no eligible tensor of this model may change (train.modules)"]


def save_digits(folder: Path) -> None:
    from raysweep.miniature import data

    data.tree(folder / "train", ["ring", "box", "dot"], images=24)
    data.tree(folder / "holdout", ["ring", "box", "dot"], images=24, skip=40)


def settings_of(folder: Path, base: Path, **more) -> dict:
    said = {"captioned": "a {label}"}
    prompts = {"slots": {"what": ["ring", "box", "dot"]}, "label": "what"}
    return {
        "name": "images",
        "kind": "concept",
        "base": str(base),
        "train": {"folder": str(folder / "train"), **said},
        "holdout": {"folder": str(folder / "holdout"), **said},
        "forget": {"labels": ["ring"]},
        "override": "box",
        "search_prompts": {"template": "a {what}", **prompts},
        "audit_prompts": {"template": "the small {what}", **prompts},
        **more,
    }


def test_a_sweep_refuses_the_clip_model_of_another_encoder(tmp_path):
    model, _ = pair(tmp_path / "clip")
    model.save(tmp_path / "base")
    next(model.net["unet"].parameters()).data.add_(0.1)
    model.save(tmp_path / "oracle")
    save_clip(clip_for(model, seed=4), tmp_path / "other")
    save_digits(tmp_path)
    config = tmp_path / "sweep.yaml"
    import yaml

    task = settings_of(tmp_path, tmp_path / "base", clip=str(tmp_path / "other"))
    config.write_text(
        yaml.safe_dump(
            {
                "task": task,
                "methods": ["slug"],
                "spaces": {"slug": {"loss": "clip"}},
                "search": {"trials": 2},
                "oracle_models": [str(tmp_path / "oracle")],
            }
        )
    )
    with pytest.raises(ConfigError, match=r"task\.clip: .*other: is not the CLIP model of this text encoder"):
        resolve_sweep(load(config))
    task, spaces = resolve_sweep(load(config, (f"task.clip={tmp_path / 'clip'}",)))
    assert task.clip == str(tmp_path / "clip")
    assert spaces[0].fixed["loss"] == "clip"


def test_only_text_to_image_models_take_a_clip_model(tmp_path):
    from tiny import tiny_model, tiny_task

    tiny_model(tiny_task()).save(tmp_path / "pixels")
    pair(tmp_path / "clip")
    save_digits(tmp_path)
    task = settings_of(tmp_path, tmp_path / "pixels", clip=str(tmp_path / "clip")) | {"kind": "class"}
    with pytest.raises(ValueError, match="clip: is for text-to-image models"):
        ImagesTask(**task).build()


def test_a_clip_model_on_the_hub_should_be_pinned_to_a_commit(tmp_path):
    model, _ = pair(tmp_path / "clip")
    model.save(tmp_path / "base")
    task = settings_of(tmp_path, tmp_path / "base", clip="openai/clip-vit-large-patch14")
    assert "task.clip_revision: openai/clip-vit-large-patch14 is not pinned" in ImagesTask(**task).warnings[0]
    assert ImagesTask(**task, clip_revision="32bd64288804d66eefd0ccbe215aa642df71cc41").warnings == []
    with pytest.raises(ValueError, match=r"clip: .*nowhere: no such folder"):
        ImagesTask(**task | {"clip": str(tmp_path / "nowhere")})


def test_a_base_is_trained_in_the_named_modules_alone():
    model = LatentText.build(LATENT, 0)
    method = Retrain(model, RetrainSettings(steps=1, batch_size=4, modules=("unet",)))
    assert {n.split(".")[0] for n in method.names} == {"unet"}


def test_modules_that_there_are_not_are_refused(tmp_path):
    model, _ = pair(tmp_path / "clip")
    model.save(tmp_path / "base")
    save_digits(tmp_path)
    task = settings_of(tmp_path, tmp_path / "base", recipe={"modules": ["u-net"]})
    with pytest.raises(ValueError, match=r"recipe\.modules: .* has no u-net"):
        ImagesTask(**task).build()


def test_esd_names_the_layers_that_may_change(tmp_path):
    model, _ = pair(tmp_path)
    model.train_only(("text_encoder",))
    hp = ESD.Hyperparameters(layers="x")
    assert ESD.unsuited(hp, model, latent_task(model=model).goal) == [
        "layers: x names no weight of this model that may change; valid: u, full"
    ]
