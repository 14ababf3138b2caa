"""SLUG: single layer unlearning gradient, one tensor moved once along one stored gradient.

Source: Cai et al., "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025, arXiv:2407.11867, and the
released code. At the base weights theta, two passes give g_f, the gradient of the loss on the forget set, and g_r, that of
the loss on the retain set, each a mean over samples. A "layer" is one named tensor l:
    importance(l) = |g_f,l| / |theta_l|,   alignment(l) = |cos(g_f,l, g_r,l)| (released; the paper writes it signed)
    Pareto layers: those to which no other is strictly better in both (more important, less aligned), per tower
    theta_l <- theta_l + lam g_f,l,   lam = step |theta_l| / |g_f,l| > 0
so `step` is |Delta theta_l| / |theta_l| and the forget loss *rises*. The released code ascends for CLIP and, by its signs,
descends in the Stable Diffusion and VLM searches: `direction` names both. Gradients of several concepts are taken on the
original weights and their edits added (`edited`).

Losses: for CLIP, forget = 1 - cos(image, caption), retain = symmetric InfoNCE (its batch size matters). The released code
edits Stable Diffusion by the same two, of the CLIP model that its text encoder is of (`loss: clip`; the U-Net is never
run). With `loss: own` a diffusion model uses the diffusion loss on both sets, in `passes` draws of noise and timestep per
forget row and about as many rows of the retain set, and any of its tensors may be chosen. The network is in evaluation mode,
gradients are cleared between batches, retain captions are those of the data set; the release's Hugging Face path does none
of these. Eligible tensors have at least two dimensions and none of `layers.EXCLUDED` in their names; with `norms` the gains of
norms are eligible too. In the release's open_clip path, which its CLIP experiments take, they compete for the Pareto set, in
its Hugging Face path they do not.

`bisection` > 0 searches for the step as the paper does: that many evaluations of the model's own forget accuracy, doubling
until the model has forgotten and halving the bracket afterwards; the smallest step that forgot is kept.
"""

from __future__ import annotations

import difflib
import itertools
import math
from typing import Any, Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Data, Goal, Hyperparameters, Method, Model, Scalars
from methods.layers import depth, eligible, gradient_pass, group, passes_over, tower
from methods.losses import contrastive_part, forget_loss, recall, retain_loss
from methods.rows import Batch, Draw

RULES = ("deepest", "importance", "alignment")


class SLUGSettings(Hyperparameters):
    """Settings of SLUG."""

    layer: str = Field("deepest", description="a tensor by name, or a rule over the Pareto layers (released: deepest)")
    group: Literal["tensor", "block"] = Field(
        "tensor", description="block: q, k, v or both MLP tensors change together"
    )
    step: float = Field(0.1, gt=0, le=8, description="|change| / |tensor| (released: the search starts at 0.1 or 0.4)")
    direction: Literal["ascent", "descent"] = Field(
        "ascent", description="of the forget loss; descent: as released, HF"
    )
    loss: Literal["own", "clip"] = Field(
        "own",
        description="that of the model, or of the CLIP model that its text encoder is of (released, Stable Diffusion)",
    )
    alignment: Literal["absolute", "signed"] = Field("absolute", description="cosine as released, or as in the paper")
    norms: bool = Field(False, description="whether gains of norms compete (released: open_clip path yes, others no)")
    candidates: Literal["pareto", "all"] = Field("pareto", description="tensors that `layer: from_model` offers")
    bisection: int = Field(0, ge=0, le=30, description="evaluations of the paper's step search (paper: 10); 0: off")
    target: float = Field(
        0.0, ge=0, lt=1, description="forget accuracy at which the search counts as done (released: 0)"
    )
    batch_size: int = Field(
        16, ge=1, description="rows per batch of the two passes, and of an evaluation (released: 16)"
    )
    passes: int = Field(32, ge=1, description="draws of noise and timestep per forget row, for diffusion models")


