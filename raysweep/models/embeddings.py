"""A table of a task's prompts embedded by frozen text encoders, looked up by content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

RECENT = 4  # answers that stay on the device: a sampler asks the same at every step
CHUNK = 32  # prompts per forward pass; fixed, because kernels round differently for another number


@dataclass(frozen=True)
class Embeddings:
    """rows: a prompt's tokens -> its row; hidden: (n, length, width); pooled: (n, width), or None if the model has none."""

    rows: dict[bytes, int]
    hidden: torch.Tensor
    pooled: torch.Tensor | None
    recent: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict, compare=False)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: torch.Tensor) -> Embeddings:
        """The embeddings of all distinct rows of `tokens` (n, L), on the CPU."""
        distinct = torch.unique(tokens.cpu(), dim=0)
        embedded = [model.encoded(part.to(model.device)) for part in distinct.split(CHUNK)]
        pooled = None if embedded[0][1] is None else torch.cat([p.cpu() for _, p in embedded])
        return cls({k: i for i, k in enumerate(_keys(distinct))}, torch.cat([h.cpu() for h, _ in embedded]), pooled)

    def look_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(hidden, pooled) of prompts, on the device of their tokens; None if one of them is not in the table."""
        on_cpu = tokens.cpu()
        key = (on_cpu.numpy().tobytes(), tuple(on_cpu.shape), tokens.device)
        if key not in self.recent:
            rows = [self.rows.get(row) for row in _keys(on_cpu)]
            if None in rows:
                return None
            # each distinct prompt is sent to the device once
            used, inverse = torch.unique(torch.tensor(rows), return_inverse=True)
            hidden, pooled = (
                None if table is None else table[used].to(tokens.device)[inverse.to(tokens.device)]
                for table in (self.hidden, self.pooled)
            )
            assert hidden is not None
            while len(self.recent) >= RECENT:
                del self.recent[next(iter(self.recent))]
            self.recent[key] = hidden, pooled
        return self.recent[key]


def _keys(tokens: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in tokens.contiguous().numpy()]
