"""Seeded random rows: each row is a function of its own seed, never of batch size, order or worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

STEP_STREAMS = 2  # the first of the streams of noise that samplers add, one per step; 0 and 1 are those below


def row_seeds(seed: int, start: int, count: int) -> torch.Tensor:
    """Seeds start .. start+count-1 of the stream `seed`, int64 (count,); any slice equals the slice of the whole."""
    index = np.arange(start, start + count, dtype=np.uint64)
    with np.errstate(over="ignore"):  # splitmix64: well mixed and vectorised
        z = np.uint64(seed) + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def normal_rows(seeds: torch.Tensor, shape: tuple[int, ...], stream: int = 0) -> torch.Tensor:
    """Standard normal rows, float64, (n, *shape), on the CPU; stream 1 is that of `uniform_rows`."""
    return torch.from_numpy(_rows(seeds, shape, stream, lambda generator, row: generator.standard_normal(out=row)))


def pipeline_rows(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal rows, float32, (n, *shape), on the CPU: those from which a pipeline of diffusers draws one picture with
    `generator=torch.Generator().manual_seed(seed)`."""
    rows = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.cat(rows)


def uniform_rows(seeds: torch.Tensor, columns: int) -> torch.Tensor:
    """Uniform rows in [0, 1), float64, (n, columns), on a stream disjoint from `normal_rows`."""
    return torch.from_numpy(_rows(seeds, (columns,), 1, lambda generator, row: generator.random(out=row)))


def _rows(
    seeds: torch.Tensor, shape: tuple[int, ...], stream: int, fill: Callable[[np.random.Generator, np.ndarray], Any]
) -> np.ndarray:
    """Rows filled by Philox generators with the keys (seed, stream).

    One generator is given each key in turn: a new generator per row costs eight times as much, which slows the step of a small
    network.
    """
    bits = np.random.Philox(key=0)
    generator, state = np.random.Generator(bits), bits.state
    state["state"]["key"][1] = stream
    out = np.empty((len(seeds), *shape))
    for row, seed in zip(out, seeds.tolist(), strict=True):
        state["state"]["key"][0] = seed
        bits.state = state
        fill(generator, row)
    return out