class SLUG(Method):
    """One tensor, one gradient, one step; arXiv:2407.11867."""

    name = "slug"
    source = "Cai et al., ICML 2025, arXiv:2407.11867"
    needs = frozenset({"forget", "retain"})
    model_kinds = frozenset({"diffusion", "contrastive"})
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 0  # two gradient passes in all, shared by every trial
    copies = 3
    tape = 0
    prepared_by = ("loss", "batch_size", "passes", "norms")
    quick = {"passes": 1}
    Hyperparameters = SLUGSettings
    hp: SLUGSettings

    def setup(self) -> None:
        super().setup()
        self.theta = dict(zip(self.names, self.params, strict=True))
        self.before = dict(zip(self.names, self.start, strict=True))
        self.chosen = group(choose(self.prepared, self.hp), list(self.theta), self.hp.group)
        lead = self.chosen[0]
        norm, size = self.before[lead].norm(), self.prepared[f"forget/{lead}"].norm()
        self.unit = float(norm / size) * (1 if self.hp.direction == "ascent" else -1)
        self.bracket = Bracket(self.hp.step)

    @classmethod
    def prepare(cls, model: Model, task: Data, seed: int, hyperparameters: SLUGSettings) -> dict[str, torch.Tensor]:
        """`forget/NAME` for each eligible tensor, and `statistics/NAME` = (|theta|^2, |g_f|^2, <g_f, g_r>, |g_r|^2)."""
        model = compared_model(model, hyperparameters)
        names = eligible(model, hyperparameters.norms)
        theta = dict(model.net.named_parameters())
        size = hyperparameters.batch_size
        forget_passes, retain_passes = passes_over(model, task, hyperparameters.passes, seed)
        g_f = gradient_pass(model, task, "forget", forget_loss, names, size, forget_passes, seed)
        g_r = gradient_pass(model, task, "retain", retain_loss, names, size, retain_passes, seed)
        tensors = {}
        for name in names:
            f, r, w = (v.double().reshape(-1) for v in (g_f[name], g_r[name], theta[name].detach()))
            tensors[f"forget/{name}"] = g_f[name]
            tensors[f"statistics/{name}"] = torch.stack([w @ w, f @ f, f @ r, r @ r])
        if not any(float(tensors[f"statistics/{n}"][1]) > 0 for n in names):
            raise ValueError("the forget gradient vanishes in every eligible tensor")
        return tensors

    @classmethod
    def choices(cls, name: str, prepared: dict[str, torch.Tensor], hyperparameters: SLUGSettings) -> list[str]:
        """The rules, and the names of the candidates that no rule picks, the most important first."""
        if name != "layer":
            return super().choices(name, prepared, hyperparameters)
        picked = {choose(prepared, hyperparameters.model_copy(update={"layer": rule})) for rule in RULES}
        return [*RULES, *(c for c in candidates(prepared, hyperparameters) if c not in picked)]

    @classmethod
    def on_images(cls, hyperparameters: SLUGSettings) -> bool:
        return hyperparameters.loss == "clip"

    @classmethod
    def unsuited(cls, hyperparameters: SLUGSettings, model: Model, goal: Goal) -> list[str]:
        if hyperparameters.loss == "clip" and contrastive_part(model) is None:
            return ["loss: clip: the model comes without the CLIP model that its text encoder is of (task.clip)"]
        names, layer = eligible(compared_model(model, hyperparameters), hyperparameters.norms), hyperparameters.layer
        if not names:
            return ["no eligible tensor of this model may change (train.modules)"]
        if layer in (*RULES, *names):
            return []
        near = difflib.get_close_matches(layer, names, n=3, cutoff=0.3)
        hint = f"near: {', '.join(near) or 'none'}; or a rule: {', '.join(RULES)}"
        return [f"layer: {layer!r} is not an eligible tensor of this model; {hint}"]

    @property
    def steps(self) -> int:
        return max(1, self.hp.bisection)

    def draws(self) -> dict[str, Draw]:
        return {s: Draw(self.hp.batch_size) for s in ("forget", "retain")} if self.hp.bisection else {}

    def step(self, batch: Batch) -> Scalars:
        """Makes the edit; with `bisection`, evaluates the next size of the search."""
        size = self.bracket.size if self.hp.bisection else self.hp.step
        self.apply(size)
        scalars = {"step": torch.tensor(size, dtype=torch.float64)}
        if self.hp.bisection:
            accuracy = recall(compared_model(self.model, self.hp), batch["forget"], batch["retain"], self.goal)
            self.bracket.tell(accuracy <= self.hp.target)
            scalars["forget_accuracy"] = torch.tensor(accuracy, dtype=torch.float64)
        self.done += 1
        return scalars

    def apply(self, size: float) -> None:
        """Sets the chosen tensors to their base values plus a change of relative norm `size`; calls do not add up."""
        with torch.no_grad():
            for name in self.chosen:
                d = self.prepared[f"forget/{name}"].to(self.theta[name])
                self.theta[name].copy_(self.before[name]).add_(d, alpha=size * self.unit)

    def finish(self) -> dict[str, float]:
        if not self.hp.bisection:
            return super().finish()
        bracket = self.bracket
        size = bracket.size if bracket.high is None else bracket.high
        self.apply(size)
        outcome = {"step": size, "bracketed": float(bracket.high is not None), "noisy": float(bracket.noisy)}
        return super().finish() | outcome

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"bracket": vars(self.bracket)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        vars(self.bracket).update(state["bracket"])


