"""Latent text-to-image models: the folders of diffusers' own pipelines, their conditions, and concept tasks on them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny import LATENT, ROOT, latent_task
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from evaluators.judge import Judge
from methods.retrain import Retrain, RetrainSettings
from raysweep.audit.measure import measure, subject_of
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.engine.audit_model import audit_model
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.events import Silent
from raysweep.engine.model_checks import check_oracles
from raysweep.models import families
from raysweep.models.diffusion import Diffusion
from raysweep.models.embeddings import RECENT, Embeddings
from raysweep.models.latent import ATTENTION, Frozen, LatentText
from raysweep.models.words import tokenizer_of
from raysweep.registry import EVALUATORS, checks_by_weights, resolve, unserved
from raysweep.tasks.task import Split, encoded
from raysweep.train.jobs import Job
from raysweep.train.loop import Resident, run

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
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=12, **LATENT["text_encoder"],
    )  # fmt: skip
    unet = UNet2DConditionModel(
        **LATENT["unet"] | {"cross_attention_dim": 32}, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
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
    """What the plain library draws from the same noise, with the scheduler that raysweep samples by."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = model.scheduler
    pipe.set_progress_bar_config(disable=True)
    more = {"original_size": (8, 8), "target_size": (8, 8)} if isinstance(pipe, StableDiffusionXLPipeline) else {}
    images = pipe(
        prompts, latents=model.noise(SEEDS), num_inference_steps=4, guidance_scale=guidance, output_type="pt", height=8,
        width=8, **more,
    ).images  # fmt: skip
    return images * 2 - 1


def test_the_plain_library_draws_the_same_pictures(model, tmp_path):
    prompts = ["a ring", "the small box", "a dot"]
    model.save(tmp_path / "m")
    ours = model.sample(model.tokens(prompts), SEEDS, 4, 3.0)
    assert ours.shape == (3, 3, 8, 8)
    torch.testing.assert_close(ours, by_pipeline(tmp_path / "m", model, prompts, 3.0), atol=1e-5, rtol=0)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
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


def test_remembered_prompts_are_what_the_encoders_make_of_them(model):
    prompts = model.tokens(["a ring", "a box", "", "a ring", "a dot"])
    model = model.with_net(copy.deepcopy(model.net).requires_grad_(False))
    model.embeddings = Embeddings.of(model, prompts)
    assert len(model.embeddings.rows) == 4
    (hidden, added), (own, pooled) = model.embed(prompts), model.encoded(prompts)
    torch.testing.assert_close(hidden, own)
    if pooled is not None:
        torch.testing.assert_close(added["text_embeds"], pooled)
    unknown = model.tokens(["the small ring", "a box"])
    assert torch.equal(model.embed(unknown)[0], model.encoded(unknown)[0])
    assert model.with_net(copy.deepcopy(model.net)).embeddings is model.embeddings
    other = copy.deepcopy(model.net)
    with torch.no_grad():
        other["text_encoder"].get_input_embeddings().weight.add_(1)
    assert model.with_net(other).embeddings is None


def test_prompts_asked_for_again_are_not_fetched_again(model):
    words = ["a ring", "a box", "", "a dot", "the small ring", "the small box"]
    kept = Embeddings.of(model, model.tokens(words))
    asked = [model.tokens([word] * 3 + ["a ring"]) for word in words]
    first = kept.look_up(asked[0])
    assert kept.look_up(asked[0].clone())[0] is first[0]
    for tokens in asked * 2:  # more than are kept
        torch.testing.assert_close(kept.look_up(tokens)[0], model.encoded(tokens)[0])
    assert len(kept.recent) == RECENT < len(asked)
    assert kept.look_up(model.tokens(["a ring", "the box"])) is None


def test_embeddings_in_half_precision_are_not_taken_for_others(model):
    cond = model.tokens(["a ring", "a box"])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model.embed(cond)[0]
        whole = model.embed(cond)[0]
    assert not torch.equal(half.float(), whole)
    assert torch.equal(whole, model.encoded(cond)[0])


