"""What frozen text encoders make of a task's prompts, computed once and looked up by content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 32  # prompts at once: kernels round by the size of a batch, so it is the same for whoever computes them


@dataclass(frozen=True)
class Embeddings:
    """rows: a prompt's tokens -> its place; hidden: (n, length, width); pooled: (n, width), or None where there is none."""

    rows: dict[bytes, int]
    hidden: torch.Tensor
    pooled: torch.Tensor | None

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
        places = [self.rows.get(key) for key in _keys(tokens.cpu())]
        if None in places:
            return None
        index = torch.tensor(places)
        return self.hidden[index].to(tokens.device), None if self.pooled is None else self.pooled[index].to(
            tokens.device
        )


def _keys(tokens: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in tokens.contiguous().numpy()]