def compared_model(model: Any, hyperparameters: SLUGSettings) -> Any:
    """The model whose losses are used: itself, or the CLIP model that its text encoder is of (`loss: clip`)."""
    return contrastive_part(model) if hyperparameters.loss == "clip" else model


class Bracket:
    """The paper's search for the smallest step that forgets: doubling up to the first success, bisection after it.

    size: the step to evaluate next; low: the largest step below `high` that did not forget; high: the smallest that did,
    None before the first. noisy: a step forgot that is not above one that did not, so the outcome is not monotone.
    """

    def __init__(self, first: float):
        self.size, self.low, self.noisy = first, 0.0, False
        self.high: float | None = None

    def tell(self, forgot: bool) -> None:
        """Records the outcome at `size` and sets the next size."""
        if forgot:
            self.high = self.size
        else:
            self.low = self.size
        self.noisy |= self.high is not None and self.high <= self.low
        self.size = 2 * self.size if self.high is None else (self.low + self.high) / 2


def importance(g_forget: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """|g_forget| / |theta| over a whole tensor, a scalar; 0 where theta vanishes."""
    norm = theta.norm()
    return torch.where(norm > 0, g_forget.norm() / torch.where(norm > 0, norm, 1), 0)


def alignment(g_forget: torch.Tensor, g_retain: torch.Tensor, signed: bool = False) -> torch.Tensor:
    """|cos(g_forget, g_retain)| over a whole tensor, a scalar in [0, 1]; 0 where one of them vanishes. signed: the cosine."""
    cosine = gradients.cosine(*gradients.products(g_forget.reshape(-1), g_retain.reshape(-1))).clamp(-1, 1)
    return cosine if signed else cosine.abs()


def pareto_layers(importance: dict[str, float], alignment: dict[str, float]) -> list[str]:
    """The names to which no other is strictly better in both, more important and less aligned, in the order of `importance`.

    A tie in either keeps both. O(n log n).
    """
    front, best = set[str](), -math.inf
    for _, names in itertools.groupby(sorted(importance, key=alignment.__getitem__), key=alignment.__getitem__):
        tied = list(names)
        front |= {n for n in tied if importance[n] >= best}
        best = max(best, *(importance[n] for n in tied))
    return [name for name in importance if name in front]


def edited(theta: dict[str, torch.Tensor], edits: list[tuple[str, float, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`theta` with lam * d added to the named tensor for every edit (name, lam, d); other tensors are the same objects.

    The gradients of several concepts are those at the original weights, so the order of the edits does not matter.
    """
    changed: dict[str, torch.Tensor] = {}
    for name, lam, d in edits:
        changed[name] = changed.get(name, torch.zeros_like(d)) + lam * d
    return theta | {name: theta[name] + change for name, change in changed.items()}


def stored_alignment(prepared: dict[str, torch.Tensor], name: str, signed: bool) -> float:
    """`alignment` of a tensor from its prepared statistics."""
    _, f_sq, dot, r_sq = prepared[f"statistics/{name}"].tolist()
    cosine = dot / (f_sq * r_sq) ** 0.5 if r_sq > 0 else 0.0
    return cosine if signed else abs(cosine)


def candidates(prepared: dict[str, torch.Tensor], hp: SLUGSettings) -> list[str]:
    """The tensors to choose from, the most important first, without those whose gradient or weight vanishes."""
    scores, cosines = dict[str, float](), dict[str, float]()
    for key, value in prepared.items():
        if key.startswith("statistics/"):
            w_sq, f_sq, *_ = value.tolist()
            if w_sq > 0 and f_sq > 0:
                name = key.removeprefix("statistics/")
                scores[name] = (f_sq / w_sq) ** 0.5
                cosines[name] = stored_alignment(prepared, name, hp.alignment == "signed")
    names = list(scores)
    if hp.candidates == "pareto":
        fronts = [[n for n in scores if tower(n) == t] for t in ("vision", "language", "unet")]
        names = [n for f in fronts for n in pareto_layers({n: scores[n] for n in f}, {n: cosines[n] for n in f})]
    return sorted(names, key=lambda n: (-scores[n], n))


def choose(prepared: dict[str, torch.Tensor], hp: SLUGSettings) -> str:
    """The name of the tensor that `layer` selects."""
    if hp.layer not in RULES:
        return hp.layer
    names = candidates(prepared, hp)
    if hp.layer == "importance":
        return names[0]
    if hp.layer == "deepest":
        return max(names, key=depth)
    return min(names, key=lambda name: stored_alignment(prepared, name, hp.alignment == "signed"))
