"""Speed and memory of optimiser steps on a CPU, as ratios to a plain PyTorch rendering of the same update within one run.

    python benchmarks/steps.py                      # RGD and SISS, on the digits' network and on one of 11 M weights

The plain renderings are those of `plain.py`; `gpu.py` is the same comparison on a GPU. Both take turns on the same batches,
so a busy machine slows both; the ratio is of medians. Gradient memory is the peak of what a step allocates beyond the weights, their
optimiser state and the activations, measured on a network whose activations are small. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from ground import machine
from plain import LAM, MIX, PLAIN, RHO, Step

from methods.base import Method
from methods.rows import Rows
from raysweep.models.noise import row_seeds
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import resolve
from raysweep.tasks.digits_models import SCHEDULER, UNET

WIDE = UNET | {"block_out_channels": (128, 256), "norm_num_groups": 32, "attention_head_dim": 64}


def rows(model: PixelDDPM, size: int, stream: int, cond: torch.Tensor | None = None) -> Rows:
    """Random images with seeds."""
    x = torch.rand((size, *model.shape), generator=torch.Generator().manual_seed(stream)) * 2 - 1
    return Rows(x.to(model.device, model.dtype), cond, row_seeds(stream, 0, size), size)


SETTINGS: dict[str, dict[str, Any]] = {"rgd": {"lam": LAM, "trunc_elem_sq": None}, "siss": {"rho": RHO, "lam": MIX}}


def ours(name: str, model: PixelDDPM, batch_size: int) -> Method:
    """The method as raysweep runs it."""
    cls = resolve("method", name)
    return cls(model, cls.Hyperparameters(batch_size=batch_size, lr=1e-5, steps=10**6, **SETTINGS[name]), {})


def times(steps: dict[str, Step], batch: dict[str, Rows], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, the contenders taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            if k >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_bytes(step: Step, batch: dict[str, Rows], params: list[torch.Tensor], room: dict[int, torch.Tensor]) -> int:
    """The most bytes that one step holds beyond weights and optimiser state; buffers that it keeps for the next step are
    freed first, so that they count."""
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
        held = {who: peak_bytes(s, one, params, method.buffers) / vector for who, s in contenders.items()}  # type: ignore
        result |= {"gradient_vectors": held, "memory_ratio": held["raysweep"] / held["plain"]}
    return result


def main() -> None:
    """Runs the comparison that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        f"{name}, {label}, batch {batch}": compare(name, unet, batch, args.repeats)
        for name in SETTINGS
        for label, unet, batch in (("digits", UNET, 16), ("digits", UNET, 64), ("wide", WIDE, 8))
    }
    print(json.dumps(results | {"about": machine()}, indent=2))


if __name__ == "__main__":
    main()
