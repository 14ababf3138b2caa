"""Step time, memory and sampling speed on one GPU, against plain PyTorch and diffusers' own pipeline.

    python benchmarks/gpu.py                                # at most 8 minutes on one H100-class GPU, without Ray
    python benchmarks/gpu.py --only finetune sampling       # some sections; those already in --out are not run again
    python benchmarks/gpu.py --toy --out /tmp/toy           # the same code on a small network and any machine

Steps: a latent text-to-image model of Stable Diffusion v1.4's size with random weights, latents 4 x 64 x 64, bf16 mixed
precision as `train.precision: bf16` runs it, prompts of 77 tokens embedded once; the U-Net trains. For several batch sizes up
to the largest that the dry run's forecast puts into 90 % of the card: milliseconds per step, rows per second, peak memory,
the forecast, and the share of the card's measured bf16 matrix-product rate. The plain renderings are those of `plain.py`.
Sampling: 50 steps of DDIM with guidance 7.5, decoding included, against diffusers' pipeline in bf16 at its best batch.

Each section leaves OUT/SECTION.json as soon as it is done. Prints a table and one JSON object (OUT/gpu.json).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import COMPILED, GIB, LONG, SETTINGS, WORDS, Bench
from plain import PLAIN, Step, Unet
from torch.utils.flop_counter import FlopCounterMode

from raysweep.models.noise import row_seeds
from raysweep.planning import footprint
from raysweep.registry import resolve
from raysweep.rundir import git_commit, versions


def stats(values: list[float]) -> dict[str, Any]:
    """Milliseconds."""
    return {
        "ms": 1e3 * statistics.median(values),
        "min_ms": 1e3 * min(values),
        "max_ms": 1e3 * max(values),
        "n": len(values),
    }


def contender(
    bench: Bench, who: str, name: str, rows: int, compiled: bool = False, count: bool = False
) -> dict[str, Any]:
    """Time, memory and arithmetic of one method's step, by raysweep ("ours") or in plain PyTorch ("plain")."""
    bench.clear()
    entry: dict[str, Any] = {}
    try:
        model = bench.model()
        batch = bench.batch(model, rows)
        if compiled:
            model.net["unet"].compile()
        if who == "ours":
            method = bench.ours(name, model, rows)

            def step() -> None:  # as in `raysweep.train.loop`
                with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False):
                    method.step(batch)
        else:
            assert model.embeddings is not None
            states = model.embeddings.hidden[:1].to(bench.device)
            rendered: Step = PLAIN[name](Unet(model.net["unet"], model.scheduler, states, True))

            def step() -> None:
                rendered(batch)

        started = time.perf_counter()
        step()
        bench.wait()
        entry["first_s"] = time.perf_counter() - started
        once = bench.seconds(step, 0, 1, 1)[0]
        entry |= stats(bench.seconds(step, 0, max(2, min(bench.repeats, int(LONG / once)))))
        entry["peak_gib"] = bench.peak()
        if count:
            with FlopCounterMode(display=False) as counter:
                step()
            entry["flop"] = counter.get_total_flops()
    except torch.OutOfMemoryError:
        entry = {"error": "out of memory"}
    except Exception as error:  # a contender that fails must not cost the others' numbers
        entry = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return entry


def forecast(bench: Bench, name: str, rows: int) -> float:
    """GiB that a dry run forecasts for a step."""
    network = footprint.of({"stable_diffusion": dict(bench.sizes["unet"])})
    others = {} if bench.toy else network.others
    return (
        footprint.Footprint(network.parameters, 0, network.activations, others, network.mixed, network.casts).step(
            resolve("method", name), rows, ("unet",), "bf16"
        )
        / GIB
    )


def fit(bench: Bench, name: str) -> list[int]:
    """The batch sizes that the forecast puts into 90 % of the card."""
    return [b for b in bench.sizes["batches"] if forecast(bench, name, b) * GIB < 0.9 * bench.total]


def steps(bench: Bench, name: str) -> list[dict[str, Any]]:
    """One method at several batch sizes, eager."""
    entries, fitting = [], fit(bench, name)
    for rows in sorted({*fitting[-1:], *(b for b in fitting if b == 16)}):
        if not bench.may(f"{name} at batch {rows}"):
            continue
        entry: dict[str, Any] = {"section": name, "rows": rows, "forecast_gib": forecast(bench, name, rows)}
        for who in ("plain", "ours"):
            entry[who] = contender(bench, who, name, rows, count=who == "ours")
        entries.append(bench.tell(judged(bench, entry)))
        bench.clear()
    return entries


