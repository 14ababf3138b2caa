"""UCE: unified concept editing, one least-squares problem for the keys and values of the cross-attention; nothing is trained.

Source: Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv:2308.14761, and both releases of its code.
Each projection W from the embeddings of a prompt to keys or to values becomes the minimiser of
    sum_i |W c_i - W_old g_i|^2 + preserve sum_j |W c_j - W_old c_j|^2 + lam |W - W_old|_F^2
c_i: embeddings of what must be forgotten; g_i: those of its guide, whose output they get; c_j: those of what must stay. The erasing term
has weight 1, as in both releases: only the ratios of the three weights matter. All targets are outputs of W_old, so one matrix solves the
problem for every projection:
    W = W_old T,   T = I + (sum_i (g_i - c_i) c_i^T) A^-1,   A = sum_i c_i c_i^T + preserve sum_j c_j c_j^T + lam I
For the cross-attention the edit is a linear change T of the embeddings. It is computed in float64. The text encoder stays as it is.

Embeddings that count (`rows`), by release; c and g are paired row by row:
    from_last  the first: from the last token of the prompt on, with its end and the padding; of what must stay all rows
    last       the current one: the last token alone, also of what must stay
    all        RECE's (`methods.rece`), in its own edits: all rows
The last token is a concept's only in prompts that end with it; for other prompts use `all`. What is forgotten is one prompt, or all
prompts of the search (the releases: five templates, off by default). The guide is the empty prompt, or the concept that stands in for the
forgotten one (the releases: any text, such as "art" for an artist). Of an XL model the empty prompt has embeddings of zeros, as its
unconditional branch has; the release uses those of the empty text.

What reaches the network beside the cross-attention is not edited: the pooled embedding of an XL model, and `add_embedding` of a U-Net with
`addition_embed_type`, such as that of raysweep's own small pipelines.

A class-conditional network has no such projection. It adds the embedding of the class to that of the time step, and only functions of the
sum follow that are not linear. Its table of classes is linear in the label, but there the same problem has the trivial solution of
overwriting the forgotten class's row by the guide's.

The first release can also take from a target its component along the old output (`--technique tensor`, not its default), and both can
balance attributes (debiasing); neither is implemented.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import repeat
from typing import Any, Literal, cast

import torch
from pydantic import Field

from methods.base import Attending, Data, Diverged, Goal, Hyperparameters, Method, Model, Scalars
from methods.rows import Batch, Draw

RowChoice = Literal["last", "from_last", "all"]
PROJECTIONS = {
    "keys_values": (".attn2.to_k.weight", ".attn2.to_v.weight"),
    "values": (".attn2.to_v.weight",),
}
CHUNK = 32  # prompts per pass of the text encoder
# rows of the prepared tensors: the empty prompt, the concept, the first prompt of the search
NULL, CONCEPT, FIRST = 0, 1, 2


class EditSettings(Hyperparameters):
    """Settings of an edit of the cross-attention: what is sent where, and what must stay."""

    erased: Literal["concept", "prompts"] = Field(
        "concept", description="what is sent to its guide: one prompt, or all search prompts of the forgotten concept"
    )
    guide: Literal["unconditional", "override"] = Field(
        "unconditional", description="the empty prompt, or the prompts of the concept that stands in"
    )
    projections: Literal["keys_values", "values"] = Field(
        "keys_values", description="the projections that are edited (UCE and RECE: keys and values; SPEED: values)"
    )


class UCESettings(EditSettings):
    """Settings of UCE; defaults are those of the first release, for an object."""

    rows: RowChoice = Field("from_last", description="embeddings of a prompt that count (see above)")
    preserved: Literal["unconditional", "prompts", "both"] = Field(
        "unconditional", description="what must stay: the empty prompt, the search prompts of other concepts, or both"
    )
    preserve: float = Field(1.0, ge=0, description="weight of each prompt that must stay (released: 1, artists 0.1)")
    lam: float = Field(0.5, gt=0, description="weight of the change of the projections (released: 0.5)")


class Edit(Method):
    """A method that multiplies projections of the cross-attention by matrices T from the right.

    Subclasses define `next_changes`; `preserved` of their settings names what must stay.
    """

    needs = frozenset()
    abilities = frozenset({"cross-attention to prompts"})
    kinds = frozenset({"concept"})
    forwards_per_step = 0  # one pass of the text encoder over the prompts, shared by every trial
    copies = 1.15  # the first values of the projections: 2 % of the weights of Stable Diffusion 1.4, 10 % of XL's
    tape = 0
    hp: Any

    def setup(self) -> None:
        super().setup()
        device, goal = self.params[0].device, self.goal
        embeddings, last = (self.prepared[name].to(device) for name in ("embeddings", "last"))
        self.embeddings, self.last = embeddings.double(), last
        self.erased, self.guides = pairs(goal, self.hp)
        of_kept = [FIRST + i for i, (c, _) in enumerate(goal.prompts) if c in goal.kept]
        self.kept = {"unconditional": [NULL], "prompts": of_kept, "both": [NULL, *of_kept]}[self.hp.preserved]

    @classmethod
    @torch.no_grad()
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: Any) -> dict[str, torch.Tensor]:
        """`embeddings` (n, length, width) of the empty prompt, the concept, and the prompts of the search, and the index `last` (n,)
        of the last token of each."""
        attending, goal, device = cast(Attending, model), task.goal, next(model.net.parameters()).device
        null = model.unconditional(1)
        assert null is not None
        searched = torch.tensor([tokens for _, tokens in goal.prompts], device=device)
        tokens = torch.cat([null.to(device), goal.forgotten(1, device), searched])
        training = model.net.training
        model.net.eval()
        embedded = [attending.attended(part) for part in tokens.split(CHUNK)]
        model.net.train(training)
        embeddings, last = (torch.cat(parts) for parts in zip(*embedded, strict=True))
        return {"embeddings": embeddings, "last": last}

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        ends, reasons = PROJECTIONS[hyperparameters.projections], []
        if not any(p.requires_grad and name.endswith(ends) for name, p in model.net.named_parameters()):
            reasons.append("none of the cross-attention's keys and values may change (train.modules)")
        if hyperparameters.guide == "override":
            if goal.override_class is None:
                reasons.append("guide: the task names no concept that is to stand in for the forgotten one")
            elif len(set(map(len, pairs(goal, hyperparameters)))) > 1:
                reasons.append(
                    "guide: the forgotten concept and the one that stands in need equally many search prompts, from the same "
                    "templates; or use erased: concept"
                )
        return reasons

    @property
    def steps(self) -> int:
        return 1

    def trains(self, name: str) -> bool:
        return name.endswith(PROJECTIONS[self.hp.projections])

    def draws(self) -> dict[str, Draw]:
        return {}

    @torch.no_grad()
    def step(self, batch: Batch) -> Scalars:
        """Sets each projection to its base values times its matrix; raises Diverged on values that are not finite."""
        for name, given in (("embeddings", self.embeddings), *zip(self.names, self.start, strict=True)):
            if not bool(torch.isfinite(given).all()):
                raise Diverged(f"step {self.done}: not finite: {name}")
        for projection, start, change in zip(self.params, self.start, self.next_changes(), strict=True):
            projection.copy_(start.double() @ change)
        self.done += 1
        return self.diagnostics()

    @abstractmethod
    def next_changes(self) -> Iterable[torch.Tensor]:
        """The matrix T (width, width) of each projection after the next step, float64."""

    def paired(self, rows: RowChoice) -> tuple[torch.Tensor, torch.Tensor]:
        """(c, g): the embeddings to erase and those of their guides, both (m, width)."""
        return aligned(*self.of(self.erased), *self.of(self.guides), rows)

    def stay(self, rows: RowChoice) -> torch.Tensor:
        """The embeddings that must stay, (m, width)."""
        embeddings, last = self.of(self.kept)
        return embeddings[torch.arange(len(last)), last] if rows == "last" else embeddings.flatten(0, 1)

    def of(self, prompts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings (k, length, width) of some prompts, and the index (k,) of their last tokens."""
        return self.embeddings[prompts], self.last[prompts]

    def diagnostics(self) -> Scalars:
        """residual: the squared distance of what is erased from its guide, and drift: the squared change of what must stay, both in the
        outputs of the projections; as a share of the distance before the edit, and of the squared outputs."""
        (erased, guides), kept = self.paired(self.hp.rows), self.stay(self.hp.rows)
        left, before, moved, size = (torch.zeros((), dtype=torch.float64, device=kept.device) for _ in range(4))
        squares = kept.T @ kept
        for new, old in zip((p.detach().double() for p in self.params), (p.double() for p in self.start), strict=True):
            left += (erased @ new.T - guides @ old.T).square().sum()
            before += ((erased - guides) @ old.T).square().sum()
            moved += ((new - old) @ squares * (new - old)).sum()
            size += (old @ squares * old).sum()
        return {"residual": share(left, before), "drift": share(moved, size)}


