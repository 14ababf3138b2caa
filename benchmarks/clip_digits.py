"""A small open_clip model of captioned digits, for SLUG in the setting of its paper."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from sklearn.datasets import load_digits

from methods.base import Goal
from methods.rows import Batch, Rows

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}", "the number {}", "a handwritten {}", "{}")
VISION = {"image_size": 8, "patch_size": 2, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}


class Clip:
    """The handle that SLUG takes: images (n, 3, 8, 8) in [-1, 1], captions as tokens (n, 12)."""

    family, sampler = "clip", None

    def __init__(self, net: Any):
        self.net = net

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.net.logit_scale.exp()

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.encode_image(x)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.net.encode_text(tokens)


class Digits:
    """The data, split in two parts (gradients; accuracies), and a model trained on the first.

    `forget` is the digit that must go; it may be set to another one later.
    """

    def __init__(self, forget: int = 3, steps: int = 300):
        data = load_digits()
        x = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1).expand(-1, 3, -1, -1) / 8 - 1
        y = torch.from_numpy(data.target.astype(np.int64))
        order = torch.from_numpy(np.random.Generator(np.random.Philox(0)).permutation(len(y)))
        self.train, self.test = order[:1200], order[1200:]
        self.x, self.y, self.forget = x.contiguous(), y, forget
        tokenizer = open_clip.SimpleTokenizer(context_length=12)
        self.captions = torch.stack([tokenizer([t.format(w) for t in TEMPLATES]) for w in WORDS])
        torch.manual_seed(0)
        self.model = Clip(open_clip.CLIP(64, VISION, TEXT))
        self.fit(steps)

    @property
    def goal(self) -> Goal:
        return Goal("concept", concept=tuple(self.captions[self.forget, 0].tolist()))

    def fit(self, steps: int) -> None:
        """Contrastive training; the token embedding stays random, which is no worse and faster."""
        net = self.model.net.train()
        net.token_embedding.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        loss = ClipLoss()
        for _ in range(steps):
            rows = self.train[torch.randint(len(self.train), (128,))]
            v = F.normalize(self.model.encode_image(self.x[rows] + 0.1 * torch.randn(128, 3, 8, 8)), dim=-1)
            t = F.normalize(self.model.encode_text(self.captions[self.y[rows], torch.randint(4, (128,))]), dim=-1)
            optimizer.zero_grad()
            loss(v, t, self.model.logit_scale).backward()
            optimizer.step()
            schedule.step()
        net.eval()

    def copy(self) -> Clip:
        return Clip(copy.deepcopy(self.model.net))

    @torch.no_grad()
    def accuracy(self, model: Any) -> tuple[float, float]:
        """Zero-shot accuracy on unseen images: (of the forgotten digit, mean over the others)."""
        t = torch.stack([F.normalize(F.normalize(model.encode_text(c), dim=-1).mean(0), dim=0) for c in self.captions])
        v = F.normalize(model.encode_image(self.x[self.test]), dim=-1)
        right, y = (v @ t.T).argmax(1) == self.y[self.test], self.y[self.test]
        by_digit = [float(right[y == d].double().mean()) for d in range(10)]
        return by_digit[self.forget], float(np.mean([a for d, a in enumerate(by_digit) if d != self.forget]))

    def all_rows(self, split: str, seed: int) -> Rows:
        mine = self.train[(self.y[self.train] == self.forget) == (split == "forget")]
        pick = torch.arange(len(mine)) % len(TEMPLATES)
        return Rows(self.x[mine], self.captions[self.y[mine], pick], torch.arange(len(mine)), len(mine))

    def batch(self, draws: dict[str, Any], seed: int, step: int) -> Batch:
        return {name: self.all_rows(name, seed) for name in draws}
