"""SSD: selective synaptic dampening. Weights that matter much more for the forget set than for the rest shrink; nothing is trained.

Source: Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024,
arXiv:2308.07707, and the released code, which are for classifiers. D_f and D are the importances of each weight for the forget set and
for the whole training set, diagonals of the Fisher information:
    selected: D_f > alpha D
    theta <- beta theta,   beta = min(lam D / D_f, 1)   where selected
All other weights stay bit for bit. beta < lam / alpha, so its bound 1 matters only if lam > alpha.

Importances are estimated by the mean over batches of the squared gradient of a batch's mean loss, as released, not of a row's: within a
batch of one class gradients add up, among many classes they partly cancel, so what alpha selects depends on `batch_size` and on the
order of the rows (in the release sorted by class). With `batch_size: 1` they are those of the empirical Fisher information of single
rows. (`methods.selective_amnesia` squares the sum of a row's gradients over timesteps.) Both importances are taken at the base weights, in
evaluation mode, once for all alpha and lam.

`reference: all` is the paper's D = s D_f + (1 - s) D_r with the share s of the rows that must be forgotten: it is made of the importance
D_r for the retain set, which one pass over both sets would have to visit anyway. As D >= s D_f, an alpha of 1/s or more selects nothing:
of 10 for one of ten classes. With `reference: retain`, SLUG's, D = D_r; an alpha of a then selects what a / (1 - s + s a) selects with all.
Weights that the retain set does not reach, such as the embedding of the forgotten label, become zero with retain and shrink by lam s with
all: a model may then no longer answer to the label and still be able to draw the class.

Losses: a diffusion model has the diffusion loss on both sets, in `passes` draws of noise and timestep per forget row and about as many
rows of the retain set; that is raysweep's transfer of the method. A contrastive model has CLIP's own loss, symmetric InfoNCE, in which
other rows of the batch with the same caption count as wrong. The code released with SLUG (arXiv:2407.11867), which compares with SSD,
takes 1 - cos(image, caption) on the forget set (`forget_loss: cosine`), or the same loss in its variant `ssd_o`. Two losses have two
scales, so that alpha depends on both. As in that code, CLIP's temperature stays as it is. That code applies ten values of lam one after
the other to the same weights, so that its edits add up; this is not implemented.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from methods.base import Data, Goal, Hyperparameters, Method, Model, Scalars
from methods.layers import passes_over, square_pass
from methods.losses import forget_loss, is_contrastive, retain_loss
from methods.rows import Batch, Draw


class SSDSettings(Hyperparameters):
    """Settings of SSD; defaults are the release's for a class."""

    alpha: float = Field(10.0, ge=0, description="weights with D_f > alpha D are dampened (released: 5 to 50)")
    lam: float = Field(
        1.0, ge=0, description="dampening: weights are multiplied by lam D / D_f (released: 1, faces 0.1)"
    )
    reference: Literal["all", "retain"] = Field(
        "all", description="D: importance for the whole training set (released), or the retain set (SLUG's code)"
    )
    forget_loss: Literal["same", "cosine"] = Field(
        "same",
        description="loss of the forget set: that of the other rows, or 1 - cos(image, caption) (SLUG's code, CLIP)",
    )
    batch_size: int = Field(64, ge=1, description="rows per squared gradient (released: 64; SLUG's code: 32)")
    passes: int = Field(32, ge=1, description="draws of noise and timestep per forget row, for diffusion models")


class SSD(Method):
    """Dampens the weights that the forget set needs more than the rest does; arXiv:2308.07707."""

    name = "ssd"
    source = "Foster et al., AAAI 2024, arXiv:2308.07707"
    needs = frozenset({"forget", "retain"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    forwards_per_step = 0  # two passes of squared gradients in all, shared by every trial
    copies = 4
    tape = 0
    prepared_by = ("forget_loss", "batch_size", "passes")
    quick = {"passes": 1}
    Hyperparameters = SSDSettings
    hp: SSDSettings

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: SSDSettings) -> dict[str, torch.Tensor]:
        """`forget/NAME` and `retain/NAME`: D_f and D_r of each tensor that may change; `share`: s, (1,) in float64.

        Raises ValueError if a gradient is not finite, or vanishes in every weight of a set.
        """
        hp, tensors, counts = hyperparameters, dict[str, torch.Tensor](), list[int]()
        names = [n for n, p in model.net.named_parameters() if p.requires_grad and dampens(n)]
        losses = (forget_loss if hp.forget_loss == "cosine" else retain_loss, retain_loss)
        passes = passes_over(model, task, hp.passes, seed)
        for split, loss, times in zip(("forget", "retain"), losses, passes, strict=True):
            squares = square_pass(model, task, split, loss, names, hp.batch_size, times, seed)
            if not any(bool(s.any()) for s in squares.values()):
                raise ValueError(f"the gradient on the {split} set vanishes in every weight")
            tensors |= {f"{split}/{name}": s for name, s in squares.items()}
            counts.append(len(task.all_rows(split, seed).x))
        return tensors | {"share": torch.tensor([counts[0] / sum(counts)], dtype=torch.float64)}

    @classmethod
    def unsuited(cls, hyperparameters: SSDSettings, model: Model, goal: Goal) -> list[str]:
        if is_contrastive(model):
            alone = hyperparameters.batch_size == 1
            return ["batch_size: a contrastive loss compares the rows of a batch; use at least 2"] if alone else []
        if hyperparameters.forget_loss == "cosine":
            return ["forget_loss: cosine compares images with captions, and this model does not; use same"]
        return []

    @property
    def steps(self) -> int:
        return 1

    def trains(self, name: str) -> bool:
        return dampens(name)

    def draws(self) -> dict[str, Draw]:
        return {}

    @torch.no_grad()
    def step(self, batch: Batch) -> Scalars:
        """Sets the weights to their base values times beta. Returns the share of weights that are `selected`."""
        hp, selected, total = self.hp, 0, 0
        share = float(self.prepared["share"]) if hp.reference == "all" else 0.0
        for name, weight, start in zip(self.names, self.params, self.start, strict=True):
            forget, retain = (self.prepared[f"{split}/{name}"].to(start) for split in ("forget", "retain"))
            chosen, beta = dampening(forget, reference(forget, retain, share), hp.alpha, hp.lam)
            weight.copy_(torch.where(chosen, start * beta, start))
            selected, total = selected + int(chosen.sum()), total + chosen.numel()
        self.done += 1
        return {"selected": torch.tensor(selected / total, dtype=torch.float64)}


def dampens(name: str) -> bool:
    """Whether the parameter of this name may change: all but CLIP's temperature."""
    return not name.endswith("logit_scale")


def reference(forget: torch.Tensor, retain: torch.Tensor, share: float) -> torch.Tensor:
    """D = s D_f + (1 - s) D_r, of the shape of both; D_r itself for s = 0."""
    return torch.lerp(retain, forget, share)


def dampening(
    forget: torch.Tensor, reference: torch.Tensor, alpha: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(selected, beta) of each weight from its importances D_f and D >= 0, all of one shape; beta is in [0, 1] where selected, and
    without meaning elsewhere."""
    return forget > alpha * reference, (lam * reference / forget).clamp(max=1)
