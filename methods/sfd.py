"""SFD: score forgetting distillation, into a generator of one step.

Source: Chen, Zhang, Zhou, "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
Models", ICLR 2025, arXiv:2409.11219, on score identity distillation (SiD), arXiv:2404.04057, and the released code.
phi is the frozen teacher, psi the fake score (learned), theta the generator; all are initialised to the base model. f is the
prediction of x_0, c_f the class to forget, c_o its override, c_r a kept class.
    x_g = G(z, c) = f_theta(sigma_t z, t, c) at the t where sigma_t/gamma_t is closest to `sigma_init`
    psi    minimise  E |eps_psi(x_t, c) - eps|^2,  x_t = gamma_t x_g + sigma_t eps,  x_g constant
    theta  minimise  E w_t (p - s)^T ((p - x_g) - alpha (p - s)),  p = f_phi(x_t, c2), s = f_psi(x_t, c1)
           w_t = 1/max(mean |p - x_g|, 1e-5) per sample and constant                          (paper, eq. 12 to 14)
with c1 = c2 = c_r for kept rows and c1 = c_f, c2 = c_o for forgotten rows: only the teacher sees the override.
Losses are sums over the elements of an image and means over rows; the weights of the two terms are `remain` and `forget` for
theta, `fake_remain` and `fake_forget` for psi. phi and psi are constants of the theta step, but it differentiates through
them. Gradients are clipped by value; `clips` selects those of both networks (DDPM release), or of the generator alone (Stable
Diffusion release, in half precision). No image is read: x_g is generated from noise; c_r is drawn from the class list, or
from the prompts of the search, where the Stable Diffusion release takes those of LAION-Aesthetics.

With `cond_scale` w > 0 teacher and fake score are guided everywhere, eps_w = (1 + w) eps_c - w eps_null; the generator never
is. The Stable Diffusion release writes kappa = 1 + w. Where it guides, it drops a tenth of the conditions of the fake score's
step, `fake_drop`; x_g is then generated from the empty prompt as well. It draws new conditions for each of the four terms;
here both steps share those of a batch, as in the DDPM release. The candidate is the moving average of theta alone: psi and
phi still know c_f. It samples in one step. For alpha > 1 the loss is negative at the optimum, so it does not show progress;
`gap`, the mean of |p - s|^2, does.

On a rectified flow (gamma = 1 - sigma, output v) eps = x_t + gamma v, which is -sigma times the score, and f = x_t - sigma v. So psi's
loss is gamma^2 |v_psi - (eps - x_g)|^2, and eps_w and f under guidance are those of v_w = (1 + w) v_c - w v_null.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field

from methods import gradients
from methods.base import Goal, Hyperparameters, Method, Model, Scalars
from methods.losses import pick, timesteps, without_labels
from methods.rows import SEEDS, Batch, Draw, Rows


class SFDSettings(Hyperparameters):
    """Settings of SFD; defaults are CIFAR-10 on DDPM."""

    steps: int = Field(50_000, ge=0, description="alternating steps, fake score first (paper: 50k)")
    batch_size: int = Field(128, ge=1, description="rows of the kept classes (paper: 128)")
    forget_batch_size: int | None = Field(None, ge=1, description="rows of the forgotten class; null: batch_size")
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
    clip_value: float | None = Field(
        1.0, gt=0, description="largest absolute value of a gradient's element (released: 1)"
    )
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


@dataclass(frozen=True)
class Branch:
    """Rows of kept or forgotten classes; c1 is the condition of generator and fake score, c2 that of the teacher."""

    diagnostic: str  # name of the mean of |p - s|^2 of these rows
    rows: Rows
    c1: torch.Tensor
    c2: torch.Tensor
    weight: float  # in the loss of theta
    fake_weight: float  # in the loss of psi


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

    def setup(self) -> None:
        super().setup()
        model, hp, names = self.model, self.hp, set(self.names)
        self.teacher = model.with_net(copy.deepcopy(model.net).requires_grad_(False).eval())
        self.fake = model.with_net(copy.deepcopy(model.net))
        self.fake_params = [p for n, p in self.fake.net.named_parameters() if n in names]
        self.t_init = nearest_timestep(model.alphas, hp.sigma_init)
        self.optimizers = [
            torch.optim.Adam(params, lr=lr, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=True)
            for params, lr in ((self.fake_params, hp.lr_fake), (self.params, hp.lr))
        ]
        self.buffers = [gradients.empty(params) for params in (self.fake_params, self.params)]
        self.ema = [p.detach().clone() for p in self.params]
        device = self.params[0].device
        self.kept = self.goal.conditions(self.goal.kept, device)
        if self.goal.forget_class is not None:
            self.forgotten = self.goal.conditions([self.goal.forget_class], device)
        if self.goal.override_class is not None:
            self.overrides = self.goal.conditions([self.goal.override_class], device)

    @classmethod
    def unsuited(cls, hyperparameters: SFDSettings, model: Model, goal: Goal) -> list[str]:
        reasons: list[str] = []
        hp, length = hyperparameters, len(model.alphas)
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
        sizes = {"remain": self.hp.batch_size, "forget": self.hp.forget_batch_size or self.hp.batch_size}
        return {name: Draw(size, split=SEEDS) for name, size in sizes.items()}

    def step(self, batch: Batch) -> Scalars:
        hp, branches, shared = self.hp, self.branches(batch), batch["remain"].ranks > 1
        faked = [branch for branch in branches if branch.fake_weight]
        for k in range(hp.fake_steps):
            self.model.net.eval()
            self.fake.net.train()
            self.update(0, (b.fake_weight * self.fake_loss(b.rows.reseeded(2 * k + 1), b.c1) for b in faked), shared)
        self.fake.net.eval()
        self.model.net.train()
        parts: list[torch.Tensor] = []
        gaps: Scalars = {}

        def each() -> Iterator[torch.Tensor]:  # one graph at a time
            for branch in branches:
                if branch.weight:
                    rows = branch.rows.reseeded(2 * hp.fake_steps + 2)
                    loss, gaps[branch.diagnostic] = self.loss(rows, branch.c1, branch.c2)
                    parts.append((branch.weight * loss).detach())
                    yield branch.weight * loss

        def diagnostics() -> Scalars:
            scalars = {"loss": torch.stack(parts).sum(), **gaps}
            return gradients.scalars(**scalars) if shared else scalars

        scalars = self.update(1, each(), shared, diagnostics)
        gradients.average(self.ema, self.params, hp.ema)
        self.done += 1
        return scalars

    def branches(self, batch: Batch) -> list[Branch]:
        """The branch of kept rows and, unless both of its weights are 0, that of forgotten rows."""
        hp, c_r = self.hp, pick(self.model, batch["remain"], self.kept)
        branches = [Branch("gap", batch["remain"], c_r, c_r, hp.remain, hp.fake_remain)]
        if hp.forget or hp.fake_forget:
            rows = batch["forget"]
            # a prompt of the forgotten concept, and the prompt of the same template that stands in for it
            index = pick(self.model, rows, torch.arange(len(self.forgotten), device=c_r.device), 2)
            c_f = self.forgotten[index]
            fixed = hp.override == "fixed"
            c_o = self.overrides[index % len(self.overrides)] if fixed else pick(self.model, rows, self.kept)
            branches.append(Branch("forget_gap", rows, c_f, c_o, hp.forget, hp.fake_forget))
        return branches

    def update(
        self, which: int, losses: Iterable[torch.Tensor], shared: bool, diagnostics: Callable[[], Scalars] = dict
    ) -> Scalars:
        """One Adam step of the fake score (0) or the generator (1) along the sum of this rank's parts of a loss.

        shared: whether ranks share the batch, so that gradients are summed over them. Returns the result of `diagnostics`,
        which is called after the losses are differentiated.
        """
        params = (self.fake_params, self.params)[which]
        gradient = gradients.flat if shared else gradients.local
        flat = gradient(losses, params, out=self.buffers[which])
        scalars = diagnostics()
        self.watch(flat.norm(), scalars)
        if self.hp.clip_value is not None and (which == 1 or self.hp.clips == "both"):
            flat.clamp_(-self.hp.clip_value, self.hp.clip_value)
        gradients.assign(params, flat)
        self.optimizers[which].step()
        return scalars

    def generate(self, rows: Rows, cond: torch.Tensor) -> torch.Tensor:
        """x_g = G(z, c), (n, C, H, W), with z drawn from the rows' seeds."""
        t = torch.full((len(cond),), self.t_init, device=cond.device)
        _, sigma = self.model.gamma_sigma(t)
        return self.model.x0(sigma * self.model.noise(rows.seeds), t, cond)

    def noised(self, rows: Rows, x_g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, t, eps) for generated images, t in [t_min, t_max)."""
        t = timesteps(self.model, rows, self.hp.t_min, self.hp.t_max)
        eps = self.model.noise(rows.second_seeds)
        return self.model.add_noise(x_g, eps, t), t, eps

    def fake_loss(self, rows: Rows, c1: torch.Tensor) -> torch.Tensor:
        """This rank's part of the fake score's denoising loss on generated images; some conditions are dropped."""
        cond = without_labels(self.model, replace(rows, cond=c1), self.hp.fake_drop, 3).cond
        assert cond is not None
        with torch.no_grad():
            x_g = self.generate(rows, cond)
        x_t, t, eps = self.noised(rows, x_g)
        return (self.guided(self.fake, x_t, t, cond) - eps).square().sum() / rows.total

    def loss(self, rows: Rows, c1: torch.Tensor, c2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's parts of the generator's loss and of mean |p - s|^2."""
        x_g = self.generate(rows, c1)
        x_t, t, _ = self.noised(rows, x_g)
        with torch.set_grad_enabled(not self.hp.diff_instruct):
            p, s = self.mean(self.teacher, x_t, t, c2), self.mean(self.fake, x_t, t, c1)
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
        self.model.use_sampler("one_step", t=self.t_init)
        return super().finish()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "fake": self.fake.net.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

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