class UCE(Edit):
    """Sends the embeddings of a concept to those of its guide, in closed form; arXiv:2308.14761."""

    name = "uce"
    source = "Gandikota et al., WACV 2024, arXiv:2308.14761"
    Hyperparameters = UCESettings
    hp: UCESettings

    def next_changes(self) -> Iterable[torch.Tensor]:
        return repeat(self.first_change(), len(self.params))

    def first_change(self) -> torch.Tensor:
        """The matrix T of all projections, (width, width)."""
        erased, guides = self.paired(self.hp.rows)
        return edit(erased, guides, self.stay(self.hp.rows), self.hp.preserve, self.hp.lam)


def pairs(goal: Goal, hyperparameters: EditSettings) -> tuple[list[int], list[int]]:
    """Rows of the prepared tensors: what is erased, and its guides in the same order."""

    def of(cls: int | None) -> list[int]:
        return [FIRST + i for i, (c, _) in enumerate(goal.prompts) if c == cls]

    erased = [CONCEPT] if hyperparameters.erased == "concept" else of(goal.forget_class)
    if hyperparameters.guide == "unconditional":
        return erased, [NULL] * len(erased)
    guides = of(goal.override_class)
    return erased, guides[:1] if hyperparameters.erased == "concept" else guides


def aligned(
    erased: torch.Tensor, last: torch.Tensor, guides: torch.Tensor, last_of_guides: torch.Tensor, rows: RowChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """(c, g), both (m, width): the rows that count of prompts (k, length, width) and of their guides, paired.

    last, last_of_guides: the index (k,) of the last token of each. With `from_last` the two last tokens are a pair, and so are the
    rows after them, as far as both prompts reach.
    """
    if rows == "all":
        return erased.flatten(0, 1), guides.flatten(0, 1)
    first, second = [], []
    for e, a, g, b in zip(erased, last.tolist(), guides, last_of_guides.tolist(), strict=True):
        count = 1 if rows == "last" else len(e) - max(a, b)
        first.append(e[a : a + count])
        second.append(g[b : b + count])
    return torch.cat(first), torch.cat(second)


def edit(erased: torch.Tensor, guides: torch.Tensor, kept: torch.Tensor, preserve: float, lam: float) -> torch.Tensor:
    """T (width, width) such that W T minimises the objective for every W; embeddings are rows, (m, width), float64.

    The identity, bit for bit, if every embedding is its own guide.
    """
    identity = torch.eye(erased.shape[1]).to(erased)
    a = erased.T @ erased + preserve * (kept.T @ kept) + lam * identity
    return identity + torch.linalg.solve(a, erased.T @ (guides - erased)).T  # A is symmetric


def share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole, and 0 where `whole` vanishes."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)
