"""Latent text-to-image models: the folders of diffusers' own pipelines, and their conditions."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from method_table import build, run
from tiny import LATENT, latent_task
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from raysweep.models import families
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import RECENT, Embeddings
from raysweep.models.latent import Frozen, LatentText
from raysweep.models.words import tokenizer_of

SEEDS = torch.tensor([5, 6, 7])


def plain() -> LatentText:
    model = LatentText.build(LATENT, 0)
    model.net.eval()
    return model


def xl() -> LatentText:
    """Two encoders of different widths, as in Stable Diffusion XL, with a scheduler that is not DDIM."""
    from diffusers import UNet2DConditionModel

    base = plain()
    torch.manual_seed(1)
    tokenizer = base.frozen.tokenizers[0]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=12,
        **LATENT["text_encoder"],
    )
    unet = UNet2DConditionModel(
        **LATENT["unet"] | {"cross_attention_dim": 32},
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    net = nn.ModuleDict(
        {"unet": unet, "text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}
    )
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    model = LatentText(net, Frozen(base.frozen.vae, (tokenizer, tokenizer), scheduler, zero_null=True))
    model.net.eval()
    return model


@pytest.fixture(scope="module", params=["plain", "xl"])
def model(request) -> LatentText:
    return {"plain": plain, "xl": xl}[request.param]()


@pytest.fixture
def saved(tmp_path) -> Path:
    plain().save(tmp_path / "model")
    return tmp_path / "model"


def by_pipeline(folder: Path, model: Diffusion, prompts: list[str], guidance: float) -> torch.Tensor:
    """The images that diffusers draws from the same noise, with raysweep's scheduler."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = model.scheduler
    pipe.set_progress_bar_config(disable=True)
    sizes = {"original_size": (8, 8), "target_size": (8, 8)} if isinstance(pipe, StableDiffusionXLPipeline) else {}
    images = pipe(
        prompts,
        latents=model.noise(SEEDS),
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="pt",
        height=8,
        width=8,
        **sizes,
    ).images
    return images * 2 - 1


def test_diffusers_draws_the_same_pictures(model, tmp_path):
    prompts = ["a ring", "the small box", "a dot"]
    model.save(tmp_path / "m")
    ours = model.sample(model.tokens(prompts), SEEDS, 4, 3.0)
    assert ours.shape == (3, 3, 8, 8)
    torch.testing.assert_close(ours, by_pipeline(tmp_path / "m", model, prompts, 3.0), atol=1e-5, rtol=0)


def test_edits_see_the_embeddings_of_the_unet_and_the_last_word_of_a_prompt(model):
    tokens = model.tokens(["a ring", "the small box", ""])
    hidden, last = model.attended(tokens)
    assert torch.equal(hidden, model.embed(tokens)[0])
    assert hidden.shape == (3, 6, model.net["unet"].config.cross_attention_dim)
    tokenizer = model.frozen.tokenizers[0]
    words = [tokenizer.decode(row[i]) for row, i in zip(tokens, last, strict=True)]
    assert words == ["ring", "box", tokenizer.bos_token]


@pytest.mark.parametrize("name", ["rece", "speed", "uce"])
def test_edits_change_the_cross_attention_alone(name, model):
    edited = model.with_net(copy.deepcopy(model.net))
    method, task = build(name, latent_task(model=model), model=edited, guide="override")
    assert not type(method).unsuited(method.hp, edited, task.goal)
    run(method, task)
    method.finish()
    before = model.net.state_dict()
    changed = {n for n, p in edited.net.state_dict().items() if not torch.equal(p, before[n])}
    ends = (".attn2.to_v.weight",) if name == "speed" else (".attn2.to_k.weight", ".attn2.to_v.weight")
    assert changed == {n for n in before if n.endswith(ends)}


def test_a_saved_model_is_the_same_when_loaded(model, tmp_path):
    model.save(tmp_path / "m")
    again = families.load(tmp_path / "m")
    cond = model.tokens(["a ring", "a box", "a dot"])
    assert again.digest == model.digest
    assert type(again.frozen.scheduler) is type(model.frozen.scheduler)
    assert torch.equal(again.tokens(["a ring"]), cond[:1])
    assert torch.equal(again.sample(cond, SEEDS, 4, 2.0), model.sample(cond, SEEDS, 4, 2.0))
    assert json.loads((tmp_path / "m" / "model_index.json").read_text()).get("safety_checker") in (None, [None, None])


def test_a_picture_depends_on_its_seed_and_prompt_alone(model):
    cond = model.tokens(["a ring", "a box", "a dot"])
    together = model.sample(cond, SEEDS, 3, 2.0)
    for i in range(3):
        assert torch.equal(model.sample(cond[i : i + 1], SEEDS[i : i + 1], 3, 2.0), together[i : i + 1])
    other = model.sample(model.tokens(["a box"]), SEEDS[:1], 3, 2.0)
    assert not torch.equal(other, together[:1])


def test_embeddings_are_kept_until_weights_change(model):
    cond = model.tokens(["a ring", "a box"])
    with torch.no_grad():
        first = model.embed(cond)[0]
        assert model.embed(cond)[0] is first
        weight = model.net["text_encoder"].get_input_embeddings().weight
        weight.add_(0.5)
        assert not torch.equal(model.embed(cond)[0], first)
        weight.sub_(0.5)
    assert model.embed(cond)[0].requires_grad


