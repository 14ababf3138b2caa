"""Does the audit itself work? Each check's own ROC-AUC in telling models that contain the forget set from those that do not.

    python benchmarks/meta.py class                 # 20 models trained with the forgotten digit, 20 without
    python benchmarks/meta.py points --models 20 --jobs 2

The pool varies in seed, width and length of training, so that a check must see the forget set and not the recipe. Every
model is audited like a candidate, next to the base and three oracles, which are not in the pool. A check whose AUC is under
0.9 is labelled uninformative on this task. `flagged` are the shares of either kind whose paired gap or excess to the oracles
is significant at 5 % (two-sided): the power of the check, and its rate of false alarms. Results go to
`benchmarks/results/meta-KIND.json`, where finished models are found again, and are printed as a table.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from ground import machine, save_lines
from unlearning import RESULTS, ground

from evaluators.statistics import clopper_pearson, delong, normal_interval
from methods.retrain import Retrain, RetrainSettings
from raysweep.audit.measure import measure, subject_of
from raysweep.config import Tier
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import BY_WEIGHTS, names
from raysweep.seeds import derive_seed

WIDTHS = ((8, 16), (16, 32), (24, 48))
STEPS = (250, 400, 600)
INFORMATIVE = 0.9
PAIRED = ("gap", "excess")


def tier() -> Tier:
    """Everything but what needs a brought network, or a candidate of the base to speak of."""
    left_out = ("interpolation", "sampler_removal", "nudenet", *BY_WEIGHTS)
    checks = tuple(n for n in names("evaluator") if n not in left_out)
    return Tier(seed=5, judge="audit", checks=checks, groups=10, samples=300, class_samples=100, noises=40, loss_noises=10,
                loss_images=10, relearn_steps=(5, 25), likelihood_steps=10, likelihood_probes=2, full_fidelity=False)  # fmt: skip


def study(kind: str, has: bool, number: int) -> dict[str, Any]:
    """One model of the pool: trained, then audited."""
    g = ground(kind)
    width, steps = WIDTHS[number % len(WIDTHS)], STEPS[(number // len(WIDTHS)) % len(STEPS)]
    seed = derive_seed("meta", kind, has, number)
    unet = g.task.model["unet"] | {"block_out_channels": width}
    model = PixelDDPM.build(g.task.model | {"unet": unet}, seed)
    settings = RetrainSettings(**g.task.recipe | {"steps": steps, "split": "train" if has else "retain"})
    method = Retrain(model, settings)
    for step in range(steps):
        method.step(g.task.batch(method.draws(), seed, step))
    method.finish()
    chosen, judge = tier(), g.judges["audit"]
    if "meta" not in g.__dict__:
        peers = {name: subject_of(g.model(name), g.task, judge, chosen) for name in g.folders}
        for peer in peers.values():
            peer.peers = peers
        g.__dict__["meta"] = peers
    subject = subject_of(model, g.task, judge, chosen)
    subject.peers = g.__dict__["meta"]
    result = measure(subject, chosen)
    rows = {
        f"{r['check']}.{r['name']}": {k: r[k] for k in ("value", "se", "status", "reason")}
        for r in result.rows
        if "@" not in r["name"]
    }
    return {"has": has, "number": number, "width": width, "steps": steps, "rows": rows, "seconds": result.seconds}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row per metric, the most telling first."""
    pools = {has: [r for r in results if r["has"] is has] for has in (True, False)}
    found = []
    for name in sorted({n for r in results for n in r["rows"]}):
        values = {
            has: np.array([r["rows"][name]["value"] for r in pool if r["rows"].get(name, {}).get("value") is not None])
            for has, pool in pools.items()
        }
        if min(len(v) for v in values.values()) < 2:
            continue
        auc, se = delong(values[True], values[False])
        low, high = normal_interval(auc, se)
        flipped = auc < 0.5
        told = max(auc, 1 - auc)
        span = (1 - high, 1 - low) if flipped else (low, high)
        line = [name, f"{told:.2f} [{max(0, span[0]):.2f}, {min(1, span[1]):.2f}]", "lower" if flipped else "higher"]
        line.append("yes" if told >= INFORMATIVE else "**uninformative**")
        if name.split(".")[1] in PAIRED:
            for has in (True, False):
                flags = [
                    abs(r["rows"][name]["value"]) > 1.96 * r["rows"][name]["se"]
                    for r in pools[has]
                    if r["rows"][name]["value"] is not None and r["rows"][name]["se"]
                ]
                lo, hi = clopper_pearson(sum(flags), len(flags)) if flags else (0.0, 1.0)
                line.append(f"{np.mean(flags):.2f} [{lo:.2f}, {hi:.2f}]" if flags else "-")
        else:
            line += ["", ""]
        found.append((told, line))
    head = ["check", "AUC over models", "with the forget set", "informative", "flagged, with", "flagged, without"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(line) + " |" for _, line in sorted(found, key=lambda f: -f[0])]
    return "\n".join(lines)


def main() -> None:
    """Makes the models that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "points"))
    parser.add_argument("--models", type=int, default=20, help="models of either kind")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    path = RESULTS / f"meta-{args.kind}.json"
    RESULTS.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["results"] if path.is_file() else []
    done = {(r["has"], r["number"]) for r in kept}
    todo = [(has, k) for k in range(args.models) for has in (True, False) if (has, k) not in done]
    ground(args.kind)
    with ProcessPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(study, args.kind, has, k) for has, k in todo]:
            kept.append(future.result())
            last = kept[-1]
            print(f"{'with' if last['has'] else 'without'} {last['number']}: {last['seconds']:.0f} s", flush=True)
            save_lines(path, [json.dumps({"about": machine(), "results": kept}, indent=1)])
    print(table(kept))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
