"""SFD: score forgetting distillation, into a generator of one step.

Source: Chen, Zhang, Zhou, "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
Models", ICLR 2025, arXiv:2409.11219, on score identity distillation (SiD), arXiv:2404.04057, and the released code.
phi is the frozen teacher, psi the fake score (learned), theta the generator; all start as the base model. f is the
prediction of x_0, c_f the class to forget, c_o its override, c_r a kept class.
    x_g = G(z, c) = f_theta(sigma_t z, t, c) at the t where sigma_t/gamma_t is closest to `sigma_init`
    psi    minimise  E |eps_psi(x_t, c) - eps|^2,  x_t = gamma_t x_g + sigma_t eps,  x_g constant
    theta  minimise  E w_t (p - s)^T ((p - x_g) - alpha (p - s)),  p = f_phi(x_t, c2), s = f_psi(x_t, c1)
           w_t = 1/max(mean |p - x_g|, 1e-5) per sample and constant                          (paper, eq. 12 to 14)
with c1 = c2 = c_r for what is kept and c1 = c_f, c2 = c_o for what is forgotten: only the teacher sees the override.
Losses are sums over the elements of an image and means over rows; the two terms weigh `remain` and `forget` for theta and
`fake_remain` and `fake_forget` for psi. phi and psi are constants of the theta step, but it differentiates through them.
Gradients are clipped by value, those of `clips`: of both networks (DDPM release), or of the generator alone (Stable Diffusion
release, in half precision). No image is read: x_g comes from noise, c_r from the class list, or from the prompts of the
search, where the Stable Diffusion release takes those of LAION-Aesthetics.

With `cond_scale` w > 0 teacher and fake score are guided, eps_w = (1 + w) eps_c - w eps_null, in every place; the
generator never is. The Stable Diffusion release writes kappa = 1 + w, and where it guides it drops a tenth of the
conditions of the fake score's step, `fake_drop`: then x_g too comes from the empty prompt. It draws new conditions for
each of the four terms; here both steps share those of a batch, as in the DDPM release. The candidate is the moving
average of theta alone: psi and phi still know c_f. It samples in one step. Its loss is negative for alpha > 1 at the
optimum, so it says nothing about progress; `gap`, the mean of |p - s|^2, does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import (
    SEEDS,
    Batch,
    Draw,
    Goal,
    Hyperparameters,
    Method,
    Model,
    Rows,
    Scalars,
    picked,
    timesteps,
    without_labels,
)


class SFDSettings(Hyperparameters):
    """Settings of SFD; defaults are CIFAR-10 on DDPM."""

    steps: int = Field(50_000, ge=0, description="alternating steps, fake score first (paper: 50k)")
    batch_size: int = Field(128, ge=1, description="rows of the kept classes (paper: 128)")
    forget_batch_size: int | None = Field(None, ge=1, description="rows of the forgotten class; null: as many")
    lr: float = Field(1e-5, gt=0, description="learning rate of the generator (paper: 1e-5)")
    lr_fake: float = Field(1e-5, gt=0, description="learning rate of the fake score (released: 1e-5 or 3e-5)")
    alpha: float = Field(1.2, gt=0, description="weight of the correction (paper: 1.2; Stable Diffusion 1)")
    remain: float = Field(1.0, gt=0, description="weight of the kept classes for the generator (paper: 1)")
    forget: float = Field(0.01, ge=0, description="weight of the forgotten class for the generator (paper: 0.01; SD 1)")
    fake_remain: float = Field(1.0, gt=0, description="weight of the kept classes for the fake score (paper: 1)")
    fake_forget: float = Field(0.01, ge=0, description="weight of the forgotten class for the fake score (paper: 0.01)")
    override: Literal["fixed", "random"] = Field("fixed", description="c_o: the task's override, or any kept class")
    sigma_init: float = Field(2.5, gt=0, description="noise level of the generator's input, sigma/gamma (paper: 2.5)")
    t_min: int = Field(38, ge=0, description="first timestep of the losses (released: 38; SD 20)")
    t_max: int = Field(712, ge=1, description="one past the last timestep of the losses (released: 712; SD 980)")
    cond_scale: float = Field(0.0, ge=0, description="w of guidance in training; 0: none, one forward pass")
    fake_steps: int = Field(1, ge=1, description="fake-score steps per generator step (released: 1)")
    beta1: float = Field(0.0, ge=0, lt=1, description="Adam's first-moment decay (paper: 0)")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second-moment decay (paper: 0.999)")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon (released: 1e-8; in half precision 1e-6)")
    clip_value: float | None = Field(1.0, gt=0, description="gradients are clipped to +- this (released: 1)")
    clips: Literal["both", "generator"] = Field(
        "both", description="networks whose gradients are clipped (released: both; SD generator)"
    )
    fake_drop: float = Field(
        0.0, ge=0, lt=1, description="share of conditions dropped in the fake score's step (released: 0; SD 0.1)"
    )
    ema: float = Field(
        0.9999, ge=0, lt=1, description="decay of the generator's moving average; 0: off (paper: 0.9999)"
    )
    diff_instruct: bool = Field(False, description="released switch: no gradient through p and s")


class SFD(Method):
    """Distils a one-step generator whose forgotten class follows the override; arXiv:2409.11219."""

    name = "sfd"
    source = "Chen, Zhang, Zhou, ICLR 2025, arXiv:2409.11219"
    needs = frozenset()
    kinds = frozenset({"class", "concept"})
    forwards_per_step = 22  # per branch: 4 for the fake score (1 + 3), 7 for the generator (3 + 2 + 2)
    copies = 12
    tape = 3
    Hyperparameters = SFDSettings
    hp: SFDSettings

    def __init__(
        self,
        model: Model,
        hyperparameters: SFDSettings,
        prepared: dict[str, torch.Tensor] | None = None,
        goal: Goal | None = None,
    ):
        super().__init__(model, hyperparameters, prepared, goal)
        self.teacher = model.with_net(copy.deepcopy(model.net).requires_grad_(False).eval())
        self.fake = model.with_net(copy.deepcopy(model.net))
        self.fake_params = [p for n, p in self.fake.net.named_parameters() if n in set(self.names)]
        self.t_init = nearest_timestep(model.alphas, hyperparameters.sigma_init)
        betas = (hyperparameters.beta1, hyperparameters.beta2)
        self.optimizers = [
            torch.optim.Adam(params, lr=lr, betas=betas, eps=hyperparameters.adam_eps, fused=True)
            for params, lr in ((self.fake_params, hyperparameters.lr_fake), (self.params, hyperparameters.lr))
        ]
        self.room = [gradients.empty(params) for params in (self.fake_params, self.params)]
        self.ema = [p.detach().clone() for p in self.params]
        device = self.params[0].device
        self.kept = self.goal.asking(self.goal.kept, device)
        if self.goal.forget_class is not None:
            self.gone = self.goal.asking([self.goal.forget_class], device)
        if self.goal.override_class is not None:
            self.instead = self.goal.asking([self.goal.override_class], device)

    @classmethod
    def unsuited(cls, hyperparameters: Any, model: Model, goal: Goal) -> list[str]:
        reasons, hp, length = [], hyperparameters, len(model.alphas)
        if goal.override_class is None and hp.override == "fixed":
            reasons.append("override: the task names no class or concept that is to stand in for the forgotten one")
        elif goal.override_class == goal.forget_class:
            reasons.append(f"override: must differ from the forgotten class {goal.forget_class}")
        if not hp.t_min < hp.t_max <= length:
            reasons.append(f"t_min < t_max <= {length} must hold, not {hp.t_min}, {hp.t_max}")
        if model.unconditional(1) is None:
            needing = [name for name in ("cond_scale", "fake_drop") if getattr(hp, name) > 0]
            reasons += [f"{name}: needs a model with an unconditional branch" for name in needing]
        return reasons

    def draws(self) -> dict[str, Draw]:
        hp = self.hp
        return {"remain": Draw(hp.batch_size, split=SEEDS),
                "forget": Draw(hp.forget_batch_size or hp.batch_size, split=SEEDS)}  # fmt: skip

    def step(self, batch: Batch) -> Scalars:
        hp, branches = self.hp, self.branches(batch)
        for k in range(hp.fake_steps):
            self.model.net.eval()
            self.fake.net.train()
            self.update(
                0, (w * self.fake_loss(rows.reseeded(2 * k + 1), c1) for _, rows, c1, _, _, w in branches if w), dict
            )
        self.fake.net.eval()
        self.model.net.train()
        parts: list[torch.Tensor] = []
        gaps: Scalars = {}

        def each() -> Iterator[torch.Tensor]:  # one graph at a time
            for name, rows, c1, c2, w, _ in branches:
                if w:
                    loss, gaps[name] = self.loss(rows.reseeded(2 * hp.fake_steps + 2), c1, c2)
                    parts.append((w * loss).detach())
                    yield w * loss

        scalars = self.update(1, each(), lambda: gradients.scalars(loss=torch.stack(parts).sum(), **gaps))
        gradients.average(self.ema, self.params, hp.ema)
        self.done += 1
        return scalars

    def branches(self, batch: Batch) -> list[tuple[str, Rows, torch.Tensor, torch.Tensor, float, float]]:
        """(diagnostic, rows, c1, c2, weight for theta, weight for psi) of what is kept and of what is forgotten."""
        hp, c_r = self.hp, picked(self.model, batch["remain"], self.kept)
        found = [("gap", batch["remain"], c_r, c_r, hp.remain, hp.fake_remain)]
        if hp.forget or hp.fake_forget:
            rows = batch["forget"]
            # a prompt of the forgotten concept, and the one of the same template that stands in for it
            place = picked(self.model, rows, torch.arange(len(self.gone), device=c_r.device), 2)
            c_f = self.gone[place]
            fixed = hp.override == "fixed"
            c_o = self.instead[place % len(self.instead)] if fixed else picked(self.model, rows, self.kept)
            found.append(("forget_gap", rows, c_f, c_o, hp.forget, hp.fake_forget))
        return found

    def update(self, which: int, losses: Iterable[torch.Tensor], about: Callable[[], Scalars]) -> Scalars:
        """One Adam step of the fake score (0) or the generator (1) along the sum of this rank's parts of a loss. Returns what
        `about` says once they are differentiated."""
        params = (self.fake_params, self.params)[which]
        flat = gradients.flat(losses, params, out=self.room[which])
        scalars = about()
        self.watch(flat.norm(), scalars)
        if self.hp.clip_value is not None and (which == 1 or self.hp.clips == "both"):
            flat.clamp_(-self.hp.clip_value, self.hp.clip_value)
        gradients.assign(params, flat)
        self.optimizers[which].step()
        return scalars

    def generate(self, rows: Rows, cond: torch.Tensor) -> torch.Tensor:
        """x_g = G(z, c), (n, C, H, W), z from the rows' seeds."""
        t = torch.full((len(cond),), self.t_init, device=cond.device)
        _, sigma = self.model.gamma_sigma(t)
        return self.model.x0(sigma * self.model.noise(rows.seeds), t, cond)

    def noised(self, rows: Rows, x_g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, t, eps) for generated images, t in [t_min, t_max)."""
        t = timesteps(self.model, rows, self.hp.t_min, self.hp.t_max)
        eps = self.model.noise(rows.seeds ^ 0x2545F4914F6CDD1D)
        return self.model.add_noise(x_g, eps, t), t, eps

    def fake_loss(self, rows: Rows, c1: torch.Tensor) -> torch.Tensor:
        """This rank's part of the fake score's denoising loss on generated images; some conditions are dropped."""
        asked = without_labels(self.model, replace(rows, cond=c1), self.hp.fake_drop, 3).cond
        assert asked is not None
        with torch.no_grad():
            x_g = self.generate(rows, asked)
        x_t, t, eps = self.noised(rows, x_g)
        return (self.guided(self.fake, x_t, t, asked) - eps).square().sum() / rows.total

    def loss(self, rows: Rows, c1: torch.Tensor, c2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's parts of the generator's loss and of mean |p - s|^2."""
        x_g = self.generate(rows, c1)
        x_t, t, _ = self.noised(rows, x_g)
        with torch.set_grad_enabled(not self.hp.diff_instruct):
            p, s = (self.mean(net, x_t, t, c) for net, c in ((self.teacher, c2), (self.fake, c1)))
        loss = sample_losses(p, s, x_g, self.hp.alpha).sum() / rows.total
        return loss, (p - s).detach().square().flatten(1).mean(1).sum() / rows.total

    def guided(self, net: Model, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """eps_w = (1 + w) eps_c - w eps_null; one pass for w = 0."""
        eps, w = net.eps(x_t, t, cond), self.hp.cond_scale
        return eps if w == 0 else (1 + w) * eps - w * net.eps(x_t, t, net.unconditional(len(cond)))

    def mean(self, net: Model, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """f, the prediction of x_0."""
        if self.hp.cond_scale == 0:
            return net.x0(x_t, t, cond)
        gamma, sigma = net.gamma_sigma(t)
        return (x_t - sigma * self.guided(net, x_t, t, cond)) / gamma

    def finish(self) -> dict[str, float]:
        if self.hp.ema > 0:
            with torch.no_grad():
                for p, average in zip(self.params, self.ema, strict=True):
                    p.copy_(average)
        self.model.sampler = {"kind": "one_step", "t": self.t_init}
        return super().finish()

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "fake": self.fake.net.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        return super().state_dict() | mine

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fake.net.load_state_dict(state["fake"])
        self.ema = [e.clone() for e in state["ema"]]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def generator_loss(p: torch.Tensor, s: torch.Tensor, x_g: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean over rows of w (p - s)^T ((p - x_g) - alpha (p - s)), a scalar, for (n, ...) tensors of any float dtype.

    p: the teacher's prediction of x_0; s: the fake score's; x_g: the generated image. w = 1/max(mean |p - x_g|, 1e-5) per
    row, a constant of the gradient. alpha = 1 leaves (p - s)^T (s - x_g). Source: arXiv:2409.11219, eq. 13.
    """
    return sample_losses(p, s, x_g, alpha).mean()


def sample_losses(p: torch.Tensor, s: torch.Tensor, x_g: torch.Tensor, alpha: float) -> torch.Tensor:
    """The terms of `generator_loss`, (n,)."""
    w = 1 / (p - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return w * ((p - s) * ((p - x_g) - alpha * (p - s))).flatten(1).sum(1)


def nearest_timestep(alphas: torch.Tensor, sigma: float) -> int:
    """The t whose noise level sqrt((1 - alphas)/alphas) is closest to `sigma`."""
    levels = ((1 - alphas) / alphas.clamp(min=1e-12)).sqrt()
    return int((levels - sigma).abs().argmin())