def test_reduced_prompts_lack_the_words_that_matter_most(model):
    prompts = ["the small ring", "a dot", ""]
    *masked, null = model.reduced(model.tokens(prompts))
    assert torch.equal(null, model.unconditional(3))
    tokenizer, length = model.frozen.tokenizers[0], model.frozen.tokenizers[0].model_max_length
    said = [tokenizer.batch_decode(cond[:, :length], skip_special_tokens=True) for cond in masked]
    assert [[len(texts[i].split()) for texts in said] for i in range(3)] == [[2, 1, 1], [1, 1, 1], [0, 0, 0]]

    with torch.no_grad():
        encode = lambda text: model.net["text_encoder"](model.tokens([text])[:, :length]).pooler_output[0]  # noqa: E731
        whole, shorter = encode(prompts[0]), ("small ring", "the ring", "the small")
        near = {text: float(torch.cosine_similarity(whole, encode(text), dim=0)) for text in shorter}
    assert said[0][0] == min(near, key=lambda text: near[text])
    assert set(said[1][0].split()) < set(said[0][0].split())
    assert all(
        torch.equal(a, b[:1]) for a, b in zip(model.reduced(model.tokens(prompts[:1])), [*masked, null], strict=True)
    )


def test_tabulated_embeddings_are_those_of_the_encoders(model):
    prompts = model.tokens(["a ring", "a box", "", "a ring", "a dot"])
    model = model.with_net(copy.deepcopy(model.net).requires_grad_(False))
    model.embeddings = Embeddings.of(model, prompts)
    assert len(model.embeddings.rows) == 4
    (hidden, added), (expected, pooled) = model.embed(prompts), model.encoded(prompts)
    torch.testing.assert_close(hidden, expected)
    if pooled is not None:
        torch.testing.assert_close(added["text_embeds"], pooled)
    unknown = model.tokens(["the small ring", "a box"])
    assert torch.equal(model.embed(unknown)[0], model.encoded(unknown)[0])
    assert model.with_net(copy.deepcopy(model.net)).embeddings is model.embeddings
    other = copy.deepcopy(model.net)
    with torch.no_grad():
        other["text_encoder"].get_input_embeddings().weight.add_(1)
    assert model.with_net(other).embeddings is None


def test_recent_embeddings_are_not_fetched_again(model):
    words = ["a ring", "a box", "", "a dot", "the small ring", "the small box"]
    kept = Embeddings.of(model, model.tokens(words))
    asked = [model.tokens([word] * 3 + ["a ring"]) for word in words]
    first = kept.look_up(asked[0])
    assert kept.look_up(asked[0].clone())[0] is first[0]
    for tokens in asked * 2:  # more than are kept
        torch.testing.assert_close(kept.look_up(tokens)[0], model.encoded(tokens)[0])
    assert len(kept.recent) == RECENT < len(asked)
    assert kept.look_up(model.tokens(["a ring", "the box"])) is None


def test_embeddings_in_half_precision_are_cached_apart(model):
    cond = model.tokens(["a ring", "a box"])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model.embed(cond)[0]
        whole = model.embed(cond)[0]
    assert not torch.equal(half.float(), whole)
    assert torch.equal(whole, model.encoded(cond)[0])


def test_an_untrained_branch_of_xl_is_zeros():
    model = xl()
    hidden, added = model.embed(model.tokens(["", "a ring"]))
    assert not hidden[0].any()
    assert not added["text_embeds"][0].any()
    assert hidden[1].any()
    assert added["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]] * 2


def test_only_the_named_modules_train():
    model = plain()
    other = LatentText(model.net, model.frozen, trains=("text_encoder",))
    moving = {n.split(".")[0] for n, p in other.net.named_parameters() if p.requires_grad}
    assert moving == {"text_encoder"}
    assert not any(p.requires_grad for p in model.frozen.vae.parameters())


def test_fresh_models_differ_by_seed_and_keep_the_frozen_parts(model):
    one, two = model.fresh(1), model.fresh(2)
    assert one.digest == model.fresh(1).digest != two.digest
    assert one.encoder_digest == model.encoder_digest
    assert one.shape == model.shape


def test_another_autoencoder_is_another_model():
    model = plain()
    digests = {model.encoder_digest, model.digest}
    with torch.no_grad():
        next(iter(model.frozen.vae.parameters())).add_(0.1)
    assert not digests & {model.encoder_digest, model.digest}


def test_known_words_are_single_tokens_and_others_are_split_into_letters():
    tokenizer = tokenizer_of(("ring", "inverted"), 12)
    assert len(tokenizer("ring inverted").input_ids) == 4
    assert len(tokenizer("gnir").input_ids) > 3
    assert tokenizer("RING").input_ids == tokenizer("ring").input_ids


def cut(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")


def foreign(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


def untokenized(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def wordy(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    tokenizer_of((*LATENT["words"], "photograph", "painting", "handwritten"), 6).save_pretrained(folder / "tokenizer")


def ambiguous(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["model"]["vocab"]["b"] = rules["model"]["vocab"]["a"]
    file.write_text(json.dumps(rules))


def other_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(**LATENT["vae"] | {"latent_channels": 4}).save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cannot be read"),
        (pickled, "pickled weights are never loaded"),
        (foreign, "holds a FluxPipeline; supported: .*StableDiffusionPipeline"),
        (untokenized, "tokenizer.json or vocab.json is missing"),
        (wordy, "the tokenizer has .* tokens, but the text encoder knows"),
        (ambiguous, "some of its tokens have the same number"),
        (other_vae, "the autoencoder makes latents of 4 channels, and the U-Net takes 2"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(saved, harm, message):
    harm(saved)
    with pytest.raises(ValueError, match=message) as error:
        families.load(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)
