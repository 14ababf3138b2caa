"""Reads scikit-learn's bundled scans and photographs, and cuts them into the splits of the embedded tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch.nn import functional as F

from raysweep.tasks.digits import STYLES, WORDS
from raysweep.tasks.task import Split, Task, concat

if TYPE_CHECKING:
    from raysweep.tasks.digits import ClassTask, ClipTask, PictureTask, TextTask

PHOTOGRAPHS = {"china.jpg": (427, 640), "flower.jpg": (427, 640)}
PATCH = 120
HOLDOUT = 300
# The audit's prompts are made of the words of the captions, put together as in none of them.
CAPTIONS = {"plain": ("a digit {}", "the number {}"), "inverted": ("an inverted digit {}", "the inverted number {}")}
UNSEEN = {"plain": ("the digit {}", "a number {}"), "inverted": ("the inverted digit {}", "an inverted number {}")}

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
CLIP_CAPTIONS = ("a photo of the digit {}", "the number {}", "a handwritten {}", "{}")
CLIP_UNSEEN = ("a photo of the number {}", "the handwritten digit {}", "a handwritten number {}")

CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 8, "patch_size": 2, "width": 64, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "fixed": ["token_embedding"],  # random words are as good as trained ones here, and take less time
}
TEXT: dict[str, Any] = {
    "words": ["a", "an", "the", "digit", "number", "inverted", *WORDS],
    "token_scale": 50.0,
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8,
    },
    "unet": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 8,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,
    },
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
}


def picture_task(config: PictureTask) -> Task:
    """Digits, and copies of a patch of a photograph that must be forgotten."""
    digits, labels = _digits()
    train, holdout, judge_a, judge_b = _stratified(labels, (config.images, HOLDOUT), config.seed)
    picture = _patch(config.photograph, config.row, config.column)
    forget = _unlabelled(picture.repeat(config.copies, 1, 1, 1), torch.full((config.copies,), 10))
    retain = _unlabelled(digits[train], labels[train])
    return Task(
        name=config.name,
        kind="points",
        model={"unet": UNET, "scheduler": SCHEDULER, "null_label": None},
        recipe={"steps": config.base_steps},
        splits={
            "forget": forget,
            "retain": retain,
            "train": concat(retain, forget),
            "holdout": _unlabelled(digits[holdout], labels[holdout]),
            "forget_holdout": _other_patches(config),
            "judge_probe": _unlabelled(digits[judge_a], labels[judge_a]),
            "judge_audit": _unlabelled(digits[judge_b], labels[judge_b]),
        },
        views=("reconstruction.correlation", "denoising.forget_log_loss", "generation.rate"),
        quality="fidelity.frechet",
        base=None if config.base is None else str(config.base),
        sensitive=False,
    )


def _other_patches(config: PictureTask) -> Split:
    """Patches of the same photographs on a grid, none overlapping the forgotten one: its matched holdout."""
    patches = []
    for name, (height, width) in PHOTOGRAPHS.items():
        for row in range(0, height - PATCH + 1, 50):
            for column in range(0, width - PATCH + 1, 50):
                same = name == config.photograph
                if not (same and abs(row - config.row) < PATCH and abs(column - config.column) < PATCH):
                    patches.append(_patch(name, row, column))
    return _unlabelled(torch.cat(patches), torch.full((len(patches),), 10)).distinct()


def class_task(config: ClassTask) -> Task:
    """Labelled digits, one of which must be forgotten."""
    digits, labels = _digits()
    index = _stratified(labels, (config.images, HOLDOUT), config.seed)
    return Task(
        name=config.name,
        kind="class",
        model={"unet": UNET | {"num_class_embeds": 11}, "scheduler": SCHEDULER, "null_label": 10},
        recipe={"steps": config.base_steps},
        splits=_cut([Split(digits[i], labels[i], labels[i]) for i in index], config.forget),
        views=("classifier.recognised", "classifier.leak", "relearning.presence"),
        quality="fidelity.frechet",
        sampling={"steps": 10, "guidance": 1.5},
        forget_class=config.forget,
        override_class=config.override,
        base=None if config.base is None else str(config.base),
        sensitive=False,
        class_names=tuple(f"handwritten {word}" for word in WORDS),
    )


def text_task(config: TextTask) -> Task:
    """Digits in two styles with captions; one digit, or one style, must be forgotten."""
    from raysweep.models.words import tokenizer_of

    digits, labels = _digits()
    large = F.interpolate(digits, size=16, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    index = _stratified(labels, (config.images, HOLDOUT), config.seed)
    by_style, names = config.by_style, STYLES if config.by_style else WORDS
    tokenizer = tokenizer_of(tuple(TEXT["words"]), TEXT["text_encoder"]["max_position_embeddings"])

    def tokens(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def split(x: torch.Tensor, texts: list[str], digit: torch.Tensor, style: torch.Tensor) -> Split:
        return Split(x, tokens(texts), *((style, digit) if by_style else (digit, style)))

    def captioned(index: np.ndarray) -> Split:
        captions = [CAPTIONS[s][i % 2].format(WORDS[int(labels[i])]) for s in STYLES for i in index]
        styles = torch.arange(len(STYLES)).repeat_interleave(len(index))
        return split(torch.cat([large[index], -large[index]]), captions, labels[index].repeat(len(STYLES)), styles)

    def prompts(templates: Mapping[str, tuple[str, ...]]) -> tuple[Split, tuple[str, ...]]:
        asked = [(t.format(word), d, s)
                 for s, style in enumerate(STYLES) for t in templates[style] for d, word in enumerate(WORDS)]  # fmt: skip
        texts, digit, style = zip(*asked, strict=True)
        return split(torch.empty(len(asked), 0), list(texts), torch.tensor(digit), torch.tensor(style)), texts

    searched, audited = prompts(CAPTIONS), prompts(UNSEEN)
    forget_class = names.index(config.forget)
    return Task(
        name=config.name,
        kind="concept",
        model=TEXT,
        recipe={"steps": config.base_steps, "batch_size": 48, "ema": 0.98},
        splits=_cut([captioned(i) for i in index], forget_class)
        | {"prompts_probe": searched[0], "prompts_audit": audited[0]},
        views=("classifier.recognised", "classifier.leak", "relearning.presence"),
        quality="fidelity.frechet",
        sampling={"steps": 8, "guidance": 3.0},
        forget_class=forget_class,
        override_class=names.index(config.stand_in),
        base=None if config.base is None else str(config.base),
        sensitive=False,
        family="text-ddpm",
        class_names=tuple(f"{style} digit" for style in STYLES) if by_style else tuple(f"digit {w}" for w in WORDS),
        texts={"prompts_probe": searched[1], "prompts_audit": audited[1]},
    )


def clip_task(config: ClipTask) -> Task:
    """Captioned digits for a contrastive model; one digit must be forgotten. Its judges' images were never trained on."""
    from open_clip.tokenizer import SimpleTokenizer

    digits, labels = _digits()
    images = digits.expand(-1, 3, -1, -1).contiguous()
    train, holdout, *halves = _stratified(labels, (config.images, HOLDOUT), config.seed)
    tokenizer = SimpleTokenizer(context_length=CLIP["model_cfg"]["text_cfg"]["context_length"])
    forget_class = WORDS.index(config.forget)

    def captioned(index: np.ndarray) -> Split:
        captions = [CLIP_CAPTIONS[i % len(CLIP_CAPTIONS)].format(WORDS[int(labels[i])]) for i in index]
        return Split(images[index], tokenizer(captions), labels[index])

    def prompts(templates: tuple[str, ...]) -> tuple[Split, tuple[str, ...]]:
        texts = tuple(t.format(word) for t in templates for word in WORDS)
        groups = torch.arange(len(WORDS)).repeat(len(templates))
        return Split(torch.empty(len(texts), 0), tokenizer(list(texts)), groups), texts

    searched, audited = prompts(CLIP_CAPTIONS), prompts(CLIP_UNSEEN)
    index = [train, holdout, *(np.setdiff1d(half, train) for half in halves)]
    return Task(
        name=config.name,
        kind="concept",
        model=CLIP,
        recipe={"steps": config.base_steps, "batch_size": 128, "lr": 2e-3, "weight_decay": 0.05},
        splits=_cut([captioned(i) for i in index], forget_class)
        | {"prompts_probe": searched[0], "prompts_audit": audited[0]},
        views=("contrast.recognised", "contrast.forget_similarity"),
        quality="contrast.retain_loss",
        validity="contrast.validity",
        sampling={},
        forget_class=forget_class,
        base=None if config.base is None else str(config.base),
        sensitive=False,
        family="clip",
        class_names=tuple(f"digit {word}" for word in WORDS),
        texts={"prompts_probe": searched[1], "prompts_audit": audited[1]},
    )


