"""Speed and memory of optimiser steps, as ratios to a plain PyTorch rendering of the same update within one run.

    python benchmarks/steps.py                      # CPU: RGD and SISS, on the digits' network and on one of 11 M weights
    python benchmarks/steps.py --sd                 # GPU: a U-Net of Stable Diffusion v1.4's size, 64 x 64 latents, batch 8
    python benchmarks/steps.py --sd --small         # the same code on a small network and any machine

The plain renderings are what one writes from the papers: `backward` per loss, gradients cloned parameter by parameter,
concatenated, projected into new vectors, and PyTorch's default Adam. Both take turns on the same batches, so a busy machine
slows both; the ratio is of medians. Gradient memory is the peak of what a step allocates beyond the weights, their
optimiser state and the activations, measured on a network whose activations are small. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ground import machine

from methods.base import Goal, Method, Rows
from raysweep import footprint
from raysweep.models.draws import row_seeds
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import resolve
from raysweep.tasks.scans import SCHEDULER, UNET

WIDE = UNET | {"block_out_channels": (128, 256), "norm_num_groups": 32, "attention_head_dim": 64}
LAM, RHO, MIX = 1.0, 0.5, 0.5
Step = Callable[[dict[str, Rows]], None]


def rows(model: PixelDDPM, size: int, stream: int, cond: torch.Tensor | None = None) -> Rows:
    """Random images with seeds."""
    x = torch.rand((size, *model.shape), generator=torch.Generator().manual_seed(stream)) * 2 - 1
    return Rows(x.to(model.device, model.dtype), cond, row_seeds(stream, 0, size), size)


def plain_loss(model: PixelDDPM, x: torch.Tensor) -> torch.Tensor:
    """The diffusion loss with PyTorch's own random numbers."""
    t, eps = torch.randint(0, 1000, (len(x),), device=x.device), torch.randn_like(x)
    return (model.predict(model.add_noise(x, eps, t), t, None) - model.target(x, eps, t)).square().mean()


def plain_rgd(model: PixelDDPM) -> Step:
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


def plain_siss(model: PixelDDPM) -> Step:
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


PLAIN = {"rgd": plain_rgd, "siss": plain_siss}
SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": {}, "rgd": {"lam": LAM, "trunc_elem_sq": None}, "siss": {"rho": RHO, "lam": MIX}, "esd": {"sampler_steps": 10},
    "sfd": {"lr_fake": 1e-5},
}  # fmt: skip


def ours(name: str, model: PixelDDPM, batch_size: int, goal: Goal | None = None) -> Method:
    """The method as raysweep runs it."""
    cls = resolve("method", name)
    fields = cls.Hyperparameters.model_fields
    common = {k: v for k, v in {"batch_size": batch_size, "lr": 1e-5, "steps": 10**6}.items() if k in fields}
    return cls(model, cls.Hyperparameters(**common | SETTINGS[name]), {}, goal)


