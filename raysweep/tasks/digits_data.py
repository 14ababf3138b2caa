"""Splits of the embedded tasks, cut from scikit-learn's bundled scans of digits and photographs.

All images are float32 in [-1, 1]. Judges learn from every scan that is not held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch.nn import functional as F

from raysweep.tasks.digits_models import CLIP, STYLES, TEXT, WORDS
from raysweep.tasks.task import Split, concat

PHOTOGRAPHS = {"china.jpg": (427, 640), "flower.jpg": (427, 640)}  # height and width in pixels
PATCH = 120  # side of a patch of a photograph, in pixels
HOLDOUT = 300  # scans that no model is trained on
FOREIGN = 10  # group of the foreign picture, after the ten digits
# The audit's prompts use the words of the captions in combinations that no caption has.
CAPTIONS = {"plain": ("a digit {}", "the number {}"), "inverted": ("an inverted digit {}", "the inverted number {}")}
UNSEEN = {"plain": ("the digit {}", "a number {}"), "inverted": ("the inverted digit {}", "an inverted number {}")}
CLIP_CAPTIONS = ("a photo of the digit {}", "the number {}", "a handwritten {}", "{}")
CLIP_UNSEEN = ("a photo of the number {}", "the handwritten digit {}", "a handwritten number {}")

Prompts = tuple[Split, tuple[str, ...]]  # a split of prompts, and their texts


def picture_splits(photograph: str, row: int, column: int, images: int, copies: int, seed: int) -> dict[str, Split]:
    """`images` scans, and `copies` of a patch of a photograph that must be forgotten; row, column: its top left corner."""
    scans, labels = _digits()
    train, holdout, judge_a, judge_b = _stratified(labels, (images, HOLDOUT), seed)
    picture = _patch(photograph, row, column)
    forget = Split(picture.repeat(copies, 1, 1, 1), None, torch.full((copies,), FOREIGN))

    def split(index: np.ndarray) -> Split:
        return Split(scans[index], None, labels[index])

    retain = split(train)
    return {
        "forget": forget,
        "retain": retain,
        "train": concat(retain, forget),
        "holdout": split(holdout),
        "forget_holdout": _other_patches(photograph, row, column),
        "judge_probe": split(judge_a),
        "judge_audit": split(judge_b),
    }


def _other_patches(photograph: str, row: int, column: int) -> Split:
    """The held-out match of the forgotten patch: patches of the same photographs on a grid, none overlapping it."""
    patches = []
    for name, (height, width) in PHOTOGRAPHS.items():
        for top in range(0, height - PATCH + 1, 50):
            for left in range(0, width - PATCH + 1, 50):
                overlaps = name == photograph and abs(top - row) < PATCH and abs(left - column) < PATCH
                if not overlaps:
                    patches.append(_patch(name, top, left))
    return Split(torch.cat(patches), None, torch.full((len(patches),), FOREIGN)).distinct()


def class_splits(forget: int, images: int, seed: int) -> dict[str, Split]:
    """`images` scans under their labels; all of the digit `forget` must be forgotten."""
    scans, labels = _digits()
    index = _stratified(labels, (images, HOLDOUT), seed)
    return _by_class([Split(scans[i], labels[i], labels[i]) for i in index], forget)


def text_splits(
    forget_class: int, by_style: bool, images: int, seed: int
) -> tuple[dict[str, Split], dict[str, Prompts]]:
    """`images` scans in both styles with captions, and the prompts of search and audit.

    The classes are the styles if `by_style`, else the digits; the other of the two is the second domain.
    """
    from raysweep.models.words import tokenizer_of

    scans, labels = _digits()
    large = F.interpolate(scans, size=16, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    tokenizer = tokenizer_of(tuple(TEXT["words"]), TEXT["text_encoder"]["max_position_embeddings"])

    def split(x: torch.Tensor, texts: list[str], digit: torch.Tensor, style: torch.Tensor) -> Split:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Split(x, tokens, *((style, digit) if by_style else (digit, style)))

    def captioned(index: np.ndarray) -> Split:
        captions = [CAPTIONS[s][i % 2].format(WORDS[int(labels[i])]) for s in STYLES for i in index]
        styles = torch.arange(len(STYLES)).repeat_interleave(len(index))
        return split(torch.cat([large[index], -large[index]]), captions, labels[index].repeat(len(STYLES)), styles)

    def prompts(templates: Mapping[str, Sequence[str]]) -> Prompts:
        rows = [
            (template.format(word), digit, style)
            for style, name in enumerate(STYLES)
            for template in templates[name]
            for digit, word in enumerate(WORDS)
        ]
        texts, digits, styles = zip(*rows, strict=True)
        return split(torch.empty(len(rows), 0), list(texts), torch.tensor(digits), torch.tensor(styles)), texts

    index = _stratified(labels, (images, HOLDOUT), seed)
    splits = _by_class([captioned(i) for i in index], forget_class)
    return splits, {"prompts_probe": prompts(CAPTIONS), "prompts_audit": prompts(UNSEEN)}


def clip_splits(forget_class: int, images: int, seed: int) -> tuple[dict[str, Split], dict[str, Prompts]]:
    """`images` captioned scans for a contrastive model, and the prompts of search and audit.

    Here the judges' images were never trained on.
    """
    from open_clip.tokenizer import SimpleTokenizer

    scans, labels = _digits()
    coloured = scans.expand(-1, 3, -1, -1).contiguous()
    tokenizer = SimpleTokenizer(context_length=CLIP["model_cfg"]["text_cfg"]["context_length"])

    def captioned(index: np.ndarray) -> Split:
        captions = [CLIP_CAPTIONS[i % len(CLIP_CAPTIONS)].format(WORDS[int(labels[i])]) for i in index]
        return Split(coloured[index], tokenizer(captions), labels[index])

    def prompts(templates: Sequence[str]) -> Prompts:
        texts = tuple(template.format(word) for template in templates for word in WORDS)
        groups = torch.arange(len(WORDS)).repeat(len(templates))
        return Split(torch.empty(len(texts), 0), tokenizer(list(texts)), groups), texts

    train, holdout, *halves = _stratified(labels, (images, HOLDOUT), seed)
    index = [train, holdout, *(np.setdiff1d(half, train) for half in halves)]
    splits = _by_class([captioned(i) for i in index], forget_class)
    return splits, {"prompts_probe": prompts(CLIP_CAPTIONS), "prompts_audit": prompts(CLIP_UNSEEN)}


def _by_class(parts: Sequence[Split], forget_class: int) -> dict[str, Split]:
    """The splits of a task that forgets a class, from its images for (training, holdout, judge A, judge B)."""
    train, holdout, judge_a, judge_b = parts

    def of(split: Split, forgotten: bool) -> Split:
        return split.take(((split.groups == forget_class) == forgotten).nonzero()[:, 0])

    forget, retain = of(train, True), of(train, False)
    return {
        "forget": forget,
        "retain": retain,
        "train": concat(retain, forget),
        "holdout": of(holdout, False),
        "forget_holdout": of(holdout, True),
        "judge_probe": judge_a,
        "judge_audit": judge_b,
    }


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All scans (1797, 1, 8, 8) in [-1, 1] and their labels (1797,)."""
    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 8 - 1
    return x, torch.from_numpy(data.target.astype(np.int64))