def _cut(parts: list[Split], forget_class: int) -> dict[str, Split]:
    """The splits of a task that forgets a class, of (training images, held-out ones, judge A's, judge B's)."""
    train, holdout, judge_a, judge_b = parts

    def of(split: Split, forgotten: bool) -> Split:
        return split.take(((split.groups == forget_class) == forgotten).nonzero()[:, 0])

    return {
        "forget": of(train, True),
        "retain": of(train, False),
        "train": concat(of(train, False), of(train, True)),
        "holdout": of(holdout, False),
        "forget_holdout": of(holdout, True),
        "judge_probe": judge_a,
        "judge_audit": judge_b,
    }


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All scans (1797, 1, 8, 8) in [-1, 1] and their labels."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 8 - 1
    return x, torch.from_numpy(data.target.astype(np.int64))


def _stratified(labels: torch.Tensor, sizes: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Index sets (train, holdout, judge A, judge B): the first two of the given sizes, the judges' halves disjoint.

    Judges learn from all images that are not held out, one from each half, so each sees a part of the training set.
    """
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    by_class = [shuffled[labels.numpy()[shuffled] == digit] for digit in range(10)]
    place = np.empty(len(labels), dtype=np.int64)  # an image's place within its class
    for members in by_class:
        place[members] = np.arange(len(members))
    order = np.lexsort((labels.numpy(), place))
    train, holdout = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
    rest = np.setdiff1d(order, holdout)
    halves = [rest[place[rest] % 2 == parity] for parity in (0, 1)]
    return [np.sort(train), np.sort(holdout), *halves]


def _patch(photograph: str, row: int, column: int) -> torch.Tensor:
    """A 120 x 120 patch, grey, area-resized to 8 x 8 and stretched to [-1, 1], (1, 1, 8, 8)."""
    grey = Image.fromarray(load_sample_image(photograph)).convert("L")
    small = grey.crop((column, row, column + PATCH, row + PATCH)).resize((8, 8), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    low, high = pixels.min(), pixels.max()
    return torch.from_numpy(2 * (pixels - low) / max(high - low, 1) - 1).view(1, 1, 8, 8)


def _unlabelled(x: torch.Tensor, groups: torch.Tensor) -> Split:
    return Split(x, None, groups)