def times(steps: dict[str, Step], batch: dict[str, Rows], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, the contenders taking turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(repeats + 2):
        for name, step in steps.items():
            _wait()
            started = time.perf_counter()
            step(batch)
            _wait()
            if k >= 2:
                found[name].append(time.perf_counter() - started)
    return found


def peak_bytes(step: Step, batch: dict[str, Rows], params: list[torch.Tensor], room: dict[int, torch.Tensor]) -> int:
    """The most that one step holds beyond weights and optimiser state, in bytes; whatever it keeps for the next one is
    let go beforehand, so that it counts."""
    step(batch)
    room.clear()
    for p in params:
        p.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(batch)
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(name: str, unet: dict[str, Any], batch_size: int, repeats: int) -> dict[str, Any]:
    """One method against its plain rendering on one network."""
    config = {"unet": unet, "scheduler": SCHEDULER, "null_label": None}
    model, method = PixelDDPM.build(config, 0), ours(name, PixelDDPM.build(config, 0), batch_size)
    contenders: dict[str, Step] = {"plain": PLAIN[name](model), "raysweep": method.step}  # type: ignore[dict-item]
    batch = {"forget": rows(model, batch_size, 1), "retain": rows(model, batch_size, 2)}
    seconds = times(contenders, batch, repeats)
    result: dict[str, Any] = {
        "weights": sum(p.numel() for p in model.net.parameters()),
        "batch": batch_size,
        "n": repeats,
    }
    for who, values in seconds.items():
        result[f"{who}_ms"] = {
            "median": 1e3 * statistics.median(values),
            "min": 1e3 * min(values),
            "max": 1e3 * max(values),
        }
    result["time_ratio"] = statistics.median(seconds["raysweep"]) / statistics.median(seconds["plain"])
    if result["weights"] > 10**6:
        one = {"forget": rows(model, 1, 1), "retain": rows(model, 1, 2)}
        vector = 4 * result["weights"]
        params = [*model.net.parameters(), *method.model.net.parameters()]
        held = {who: peak_bytes(s, one, params, method._room) / vector for who, s in contenders.items()}  # type: ignore
        result |= {"gradient_vectors": held, "memory_ratio": held["raysweep"] / held["plain"]}
    return result


class Latent(PixelDDPM):
    """A U-Net with cross-attention on random text states (n, 77, width), for timing."""

    @property
    def shape(self) -> tuple[int, int, int]:
        size = self.net.config.sample_size
        return self.net.config.in_channels, size, size

    def unconditional(self, count: int) -> torch.Tensor:
        return torch.zeros(count, 77, self.net.config.cross_attention_dim, device=self.device)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        states = self.unconditional(len(x_t))
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.net(x_t, t, states).sample.float()


def latent_step(name: str, small: bool, compiled: bool, batch_size: int, repeats: int) -> dict[str, Any]:
    """Step time, images/s, memory (what `--dry-run` would tell, and on a GPU the measured peak) and share of the card's measured
    bf16 peak for one method."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    size = {"sample_size": 8, "block_out_channels": (32, 64), "cross_attention_dim": 64, "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            } if small else {"sample_size": 64, "cross_attention_dim": 768}  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = UNet2DConditionModel(in_channels=4, out_channels=4, attention_head_dim=8, **size).to(device)
    if compiled:
        net.compile()
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False)
    model = Latent(net, scheduler, None)
    model.alphas = model.alphas.to(device)
    method = ours(name, model, batch_size, Goal("class", 0, 1, tuple(range(10))))
    batch = {n: rows(model, batch_size, k) for k, n in enumerate(("forget", "retain", "remain"))}
    one = rows(model, 1, 0)
    network = footprint.measured(net, lambda: net(one.x, 0, model.unconditional(1)).sample)
    told = footprint.SINGLE * network.parameters * method.copies + 0.5 * network.activations * batch_size * method.tape
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = times({name: method.step}, batch, repeats)[name]  # type: ignore[dict-item]
    median = statistics.median(seconds)
    result = {"step_ms": 1e3 * median, "min_ms": 1e3 * min(seconds), "max_ms": 1e3 * max(seconds), "n": repeats,
              "images_per_s": batch_size / median, "compiled": compiled,
              "told_gib": told / 2**30}  # fmt: skip
    if device.type == "cuda":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            method.step(batch)
        result |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                   "share_of_bf16_peak": counter.get_total_flops() / median / _matmul_peak()}  # fmt: skip
    return result


def _matmul_peak() -> float:
    """FLOP/s of a large bf16 product on this card."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    _wait()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    _wait()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Runs the comparison that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", action="store_true", help="latent U-Net with cross-attention instead of ratios")
    parser.add_argument("--small", action="store_true", help="with --sd: a small network")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sd:
        found: dict[str, Any] = {
            f"{name}{' compiled' if compiled else ''}": latent_step(name, args.small, compiled, 8, args.repeats)
            for name in SETTINGS
            for compiled in (False, True)
            if not (compiled and args.small)
        }
    else:
        found = {f"{name}, {label}, batch {batch}": compare(name, unet, batch, args.repeats)
                 for name in PLAIN for label, unet, batch in (("digits", UNET, 16), ("digits", UNET, 64), ("wide", WIDE, 8))}  # fmt: skip
    print(json.dumps(found | {"about": machine()}, indent=2))


if __name__ == "__main__":
    main()