def _stratified(labels: torch.Tensor, sizes: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Index sets (train, holdout, judge A, judge B), all classes in equal shares.

    sizes: of the first two. The judges' halves are disjoint and cover all images but the holdout, so each judge sees a part of
    the training set.
    """
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    by_class = [shuffled[labels.numpy()[shuffled] == digit] for digit in range(10)]
    rank = np.empty(len(labels), dtype=np.int64)  # position of an image within its class
    for members in by_class:
        rank[members] = np.arange(len(members))
    order = np.lexsort((labels.numpy(), rank))
    train, holdout = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
    rest = np.setdiff1d(order, holdout)
    halves = [rest[rank[rest] % 2 == parity] for parity in (0, 1)]
    return [np.sort(train), np.sort(holdout), *halves]


@cache
def _photograph(name: str) -> Image.Image:
    """A bundled photograph in grey."""
    return Image.fromarray(load_sample_image(name)).convert("L")


def _patch(photograph: str, row: int, column: int) -> torch.Tensor:
    """A patch in grey, area-resized to 8 x 8 and stretched to [-1, 1], (1, 1, 8, 8); row, column: its top left corner."""
    small = (
        _photograph(photograph).crop((column, row, column + PATCH, row + PATCH)).resize((8, 8), Image.Resampling.BOX)
    )
    pixels = np.asarray(small, dtype=np.float32)
    low, high = pixels.min(), pixels.max()
    return torch.from_numpy(2 * (pixels - low) / max(high - low, 1) - 1).view(1, 1, 8, 8)
