"""Random numbers as data: every row of noise is a function of its own seed, never of batch size, order or worker."""

from __future__ import annotations

import numpy as np
import torch


def row_seeds(seed: int, start: int, count: int) -> torch.Tensor:
    """Seeds start .. start+count-1 of the stream `seed`, int64 (count,); any slice equals the slice of the whole."""
    index = np.arange(start, start + count, dtype=np.uint64)
    with np.errstate(over="ignore"):  # splitmix64: well mixed and vectorised
        z = np.uint64(seed) + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def normal_rows(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal rows, float64, (n, *shape), on the CPU."""
    rows = [np.random.Generator(np.random.Philox(int(s))).standard_normal(shape) for s in seeds.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape), dtype=torch.float64)


def uniform_rows(seeds: torch.Tensor, columns: int) -> torch.Tensor:
    """Uniform rows in [0, 1), float64, (n, columns), on a stream disjoint from `normal_rows`."""
    rows = [np.random.Generator(np.random.Philox([int(s), 1])).random(columns) for s in seeds.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, columns), dtype=torch.float64)
