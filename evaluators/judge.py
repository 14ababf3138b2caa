"""A small convolutional classifier, trained on real images only; its features also serve distances.

Two judges with disjoint training images and different seeds keep search and audit apart.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FEATURES = 64


class Judge(nn.Module):
    """Images (n, channels, H, W) in [-1, 1] -> logits (n, classes); `features` gives the layer before them, (n, 64)."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def train_judge(x: torch.Tensor, labels: torch.Tensor, seed: int, steps: int = 400, batch_size: int = 64) -> Judge:
    """Trains a judge on images (n, C, H, W) and labels (n,) with small random shifts, rotations and noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    judge.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), generator=generator)
        loss = F.cross_entropy(judge(_augment(x[rows].float(), generator)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def to_array(judge: Judge) -> np.ndarray:
    """All weights and statistics of a judge in one array, float64 (n,)."""
    return np.concatenate([t.double().flatten().numpy() for t in judge.state_dict().values()])


def from_array(array: np.ndarray, channels: int, classes: int) -> Judge:
    """The judge behind the result of `to_array`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        judge = Judge(channels, classes)
    state = judge.state_dict()
    parts = torch.from_numpy(array).split([t.numel() for t in state.values()])
    judge.load_state_dict({k: p.view(t.shape).to(t.dtype) for (k, t), p in zip(state.items(), parts, strict=True)})
    return judge.eval()


def _augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (n, C, H, W) rotated by up to 12 degrees, scaled by up to 10 %, shifted by up to one pixel in eight, with noise."""
    n = len(x)
    u = torch.rand((n, 4), generator=generator) * 2 - 1
    angle, scale = u[:, 0] * math.radians(12), 1 + 0.1 * u[:, 1]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 0, 1], theta[:, 1, 0] = -torch.sin(angle) * scale, torch.sin(angle) * scale
    theta[:, :, 2] = u[:, 2:] / 8
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator)