@pytest.mark.parametrize(("modules", "calls"), [(("unet",), 1), ((), 3)])
def test_frozen_text_encoders_run_once_for_all_trials(tmp_path, monkeypatch, modules, calls):
    """Of 32 rows and fewer, that is; those that train run at every step."""
    task, base = latent_task(), plain()
    task.save(_made(tmp_path / "task"))
    base.save(tmp_path / "base")
    ran, resident, digests = [], Resident(), []
    forward = CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    for name in ("first", "second"):
        job = Job(
            id=name, kind="train", method="finetune", hyperparameters={"lr": 1e-2, "steps": 3, "batch_size": 8}, seed=1,
            task=str(tmp_path / "task"), base=str(tmp_path / "base"), out=str(tmp_path / name), modules=modules,
        )  # fmt: skip
        digests.append(run(job, resident).digest)
        assert len(ran) == (calls if name == "first" or modules else 2 * calls)
    assert digests[0] == digests[1]
    fresh = replace(job, out=str(tmp_path / "third"))
    assert run(fresh, Resident()).digest == digests[0]


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


def test_models_that_are_compared_share_their_autoencoder(tmp_path):
    example = ROOT / "examples" / "text-to-image.yaml"
    model = families.build(load(example).task.build(), 0)
    model.save(tmp_path / "base")
    for weights in model.frozen.vae.parameters():
        weights.data = weights.data.half().float()
    model.save(tmp_path / "rounded")
    next(iter(model.frozen.vae.parameters())).data.add_(0.1)
    model.save(tmp_path / "other")

    def sweep_with(oracle: str) -> Sweep:
        return load(example, (f"task.base={tmp_path / 'base'}", f"oracle_models=[{tmp_path / oracle}]"))

    sweep = sweep_with("rounded")
    assert set(check_oracles(sweep, sweep.task.build())) == {"oracle-0"}
    refused = "other has another autoencoder than the base"
    with pytest.raises(ConfigError, match=f"^oracle_models: .*{refused}"):
        check_oracles(sweep_with("other"), sweep.task.build())
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'other'} has another autoencoder"):
        audit_model(tmp_path / "other", sweep, Silent())


def test_latents_are_kept_by_content(tmp_path):
    model = plain()
    task = latent_task()
    first = encoded(task, model, tmp_path)
    assert first.splits["retain"].x.shape == (18, 2, 4, 4)
    torch.testing.assert_close(first.splits["retain"].x, model.encode(task.splits["retain"].x), atol=1e-5, rtol=1e-5)
    files = set(tmp_path.iterdir())
    assert torch.equal(encoded(task, model, tmp_path).splits["retain"].x, first.splits["retain"].x)
    assert set(tmp_path.iterdir()) == files
    next(iter(files)).write_bytes(b"cut")
    assert torch.equal(encoded(task, model, tmp_path).splits["train"].x, first.splits["train"].x)
    with torch.no_grad():
        next(iter(model.frozen.vae.encoder.parameters())).add_(0.1)
    assert not torch.equal(encoded(task, model, tmp_path).splits["retain"].x, first.splits["retain"].x)


