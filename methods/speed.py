"""SPEED: an edit of the cross-attention in the null space of what must stay; nothing is trained.

Source: Li et al., "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models", ICLR 2026, arXiv:2503.07392, and the
released code. As in UCE (`methods.uce`) each projection W (released: values) is edited by itself, so that the embeddings c_i of a concept
get the outputs of their guides g_i; but the change D P of W acts only in directions in which what must stay has next to no extent:
    minimise  sum_i |(W + D P) c_i - W g_i|^2 / n + lam |D P|^2   with  D P K = 0
P projects onto the eigenvectors of mean c_j c_j^T, over the embeddings c_j of what must stay, whose eigenvalues are below `threshold`; n
is the number of erased prompts. The columns of K stay exactly: the beginning of every prompt, and `CENTRES` means of the other embeddings
of the empty prompt (by k-means). With A = sum c_i c_i^T / n, B = sum g_i c_i^T / n and M = (A P + lam I)^-1 the solution is
    D P = W (B - A) P (I - M K (K^T P M K)^+ K^T P) M
What must stay is refined for each projection. With W_0 = W (B - A)(I + A)^-1, the change without P,
    filter     keeps those c_j whose |W_0 c_j| is above the mean (`filter`; the release's --disable_filter turns it off)
    augment    adds `augment` copies c_j + z v of each, z standard normal, v the right singular vector of W with the smallest singular
               value; of these too only those above their mean stay
The release adds `slack` I to the matrix that is inverted, which softens the constraint (nudity: 0.5); it needs a pseudo-inverse where P
leaves less than K spans. Its k-means starts at random, this one at points that are far apart. It takes means of augmented copies over
chunks of 128 embeddings, here over all.

Embeddings that count (`rows`): the last token of a prompt; or, for nudity, all but its beginning. What UCE's docstring says of last
tokens, of other networks and of what is not edited holds here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field

from methods.base import Data, Model, Scalars
from methods.uce import NULL, Edit, EditSettings, RowChoice

CENTRES = 3  # of the empty prompt, in the release


class SPEEDSettings(EditSettings):
    """Settings of SPEED; defaults are those of the release."""

    projections: Literal["keys_values", "values"] = Field(
        "values", description="the projections that are edited (released: values)"
    )
    rows: Literal["last", "all"] = Field(
        "last", description="embeddings of an erased prompt that count (released: last; nudity: all, see above)"
    )
    preserved: Literal["unconditional", "prompts"] = Field(
        "prompts", description="what must stay: embeddings of the empty prompt, or last tokens of the other prompts"
    )
    lam: float = Field(1.0, gt=0, description="weight of the change (released: 1; 0.05 for many celebrities)")
    threshold: float = Field(0.1, gt=0, description="eigenvalue below which a direction may change (released: 0.1)")
    filter: bool = Field(
        True, description="only what the edit would change most must stay (released: yes, for few concepts)"
    )
    augment: int = Field(10, ge=0, description="random copies of each embedding that must stay (released: 10)")
    slack: float = Field(0.0, ge=0, description="added to the matrix of the constraint (released: 0; nudity 0.5)")


class SPEED(Edit):
    """Edits projections in the null space of what must stay; arXiv:2503.07392."""

    name = "speed"
    source = "Li et al., ICLR 2026, arXiv:2503.07392"
    prepared_by = ("augment",)
    Hyperparameters: ClassVar[type[BaseModel]] = SPEEDSettings
    hp: SPEEDSettings

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: SPEEDSettings) -> dict[str, torch.Tensor]:
        """As UCE's, and `noise` (rows, augment): a standard normal number for each copy of each embedding that may have to stay."""
        tensors = super().prepare(model, task, seed, hyperparameters)
        prompts, length, _ = tensors["embeddings"].shape
        shape = max(prompts, length), hyperparameters.augment
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)
        return tensors | {"noise": noise}

    def next_changes(self) -> Iterator[torch.Tensor]:
        hp, kept = self.hp, self.stay(self.hp.rows)
        problem = *self.paired(hp.rows), len(self.erased)
        fixed, noise = fixed_points(self.embeddings[NULL]), self.prepared["noise"].to(kept)
        self.free = []
        for start in self.start:
            projection = start.double()
            projector = null_space(refined(kept, projection, problem, noise[: len(kept)], hp.filter), hp.threshold)
            self.free.append(projector.trace() / len(projector))
            yield constrained_edit(*problem, projector, fixed, hp.lam, hp.slack)

    def paired(self, rows: RowChoice) -> tuple[torch.Tensor, torch.Tensor]:
        if rows == "last":
            return super().paired(rows)
        (erased, _), (guides, _) = self.of(self.erased), self.of(self.guides)
        return erased[:, 1:].flatten(0, 1), guides[:, 1:].flatten(0, 1)

    def stay(self, rows: RowChoice) -> torch.Tensor:
        """The last tokens of the prompts that must stay, or all embeddings of the empty prompt but the first."""
        return self.embeddings[NULL, 1:] if self.hp.preserved == "unconditional" else super().stay("last")

    def diagnostics(self) -> Scalars:
        """As UCE's, and free: the mean share of directions in which the projections could change."""
        return super().diagnostics() | {"free": torch.stack(self.free).mean()}


