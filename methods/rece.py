"""RECE: UCE's edit, then epochs in which the embeddings that bring the concept back are derived and erased as well.

Source: Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024, arXiv:2407.12383, and the
released code. After UCE's edit (`methods.uce`) each epoch
    derives   c' = argmin sum_W |W_now c' - W_old c|^2 + reg |c'|^2 = (reg I + sum W_now^T W_now)^-1 sum W_now^T W_old c
    erases    W_next = argmin sum |W c' - W_now g|^2 + preserve_epochs sum_j |W c_j - W_now c_j|^2 + lam_epochs |W - W_now|_F^2
over all edited projections W and all embeddings c of what must be forgotten: c' is what an attacker would feed to the edited
cross-attention to get the outputs that the original one (W_old) has for the concept. `reg` keeps c' small, the paper's way to limit the
damage of erasing it. With W_old T for W_now, as in UCE,
    c' = (reg I + T^T S T)^-1 T^T S c,   S = sum W_old^T W_old,   T_next = T (I + (sum (g - c') c'^T) A^-1)
Every epoch looks at all embeddings of a prompt, from its beginning to the end of the padding, whatever `rows` says: that one, like `lam`
and `preserve`, is of UCE's edit, which the release reads from a file. Targets are outputs of the projections of the last epoch, as
released.

The release can also penalise the distance of c' to another embedding, or of its outputs to others (`--emb_computing close_standardreg`,
`close_surrogatereg`), which its scripts do not use; that is not implemented. It keeps the epoch with the fewest detections, for which
raysweep has the audit: the number of epochs is a setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from pydantic import Field

from methods.base import Scalars
from methods.uce import UCE, UCESettings, edit, share


class RECESettings(UCESettings):
    """Settings of RECE; defaults are those of the release for nudity."""

    epochs: int = Field(3, ge=0, description="derivations of embeddings, each erased (released: 1 to 3); 0 is UCE")
    reg: float = Field(0.1, gt=0, description="weight of |c'|^2 (released: 0.1; 0.001 for artists and hard objects)")
    preserve_epochs: float = Field(0.1, ge=0, description="as preserve, in the epochs (paper, lambda_1, released: 0.1)")
    lam_epochs: float = Field(0.1, gt=0, description="as lam, in the epochs (paper, lambda_2, released: 0.1)")


class RECE(UCE):
    """UCE, and the erasure of the embeddings that undo it; arXiv:2407.12383."""

    name = "rece"
    source = "Gong et al., ECCV 2024, arXiv:2407.12383"
    Hyperparameters = RECESettings
    hp: RECESettings

    @property
    def steps(self) -> int:
        return 1 + self.hp.epochs

    def setup(self) -> None:
        super().setup()
        self.change = torch.eye(self.embeddings.shape[-1]).to(self.embeddings)
        self.gram = torch.zeros_like(self.change)
        for w in self.start:
            self.gram += w.double().T @ w.double()

    def next_changes(self) -> Iterable[torch.Tensor]:
        if self.done == 0:
            self.change = self.first_change()
        else:
            concept, guides = self.paired("all")
            found = derived(concept, self.change, self.gram, self.hp.reg)
            self.change = self.change @ edit(
                found, guides, self.stay("all"), self.hp.preserve_epochs, self.hp.lam_epochs
            )
        return repeat(self.change, len(self.params))

    def size(self, embeddings: torch.Tensor) -> torch.Tensor:
        """sum |W_old c|^2 over all edited projections and the rows c of `embeddings` (m, width), a scalar."""
        return (embeddings @ self.gram * embeddings).sum()

    def diagnostics(self) -> Scalars:
        """As UCE's, and restored: how much of the way from the guide to the concept the best embeddings of an attacker bring back, in
        squared outputs of the projections: 1 all of it, 0 none."""
        concept, guides = self.paired("all")
        missing = derived(concept, self.change, self.gram, self.hp.reg) @ self.change.T - concept
        return super().diagnostics() | {"restored": 1 - share(self.size(missing), self.size(guides - concept))}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"change": self.change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.change = state["change"]


def derived(concept: torch.Tensor, change: torch.Tensor, gram: torch.Tensor, reg: float) -> torch.Tensor:
    """The embeddings c' (m, width) whose outputs under W_old `change` are nearest to those of `concept` (m, width) under W_old.

    change, gram: T and S, (width, width); all float64.
    """
    a = change.T @ gram @ change + reg * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(a, change.T @ gram @ concept.T).T
