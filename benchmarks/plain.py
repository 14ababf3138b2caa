"""Plain PyTorch versions of methods' updates, written from the papers, as a reference for speed and memory.

`backward` per loss, gradients cloned parameter by parameter, concatenated, projected into new vectors, masks and clipping
parameter by parameter, and PyTorch's default Adam. A step takes the batch that raysweep's method takes. The model is any handle
of `raysweep.models`, or `Unet`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from methods.rows import Rows

LAM, RHO, MIX = 1.0, 0.5, 0.5
ALPHA, ETA, GUIDANCE, SAMPLER_STEPS = 3.07, 1.0, 3.0, 10
REMAIN, FORGET, SID, T_MIN, T_MAX, EMA = 1.0, 0.01, 1.2, 38, 712, 0.9999
Step = Callable[[dict[str, Rows]], None]


class Unet:
    """A U-Net with cross-attention on given text states, with diffusers' scheduler.

    states: (1, length, width), what every prompt says. `half` runs passes in bf16 mixed precision, as PyTorch's documentation
    shows it.
    """

    def __init__(self, net: Any, scheduler: Any, states: torch.Tensor, half: bool):
        self.net, self.scheduler, self.states, self.half = net, scheduler, states, half
        self.device = states.device
        self.alphas = scheduler.alphas_cumprod.to(self.device)

    def gamma_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gamma, sigma) at t, each (n, 1, 1, 1)."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t."""
        gamma, sigma = self.gamma_sigma(t)
        return gamma * x + sigma * eps

    def target(self, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The target of the network's prediction."""
        return eps

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Any = None, net: Any = None) -> torch.Tensor:
        """The predicted noise, by `net` if it is given."""
        with torch.autocast(self.device.type, torch.bfloat16, self.half):
            states = self.states.expand(len(x_t), -1, -1)
            return (self.net if net is None else net)(x_t, t, states).sample.float()


