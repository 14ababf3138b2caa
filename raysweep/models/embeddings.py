"""What frozen text encoders make of a task's prompts, computed once and looked up by content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

RECENT = 4  # answers that are kept where they were asked for: a sampler asks the same at every step
CHUNK = 32  # prompts at once: kernels round by the size of a batch, so it is the same for whoever computes them


@dataclass(frozen=True)
class Embeddings:
    """rows: a prompt's tokens -> its place; hidden: (n, length, width); pooled: (n, width), or None where there is none."""

    rows: dict[bytes, int]
    hidden: torch.Tensor
    pooled: torch.Tensor | None
    recent: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict, compare=False)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: torch.Tensor) -> Embeddings:
        """The embeddings of all distinct rows of `tokens` (n, L), on the CPU."""
        distinct = torch.unique(tokens.cpu(), dim=0)
        made = [model.encoded(part.to(model.device)) for part in distinct.split(CHUNK)]
        pooled = None if made[0][1] is None else torch.cat([p.cpu() for _, p in made])
        return cls({k: i for i, k in enumerate(_keys(distinct))}, torch.cat([h.cpu() for h, _ in made]), pooled)

    def look_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(hidden, pooled) of the prompts where the tokens are; None if one of them is not known."""
        here = tokens.cpu()
        key = (here.numpy().tobytes(), tuple(here.shape), tokens.device)
        if key not in self.recent:
            places = [self.rows.get(row) for row in _keys(here)]
            if None in places:
                return None
            # each prompt is sent to the device once, however many rows ask for it
            used, back = torch.unique(torch.tensor(places), return_inverse=True)
            hidden, pooled = (
                None if table is None else table[used].to(tokens.device)[back.to(tokens.device)]
                for table in (self.hidden, self.pooled)
            )
            assert hidden is not None
            while len(self.recent) >= RECENT:
                del self.recent[next(iter(self.recent))]
            self.recent[key] = hidden, pooled
        return self.recent[key]


def _keys(tokens: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in tokens.contiguous().numpy()]
