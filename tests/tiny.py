"""Tiny real models and tasks, quick to make and run."""

from __future__ import annotations

from pathlib import Path

import torch

from methods.base import Goal
from methods.rows import Batch, Rows
from raysweep.models.clip import Contrastive
from raysweep.models.edm import EDM
from raysweep.models.flow import Flow
from raysweep.models.latent import LatentText
from raysweep.models.pixel import PixelDDPM
from raysweep.models.vision_language import VisionLanguage
from raysweep.tasks.task import Split, Task, concat

ROOT = Path(__file__).resolve().parent.parent
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "timestep_spacing": "trailing",
}


def tiny_config(classes: int | None = None, prediction: str = "v_prediction") -> dict:
    unet = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    if classes:
        unet["num_class_embeds"] = classes + 1
    return {"unet": unet, "scheduler": SCHEDULER | {"prediction_type": prediction}, "null_label": classes}


def tiny_task(kind: str = "points", seed: int = 0) -> Task:
    """Six classes of noisy 4x4 patterns; forgets a foreign picture, or class 2."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand((6, 1, 4, 4), generator=g) * 2 - 1

    def draw(per_class: int) -> Split:
        labels = torch.arange(6).repeat_interleave(per_class)
        noise = 0.2 * torch.randn((len(labels), 1, 4, 4), generator=g)
        return Split((centres[labels] + noise).clamp(-1, 1), labels if kind == "class" else None, labels)

    train, holdout, judge_a, judge_b = draw(6), draw(6), draw(8), draw(8)
    if kind == "class":
        is_forget, held = train.groups == 2, holdout.groups == 2
        forget, retain = train.take(is_forget.nonzero()[:, 0]), train.take((~is_forget).nonzero()[:, 0])
        forget_holdout = holdout.take(held.nonzero()[:, 0])
        holdout = holdout.take((~held).nonzero()[:, 0])
        views = ("classifier.recognised", "classifier.leak", "relearning.presence")
    else:
        picture = torch.rand((1, 1, 4, 4), generator=g).round() * 2 - 1
        forget = Split(picture.repeat(4, 1, 1, 1), None, torch.full((4,), 6))
        retain = train
        forget_holdout = Split(torch.rand((12, 1, 4, 4), generator=g).round() * 2 - 1, None, torch.full((12,), 6))
        views = ("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate")
    return Task(
        name=f"tiny-{kind}",
        kind=kind,
        model=tiny_config(6 if kind == "class" else None),
        recipe={"steps": 20},
        splits={
            "train": concat(retain, forget),
            "forget": forget,
            "retain": retain,
            "holdout": holdout,
            "forget_holdout": forget_holdout,
            "judge_probe": judge_a,
            "judge_audit": judge_b,
        },
        views=views,
        quality="fidelity.frechet",
        forget_class=2 if kind == "class" else None,
        override_class=4 if kind == "class" else None,
        sampling={"steps": 4, "guidance": 1.5 if kind == "class" else 1.0},
    )


def tiny_model(task: Task, seed: int = 0, dtype: torch.dtype = torch.float32) -> PixelDDPM:
    model = PixelDDPM.build(task.model, seed)
    model.net.to(dtype)
    return model


def batch_for(method, task: Task, step: int = 0, seed: int = 3, rank: int = 0, world: int = 1) -> Batch:
    dtype = method.params[0].dtype
    batch = task.batch(method.draws(), seed, step, rank, world)
    return {k: v.to(torch.device("cpu"), dtype) for k, v in batch.items()}


class TinyText(PixelDDPM):
    """A text-conditional diffusion model of the libraries' own classes: a CLIP text encoder and a U-Net that attends to it.

    `net` holds both, so methods can move either; a condition is the tokens of a prompt, (n, 4).
    """

    family = "text-ddpm"

    @classmethod
    def tiny(cls, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyText:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=12,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=4,
                bos_token_id=0,
                eos_token_id=11,
                pad_token_id=11,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        )
        net = torch.nn.ModuleDict({"unet": unet, "text_encoder": text}).to(dtype)
        return cls(net, DDIMScheduler(**SCHEDULER), None)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 4, 4

    @property
    def columns(self) -> dict[str, slice]:
        return {"text_encoder": slice(0, 4)}

    def unconditional(self, count: int) -> torch.Tensor:
        return torch.tensor([0, 11, 11, 11]).expand(count, -1)

    def attended(self, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net["text_encoder"](cond).last_hidden_state, (cond == 11).int().argmax(1) - 1

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        tokens = self.unconditional(len(x_t)) if cond is None else cond
        return self.net["unet"](x_t, t, self.attended(tokens)[0]).sample


class TinyClip:
    """open_clip's own model class, tiny: images (n, 3, 8, 8), captions as tokens (n, 6)."""

    family = "clip"
    sampler = None

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        import open_clip

        torch.manual_seed(seed)
        vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 3, "head_width": 8}
        text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3}
        self.net = open_clip.CLIP(8, vision, text).to(dtype)

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.net.logit_scale.exp()

    def unconditional(self, count: int) -> None:
        return None

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.encode_image(x)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net.encode_text(tokens)