def test_words_are_single_tokens_and_others_fall_into_letters():
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
        (other_vae, "the autoencoder makes latents of 4 channels, and the U-Net takes 2"),
    ],
)
def test_folders_that_are_not_whole_are_refused_in_one_sentence(saved, harm, message):
    harm(saved)
    with pytest.raises(ValueError, match=message) as error:
        families.load(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_of_search_and_audit_must_differ():
    task = latent_task()
    probe = task.splits["prompts_probe"]
    same, said = task.splits | {"prompts_audit": probe}, task.texts["prompts_probe"]
    with pytest.raises(ValueError, match="4 prompts are used both by the search and by the audit"):
        replace(task, splits=same, texts={"prompts_probe": said, "prompts_audit": said})
    longer = tuple(f"{text} that is cut off" for text in said)
    message = r"4 prompts of .* are the same to the text encoder, which reads 6 tokens .*: 'a (\w+)' and 'a \1 that is cut off'"
    with pytest.raises(ValueError, match=message):
        replace(task, splits=same, texts=task.texts | {"prompts_audit": longer})
    mixed = Split(probe.x, probe.cond[[0, 0, 2, 3]], probe.groups)
    with pytest.raises(ValueError, match=r"prompts_probe asks for different classes by .* 'a dot' and 'a bar'"):
        replace(task, splits=task.splits | {"prompts_probe": mixed})
    few = Split(probe.x[:2], probe.cond[:2], probe.groups[:2])
    with pytest.raises(ValueError, match="prompts_probe has no prompt for the classes"):
        replace(task, splits=task.splits | {"prompts_probe": few})


def test_a_task_survives_saving(tmp_path):
    task = latent_task()
    task.save(tmp_path)
    again = type(task).load(tmp_path)
    assert again.digest == task.digest
    assert again.goal == task.goal
    assert again.goal.concept == tuple(plain().tokens(["a ring"])[0].tolist())
    assert again.thing == "the concept 'ring'"


def test_every_check_on_a_concept():
    """All checks run on prompts and latents; the audit asks with other prompts than the search."""
    task = latent_task()
    torch.manual_seed(0)
    judge = Judge(3, 4)
    left_out = ("quantile", "secmi", "nudenet", *checks_by_weights())
    tier = Tier(
        seed=1, judge="audit", checks=tuple(n for n in EVALUATORS if n not in left_out), groups=5, samples=20,
        class_samples=10, noises=5, loss_noises=5, loss_images=4, timesteps=3, membership_images=12, membership_t=(50, 150),
        membership_noises=2, relearn_steps=(1,), inversion_steps=2, injection_steps=3, recall_noises=5, likelihood_steps=3,
        likelihood_probes=1, strips=2,
    )  # fmt: skip
    subject = subject_of(plain(), task, judge, tier)
    subject.peers = {"base": subject} | {
        f"oracle-{k}": subject_of(plain().fresh(k), task, judge, tier) for k in range(2)
    }
    prompts = {tuple(p) for p in subject.forgotten(6).tolist()}
    assert prompts == {tuple(plain().tokens(["the small ring"])[0].tolist())}
    result = measure(subject, tier)
    found = {(r.check, r.status) for r in result.rows}
    for name in tier.checks:
        check = resolve("evaluator", name)
        applies = "concept" in check.kinds and not unserved(check, "text-ddpm") and name != "sampler_removal"
        assert (name, "ok" if applies else "skipped") in found
    assert result.scores["strip.forgotten"].shape == (2, 3, 8, 8)


def test_training_lowers_the_loss_of_latents_and_keeps_the_autoencoder():
    task, model = latent_task(), plain()
    before = model.encoder_digest
    latents = encoded(task, model)
    method = Retrain(model, RetrainSettings(steps=60, batch_size=24, split="train", label_drop=0.2), {}, latents.goal)
    losses = [float(method.step(latents.batch(method.draws(), 0, k))["loss"]) for k in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert model.encoder_digest == before


def test_adapters_learn_and_are_merged(tmp_path):
    """The candidate has the base's tensors and no adapter; its U-Net's attention has changed, and nothing else."""
    task, base = latent_task(), plain()
    task.save(_made(tmp_path / "task"))
    base.save(tmp_path / "base")
    job = Job(
        id="t", kind="train", method="finetune", hyperparameters={"lr": 1e-2, "steps": 3, "batch_size": 8}, seed=1,
        task=str(tmp_path / "task"), base=str(tmp_path / "base"), out=str(tmp_path / "out"), lora={"rank": 2, "alpha": 2},
    )  # fmt: skip
    outcome = run(job, Resident())
    assert outcome.status == "ok", outcome.reason
    found = families.load(tmp_path / "out")
    assert found.digest == outcome.digest
    before, after = base.net.state_dict(), found.net.state_dict()
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(any(f".{part}." in n for part in ATTENTION) for n in changed)
    assert (
        run(replace(job, out=str(tmp_path / "again"), lora={"rank": 3, "alpha": 2}), Resident()).digest
        != outcome.digest
    )


def test_only_a_module_is_trained(tmp_path):
    task, base = latent_task(), plain()
    task.save(_made(tmp_path / "task"))
    base.save(tmp_path / "base")
    job = Job(
        id="t", kind="train", method="finetune", hyperparameters={"lr": 1e-2, "steps": 2, "batch_size": 8}, seed=1,
        task=str(tmp_path / "task"), base=str(tmp_path / "base"), out=str(tmp_path / "out"), modules=("text_encoder",),
    )  # fmt: skip
    assert run(job, Resident()).status == "ok"
    before, after = base.net.state_dict(), families.load(tmp_path / "out").net.state_dict()
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"text_encoder"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.lora={rank: 2}", "task=digits-class", "methods=[graddiff]"),
            "train.lora: is for text-to-image models",
        ),
        (
            ("train.modules=[vae]", "task=digits-text", "methods=[graddiff]"),
            "train.modules: the model has no vae; valid: unet",
        ),
        (
            ("train.lora={rank: 2}", "task=digits-text", "methods=[slug]"),
            "train.lora: slug works on the tensors of the base",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sweep(load(None, (*settings, "search.trials=2")))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