def judged(bench: Bench, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the ratios that need both contenders."""
    plain, ours = entry["plain"], entry["ours"]
    if "ms" in ours:
        entry["images_per_s"] = entry["rows"] / ours["ms"] * 1e3
        flop = ours.get("flop") or bench.flop.get((entry["section"].split()[0], entry["rows"]))
        if flop and bench.rate:
            bench.flop[entry["section"].split()[0], entry["rows"]] = flop
            entry["share_of_peak"] = flop / (ours["ms"] / 1e3) / bench.rate
        if ours["peak_gib"] and "forecast_gib" in entry:
            entry["peak_over_forecast"] = ours["peak_gib"] / entry["forecast_gib"]
        if "ms" in plain:
            entry["time_ratio"] = ours["ms"] / plain["ms"]
    return entry


def compiled(bench: Bench) -> list[dict[str, Any]]:
    """Some methods with `torch.compile` on the U-Net, at their largest batch, and the sampler."""
    entries = []
    for name in COMPILED[:1] if bench.toy else COMPILED:
        if bench.may(f"{name} compiled"):
            rows = fit(bench, name)[-1]
            entry: dict[str, Any] = {
                "section": f"{name} compiled",
                "rows": rows,
                "forecast_gib": forecast(bench, name, rows),
            }
            for who in ("ours", "plain"):
                entry[who] = contender(bench, who, name, rows, compiled=True)
            entries.append(bench.tell(judged(bench, entry)))
            bench.clear()
        if name == "finetune":
            entries += drawn(bench, [("ours bf16, compiled", bench.sizes["sampled"][-1])])
    return entries


def sampling(bench: Bench) -> list[dict[str, Any]]:
    """Images per second under guidance, decoded: diffusers' pipeline in bf16, and raysweep's sampler."""
    small = min(8, bench.sizes["sampled"][-1])
    plans = [("diffusers bf16", b) for b in bench.sizes["sampled"]]
    plans += [("ours bf16", b) for b in bench.sizes["sampled"]] + [("ours tf32", small), ("ours fp32", small)]
    return drawn(bench, plans)


@torch.no_grad()
def drawn(bench: Bench, plans: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Each contender at its batch size."""
    entries = []
    for who, rows in plans:
        if not bench.may(f"sampling, {who}, batch {rows}"):
            continue
        bench.clear()
        entry: dict[str, Any] = {"section": f"sampling, {who}", "rows": rows, "ours": {}, "plain": {}}
        try:
            torch.backends.cuda.matmul.allow_tf32 = "tf32" in who  # for convolutions it is PyTorch's default
            draw = drawing(bench, who, rows)
            draw(2)  # warms up
            times = bench.seconds(lambda draw=draw: draw(bench.sizes["steps"]), 0, 1 if "fp32" in who else 2, 1)
            entry["ours"] = stats(times) | {"peak_gib": bench.peak()}
            entry["images_per_s"] = rows / entry["ours"]["ms"] * 1e3
        except Exception as error:  # as above
            entry["ours"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        entries.append(bench.tell(entry))
    return entries


def drawing(bench: Bench, who: str, rows: int) -> Callable[[int], Any]:
    """The function that draws `rows` images in a number of steps."""
    model = bench.model()
    cond, seeds = bench.prompts(model)[:1].expand(rows, -1), row_seeds(7, 0, rows)
    if "bf16" in who:
        model.embeddings = None  # they are in single precision
        model.net.to(torch.bfloat16)
        model.frozen.vae.to(torch.bfloat16)
    if "compiled" in who:
        model.net["unet"].compile()
    if who.startswith("diffusers"):
        pipe: Any = model.pipeline()
        pipe.set_progress_bar_config(disable=True)
        prompts = [f"a photo of a {WORDS[3]}"] * rows
        return lambda count: pipe(prompts, num_inference_steps=count, guidance_scale=7.5, output_type="pt")
    return lambda count: model.sample(cond, seeds, count, 7.5, batch=rows)


def transformer(bench: Bench) -> list[dict[str, Any]]:
    """A plain rectified-flow step of a transformer of SD3-medium's size; raysweep has no family of such models."""
    from diffusers import SD3Transformer2DModel

    entries, config = [], bench.sizes["transformer"]
    for rows in bench.sizes["transformer_batches"]:
        if not bench.may(f"transformer at batch {rows}"):
            continue
        bench.clear()
        entry: dict[str, Any] = {"section": "transformer, plain finetune", "rows": rows, "ours": {}, "plain": {}}
        try:
            with bench.device:
                net = SD3Transformer2DModel(**config).train()
                shape = (rows, config["in_channels"], bench.sizes["latent"], bench.sizes["latent"])
                x, noise = torch.randn(shape), torch.randn(shape)
                states = torch.randn(rows, bench.sizes["tokens"], config["joint_attention_dim"])
                pooled, u = torch.randn(rows, config["pooled_projection_dim"]), torch.rand(rows, 1, 1, 1)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)

            def step(net=net, x=x, noise=noise, states=states, pooled=pooled, u=u, optimizer=optimizer) -> None:
                optimizer.zero_grad()
                with torch.autocast(bench.device.type, torch.bfloat16):
                    v = net((1 - u) * x + u * noise, states, pooled, 1000 * u.flatten()).sample
                (v.float() - (noise - x)).square().mean().backward()
                optimizer.step()

            step()
            entry["plain"] = stats(bench.seconds(step, 0)) | {"peak_gib": bench.peak()}
            entry["images_per_s"] = rows / entry["plain"]["ms"] * 1e3
            with FlopCounterMode(display=False) as counter:
                step()
            if bench.rate:
                entry["share_of_peak"] = counter.get_total_flops() / (entry["plain"]["ms"] / 1e3) / bench.rate
            del step, optimizer, net, counter
        except Exception as error:  # as above
            entry["plain"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        entries.append(bench.tell(entry))
    bench.clear()
    return entries


def card(bench: Bench) -> dict[str, Any]:
    """The device, its capabilities, and the versions."""
    size = 64 if bench.toy else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    values = bench.seconds(lambda: a @ b, 5, 20)
    bench.rate = 2 * size**3 / statistics.median(values)
    gpu = torch.cuda.get_device_name() if bench.device.type == "cuda" else "none"
    libraries = {k: v for k, v in versions().items() if k in ("python", "torch", "diffusers")} | {
        "commit": git_commit()
    }
    return {
        "gpu": gpu,
        "memory_gib": round(bench.total / GIB, 1) if gpu != "none" else None,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "bf16_tflops": bench.rate / 1e12,
        "toy": bench.toy,
    } | libraries


SECTIONS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    **{name: (lambda bench, name=name: steps(bench, name)) for name in SETTINGS},
    "sampling": sampling,
    "transformer": transformer,
    "compiled": compiled,
}


def table(entries: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""

    def ms(part: dict[str, Any]) -> str:
        return (
            f"{part['ms']:.0f} ({part['min_ms']:.0f} to {part['max_ms']:.0f})"
            if "ms" in part
            else part.get("error", "")
        )

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| section | batch | plain ms (min to max) | raysweep ms (min to max) | time ratio | images/s | peak GiB, plain | peak GiB, raysweep "
        "| dry run GiB | peak / dry run | share of bf16 peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        ours, plain = e["ours"], e["plain"]
        cells = (
            e["section"],
            str(e["rows"]),
            ms(plain),
            ms(ours),
            number(e.get("time_ratio"), ".2f"),
            number(e.get("images_per_s"), ".2f"),
            number(plain.get("peak_gib"), ".1f"),
            number(ours.get("peak_gib"), ".1f"),
            number(e.get("forecast_gib"), ".1f"),
            number(e.get("peak_over_forecast"), ".2f"),
            number(e.get("share_of_peak"), ".1%"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections that are not done yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a small network on any machine")
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="sections to run")
    parser.add_argument("--seconds", type=float, default=450, help="no measurement begins later than this")
    parser.add_argument("--repeats", type=int, default=4, help="timings, of two steps in a row each")
    args = parser.parse_args(arguments)
    if not args.toy and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU and there is none; --toy runs it on this machine.", file=sys.stderr)
        return 2
    bench = Bench(args.toy, args.seconds, args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    about, entries = card(bench), []
    same = {k: about[k] for k in ("gpu", "torch", "diffusers", "commit", "toy")}
    print(json.dumps(about), flush=True)
    for name in args.only:
        path = args.out / f"{name}.json"
        done = json.loads(path.read_text()) if path.is_file() else {}
        if done.get("of") != same or not done["whole"]:
            left, started = len(bench.left_out), time.monotonic()
            measured = SECTIONS[name](bench)
            done = {
                "of": same,
                "whole": len(bench.left_out) == left,
                "entries": measured,
                "s": time.monotonic() - started,
            }
            path.write_text(json.dumps(done, indent=1))
            print(f"{name}: {done['s']:.0f} s", flush=True)
        entries += done["entries"]
    result = {"about": about, "entries": entries, "left_out": bench.left_out}
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    print("\n".join(table(entries)))
    if bench.left_out:
        print(f"left out for lack of time: {', '.join(bench.left_out)}; run the same command again to continue")
    return 0


if __name__ == "__main__":
    sys.exit(main())