PROMPTS = {c: (0, 1 + c, 8, 11) for c in range(6)}  # "a thing of class c", in TinyText's vocabulary


def text_task(seed: int = 0) -> Task:
    """`tiny_task("class")` with prompts in place of labels; class 2 is the concept to forget."""
    from dataclasses import replace

    task = tiny_task("class", seed)
    prompts = torch.tensor([PROMPTS[c] for c in range(6)])
    splits = {n: Split(s.x, None if s.cond is None else prompts[s.cond], s.groups) for n, s in task.splits.items()}
    return replace(task, name="tiny-text", family="text-ddpm", splits=splits)


def concept_task(seed: int = 0) -> Task:
    """`text_task` with the goal of a task of kind "concept"."""
    task = text_task(seed)
    task.__dict__["goal"] = Goal("concept", 2, 4, tuple(range(6)), PROMPTS[2], tuple(PROMPTS.items()))
    return task


class Pairs:
    """Images with six captions for TinyClip, in the form of a task; the second caption is the concept to forget."""

    def __init__(self, per_caption: int = 6, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        captions = torch.randint(1, 18, (6, 6), generator=g)
        captions[:, -1] = 19
        centres = torch.rand((6, 3, 8, 8), generator=g) * 2 - 1
        labels = torch.arange(6).repeat_interleave(per_caption)
        x = (centres[labels] + 0.1 * torch.randn((len(labels), 3, 8, 8), generator=g)).clamp(-1, 1)
        self.rows = {
            "forget": (x[labels == 1], captions[labels[labels == 1]]),
            "retain": (x[labels != 1], captions[labels[labels != 1]]),
        }
        self.goal = Goal("concept", concept=tuple(captions[1].tolist()))

    def all_rows(self, split: str, seed: int) -> Rows:
        x, cond = self.rows[split]
        return Rows(x, cond, torch.arange(len(x)) + seed % 1000, len(x))

    def batch(self, draws, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        def part(rows: Rows) -> Rows:
            low, high = rank * rows.total // world, (rank + 1) * rows.total // world
            return Rows(rows.x[low:high], rows.cond[low:high], rows.seeds[low:high], rows.total, world)

        return {name: part(self.all_rows(name, seed + step)) for name in draws}


def vlm_pairs(dtype: torch.dtype = torch.float32) -> tuple[Pairs, VisionLanguage]:
    """A vision-language model with random weights, and captioned 16x16 images for it."""
    from raysweep.miniature import models

    model = models.untrained_vlm()
    model.net.to(dtype)
    task = Pairs()
    captions = model.tokens([f"a photo of {name}" for name in models.NAMES])
    for name, (x, _) in task.rows.items():
        labels = (
            torch.ones(len(x), dtype=torch.long)
            if name == "forget"
            else torch.tensor([0, 2, 3, 4, 5]).repeat_interleave(6)
        )
        task.rows[name] = (torch.nn.functional.interpolate(x, 16), captions[labels])
    task.goal = Goal("concept", concept=tuple(captions[1].tolist()))
    return task, model


WORDS = ("dot", "bar", "ring", "box")
LATENT = {
    "words": ("a", "the", "small", *WORDS),
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 6,
    },
    "unet": {
        "sample_size": 4,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 8,
        "layers_per_block": 1,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}


CLIP_TEXT = LATENT["text_encoder"] | {"projection_dim": 12}
FLOW = {
    "words": LATENT["words"],
    "text_encoder": CLIP_TEXT,
    "text_encoder_2": CLIP_TEXT | {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8},
    "text_encoder_3": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    },
    "t5_tokens": 8,
    "transformer": {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 2,
        "out_channels": 2,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 4,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "vae": LATENT["vae"] | {"scaling_factor": 1.5, "shift_factor": 0.06},
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
}


def flow_model(seed: int = 0, **config) -> Flow:
    """A rectified-flow transformer like Stable Diffusion 3.5 with all three text encoders; config: what differs from `FLOW`, None
    for a part that is left out."""
    return Flow.build({key: value for key, value in (FLOW | config).items() if value is not None}, seed)


def flow_task(seed: int = 0) -> Task:
    """`latent_task` for `flow_model`."""
    from dataclasses import replace

    return replace(latent_task(seed, flow_model()), name="tiny-flow", family="flow", model=FLOW)


def latent_task(seed: int = 0, model: LatentText | Flow | None = None) -> Task:
    """Four kinds of noisy 8x8 colour patterns with captions in the model's tokens; "ring" is the concept to forget.

    Whether the number of a kind is even or odd is the second domain."""
    model = model or LatentText.build(LATENT, 0)
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand((4, 3, 8, 8), generator=g) * 2 - 1

    def draw(per_class: int) -> Split:
        labels = torch.arange(4).repeat_interleave(per_class)
        x = (centres[labels] + 0.2 * torch.randn((len(labels), 3, 8, 8), generator=g)).clamp(-1, 1)
        return Split(x, model.tokens([f"a {WORDS[c]}" for c in labels]), labels, labels % 2)

    def part(split: Split, forgotten: bool) -> Split:
        return split.take(((split.groups == 2) == forgotten).nonzero()[:, 0])

    def prompts(template: str) -> Split:
        return Split(
            torch.empty(4, 0), model.tokens([template.format(w) for w in WORDS]), torch.arange(4), torch.arange(4) % 2
        )

    seen, held = draw(6), draw(6)
    return Task(
        name="tiny-latent",
        kind="concept",
        model=LATENT,
        recipe={"steps": 20},
        family="text-ddpm",
        forget_class=2,
        override_class=0,
        splits={
            "forget": part(seen, True),
            "retain": part(seen, False),
            "train": concat(part(seen, False), part(seen, True)),
            "holdout": part(held, False),
            "forget_holdout": part(held, True),
            "judge_probe": draw(8),
            "judge_audit": draw(8),
            "prompts_probe": prompts("a {}"),
            "prompts_audit": prompts("the small {}"),
        },
        views=("classifier.recognised", "classifier.leak", "relearning.presence"),
        quality="fidelity.frechet",
        sampling={"steps": 3, "guidance": 2.0},
        class_names=WORDS,
        texts={
            "prompts_probe": tuple(f"a {w}" for w in WORDS),
            "prompts_audit": tuple(f"the small {w}" for w in WORDS),
        },
    )


CLIP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3},
    "fixed": ["token_embedding"],
}


def clip_model(seed: int = 0) -> Contrastive:
    return Contrastive.build(CLIP, seed)


def clip_task(seed: int = 0) -> Task:
    """The pictures of `latent_task` with captions in open_clip's tokens, for a contrastive model."""
    from dataclasses import replace

    task, tokenizer = latent_task(seed), clip_model().tokens
    splits = {
        name: Split(
            s.x,
            tokenizer(list(task.texts[name]) if name in task.texts else [f"a {WORDS[c]}" for c in s.groups]),
            s.groups,
        )
        for name, s in task.splits.items()
    }
    return replace(
        task,
        name="tiny-clip",
        family="clip",
        model=CLIP,
        splits=splits,
        sampling={},
        quality="contrast.retain_loss",
        views=("contrast.recognised", "contrast.forget_similarity"),
        validity="contrast.validity",
    )


def edm_model(seed: int = 0, classes: int | None = 6) -> EDM:
    """A preconditioned U-Net for `tiny_task`, with a null class if it has classes."""
    unet = tiny_config(classes)["unet"]
    return EDM.build({"unet": unet, "null_label": classes}, seed)