Problem = tuple[torch.Tensor, torch.Tensor, int]  # c and g, both (m, width), and the number of erased prompts


def constrained_edit(
    erased: torch.Tensor,
    guides: torch.Tensor,
    count: int,
    projector: torch.Tensor,
    fixed: torch.Tensor,
    lam: float,
    slack: float = 0.0,
) -> torch.Tensor:
    """T (width, width) such that W T = W + D P solves the problem for W; embeddings are rows, (m, width), float64.

    count: n; projector: P, (width, width); fixed: the columns of K as rows, (k, width), none with k = 0.
    """
    identity, k = torch.eye(erased.shape[1]).to(erased), fixed.T
    a, gain = erased.T @ erased / count, (guides - erased).T @ erased / count  # A, and B - A
    m = torch.linalg.inv(a @ projector + lam * identity)
    held = k.T @ projector @ m @ k
    inverse = torch.linalg.pinv((held + held.T) / 2 + slack * torch.eye(len(held)).to(held), hermitian=True)
    return identity + gain @ projector @ (identity - m @ k @ inverse @ k.T @ projector) @ m


def null_space(kept: torch.Tensor, threshold: float) -> torch.Tensor:
    """P (width, width): onto the eigenvectors of mean c c^T, over the rows c of `kept` (m, width), with eigenvalues below `threshold`."""
    values, vectors = torch.linalg.eigh(kept.T @ kept / len(kept))
    free = vectors[:, values < threshold]
    return free @ free.T


def refined(
    kept: torch.Tensor, projection: torch.Tensor, problem: Problem, noise: torch.Tensor, filtered: bool
) -> torch.Tensor:
    """What must stay for one projection (out, width), of all that may have to, `kept` (m, width): filtered and augmented.

    noise: (m, copies), a standard normal number for each copy.
    """
    identity = torch.eye(kept.shape[1]).to(kept)
    first = projection @ (
        constrained_edit(*problem, identity, kept[:0], 1.0) - identity
    )  # the change without a constraint
    if filtered:
        chosen = above_mean(kept, first)
        kept, noise = kept[chosen], noise[chosen]
    if not noise.numel():
        return kept
    direction = torch.linalg.svd(projection, full_matrices=False).Vh[-1]
    copies = (kept[:, None] + noise[:, :, None] * direction).flatten(0, 1)
    return torch.cat([kept, copies[above_mean(copies, first)]])


def above_mean(embeddings: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Which of the embeddings (m, width) a change (out, width) of a projection moves by more than their mean, (m,); all if none does."""
    moved = (embeddings @ change.T).norm(dim=1)
    chosen = moved > moved.mean()
    return chosen if bool(chosen.any()) else torch.ones_like(chosen)


def fixed_points(null: torch.Tensor) -> torch.Tensor:
    """The first embedding of the empty prompt (length, width), and the centres of `CENTRES` clusters of the others, (k, width)."""
    points = null[1:]
    if len(points) <= CENTRES:
        return null
    centres = points[:1]
    while len(centres) < CENTRES:  # each new one is the point that is farthest from the others
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    for _ in range(100):
        nearest = torch.cdist(points, centres).argmin(1)
        moved = torch.stack(
            [points[nearest == i].mean(0) if (nearest == i).any() else c for i, c in enumerate(centres)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([null[:1], centres])