def plain_finetune(model: Any) -> Step:
    """Naive deletion of arXiv:2503.01034: the clip binds the gradient of a sum over the elements of an image."""
    params = list(model.net.parameters())
    optimizer = torch.optim.AdamW(params, lr=5e-6, betas=(0.95, 0.999), weight_decay=1e-6)

    def step(batch: dict[str, Rows]) -> None:
        model.net.train()
        optimizer.zero_grad()
        x = batch["retain"].x
        (x[0].numel() * plain_loss(model, x)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def plain_loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The diffusion loss with PyTorch's own random numbers."""
    t, eps = torch.randint(0, 1000, (len(x),), device=x.device), torch.randn_like(x)
    return (model.predict(model.add_noise(x, eps, t), t, None) - model.target(x, eps, t)).square().mean()


def plain_rgd(model: Any) -> Step:
    """arXiv:2412.07808, Theorem 4."""
    params = list(model.net.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-5)

    def step(batch: dict[str, Rows]) -> None:
        model.net.train()
        grads = []
        for name, sign in (("forget", -1), ("retain", 1)):
            optimizer.zero_grad()
            (sign * plain_loss(model, batch[name].x)).backward()
            grads.append(torch.cat([p.grad.clone().flatten() for p in params]))
        g_f, g_r = grads
        dot = torch.dot(g_f, g_r)
        if dot < 0:
            g_f, g_r = g_f - dot / g_r.norm() ** 2 * g_r, g_r - dot / g_f.norm() ** 2 * g_f
        direction, start = g_f + LAM * g_r, 0
        for p in params:
            p.grad = direction[start : start + p.numel()].view_as(p).clone()
            start += p.numel()
        optimizer.step()

    return step


def plain_siss(model: Any) -> Step:
    """arXiv:2503.01034, in the order of its section on one optimiser step: snapshot, subtract, scale, clip, AdamW."""
    params = list(model.net.parameters())
    optimizer = torch.optim.AdamW(params, lr=5e-6, betas=(0.95, 0.999), weight_decay=1e-6)

    def step(batch: dict[str, Rows]) -> None:
        model.net.train()
        optimizer.zero_grad()
        x, a = batch["retain"].x, batch["forget"].x
        t, eps = torch.randint(0, 1000, (len(x),), device=x.device), torch.randn_like(x)
        gamma, sigma = model.gamma_sigma(t)
        pick = (torch.rand(len(x), device=x.device) < MIX).view(-1, 1, 1, 1)
        m = gamma * torch.where(pick, a, x) + sigma * eps
        d = ((m - gamma * x).square() - (m - gamma * a).square()).flatten(1).sum(1) / (2 * sigma.flatten() ** 2)
        w_x, w_a = 1 / ((1 - MIX) + MIX * d.exp()), 1 / ((1 - MIX) * (-d).exp() + MIX)
        output, losses = model.predict(m, t, None), []
        for image, w in ((x, w_x), (a, w_a)):
            target = model.target(image, (m - gamma * image) / sigma, t)
            losses.append((w.view(-1, 1, 1, 1) * (output - target).square()).sum() / len(x))
        losses[0].backward(retain_graph=True)
        snapshot = [p.grad.clone() for p in params]
        losses[1].backward()
        g_a = [p.grad - s for p, s in zip(params, snapshot, strict=True)]
        norm_x = torch.sqrt(sum(s.square().sum() for s in snapshot))
        norm_a = torch.sqrt(sum(g.square().sum() for g in g_a))
        for p, s, g in zip(params, snapshot, g_a, strict=True):
            p.grad = s - RHO * norm_x / norm_a * g
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def plain_salun(model: Unet) -> Step:
    """arXiv:2310.12508: the relabelled class is regressed to another one's output, under a mask of half of the weights."""
    params = list(model.net.parameters())
    masks = [(torch.rand_like(p) < 0.5).float() for p in params]
    optimizer = torch.optim.Adam(params, lr=1e-4)

    def step(batch: dict[str, Rows]) -> None:
        model.net.train()
        optimizer.zero_grad()
        x = batch["forget"].x
        t, eps = torch.randint(0, 1000, (len(x),), device=x.device), torch.randn_like(x)
        x_t = model.add_noise(x, eps, t)
        with torch.no_grad():
            teacher = model.predict(x_t, t)
        loss = (model.predict(x_t, t) - teacher).square().mean() + ALPHA * plain_loss(model, batch["retain"].x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for p, mask in zip(params, masks, strict=True):
            p.grad *= mask
        optimizer.step()

    return step


def plain_esd(model: Unet) -> Step:
    """arXiv:2303.07345: both branches of the guided sampler in one pass of twice the rows, as diffusers' pipelines do."""
    params, base = list(model.net.parameters()), copy.deepcopy(model.net).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(params, lr=1e-5)

    def guided(x: torch.Tensor, t: torch.Tensor, net: Any) -> tuple[torch.Tensor, torch.Tensor]:
        free, output = model.predict(torch.cat([x, x]), torch.cat([t, t]), net=net).chunk(2)
        return free, output

    def step(batch: dict[str, Rows]) -> None:
        n = len(batch["forget"].seeds)
        size, channels = model.net.config.sample_size, model.net.config.in_channels
        with torch.no_grad():
            model.net.eval()
            x = torch.randn(n, channels, size, size, device=model.device)
            stop = torch.randint(0, SAMPLER_STEPS, (n,), device=model.device)
            model.scheduler.set_timesteps(SAMPLER_STEPS)
            times, x_t = [*model.scheduler.timesteps.tolist(), 0], torch.zeros_like(x)
            for i in range(int(stop.max()) + 1):
                x_t = torch.where((stop == i).view(-1, 1, 1, 1), x, x_t)
                free, output = guided(x, torch.full((n,), times[i], device=model.device), model.net)
                x = model.scheduler.step(free + GUIDANCE * (output - free), times[i], x).prev_sample
            edges = torch.tensor(times, device=model.device)
            t = edges[stop + 1] + (torch.rand(n, device=model.device) * (edges[stop] - edges[stop + 1])).long()
            free, output = guided(x_t, t, base)
            target = free - ETA * (output - free)
        model.net.train()
        optimizer.zero_grad()
        (model.predict(x_t, t) - target).square().mean().backward()
        optimizer.step()

    return step


def plain_sfd(model: Unet) -> Step:
    """arXiv:2409.11219, one step of the fake score and one of the generator."""
    params = list(model.net.parameters())
    teacher, fake = copy.deepcopy(model.net).requires_grad_(False).eval(), copy.deepcopy(model.net)
    average = [p.detach().clone() for p in params]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-5, betas=(0.0, 0.999)) for net in (fake, model.net)]
    start = int(((1 - model.alphas) / model.alphas - 2.5**2).abs().argmin())

    def x0(x_t: torch.Tensor, t: torch.Tensor, net: Any) -> torch.Tensor:
        gamma, sigma = model.gamma_sigma(t)
        return (x_t - sigma * model.predict(x_t, t, net=net)) / gamma

    def generated(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        n, size, channels = len(rows.seeds), model.net.config.sample_size, model.net.config.in_channels
        z, eps = torch.randn(2, n, channels, size, size, device=model.device)
        first = torch.full((n,), start, device=model.device)
        x_g = x0(model.gamma_sigma(first)[1] * z, first, model.net)
        t = torch.randint(T_MIN, T_MAX, (n,), device=model.device)
        return x_g, model.add_noise(x_g, eps, t), t, eps

    def update(net: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(net.parameters(), 1.0)
        optimizer.step()

    def step(batch: dict[str, Rows]) -> None:
        parts = ((REMAIN, batch["remain"]), (FORGET, batch["forget"]))
        model.net.eval()
        fake.train()
        loss: Any = 0.0
        for weight, rows in parts:
            with torch.no_grad():
                _, x_t, t, eps = generated(rows)
            loss = loss + weight * (model.predict(x_t, t, net=fake) - eps).square().sum() / len(x_t)
        update(fake, optimizers[0], loss)
        fake.eval()
        model.net.train()
        loss = 0.0
        for weight, rows in parts:
            x_g, x_t, t, _ = generated(rows)
            p, s = x0(x_t, t, teacher), x0(x_t, t, fake)
            w = 1 / (p - x_g).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
            loss = loss + weight * (w * ((p - s) * ((p - x_g) - SID * (p - s))).flatten(1).sum(1)).mean()
        update(model.net, optimizers[1], loss)
        with torch.no_grad():
            for a, p in zip(average, params, strict=True):
                a.lerp_(p, 1 - EMA)

    return step


PLAIN: dict[str, Callable[[Any], Step]] = {
    "finetune": plain_finetune, "rgd": plain_rgd, "siss": plain_siss, "salun": plain_salun, "esd": plain_esd, "sfd": plain_sfd,
}  # fmt: skip
