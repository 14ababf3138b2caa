"""ROC-AUC of each check of the audit in separating models that contain the forget set from models that do not.

    python benchmarks/meta.py class                 # 20 models trained with the forgotten digit, 20 without
    python benchmarks/meta.py points --models 20 --jobs 2

The pool varies in seed, width and length of training, so that a check must see the forget set and not the recipe. Every
model is audited like a candidate, next to the base and three oracles, which are not in the pool. The direction of each
check is fixed in advance, so a check that points the wrong way has an AUC below one half. A check whose AUC is below 0.9 is
labelled uninformative on this task, also in reports (`--rate`). `flagged` are the shares of either kind whose gap or excess
to the oracles lies above the margin of verdicts and equivalence tests, one-sided at 5 %: the power of the check, and its rate
of false alarms; the margin allows for the small differences of models with other widths and lengths of training than the
oracles'. The gap of a single picture, a difference of ranks, is flagged if its whole 95 % interval, that of one further oracle, lies
above 0. Results go to `benchmarks/results/meta-KIND.json`, from which finished models are read again (`--only` repeats some
checks on all of them), and are printed as a table. Checks of quality or of retained images are left out: they are not meant
to separate these models.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ground import machine, save_lines
from unlearning import RESULTS, ground

from evaluators import membership
from evaluators.statistics import auc_interval, clopper_pearson
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing import verdict
from raysweep.auditing.informative import LEAST
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import checks_by_weights, names, reach_of
from raysweep.storage.seeds import derive_seed

WIDTHS = ((8, 16), (16, 32), (24, 48))
STEPS = (250, 400, 600)
ONE_SIDED = 1.645
TABLE = Path(__file__).resolve().parent.parent / "raysweep" / "auditing" / "informative.json"
MARGINS = {"gap": membership.MARGIN, "excess": verdict.MARGIN}
LOWER = (
    "unlearning_accuracy",
    "forget_loss",
    "forget_log_loss",
    "unlabelled_log_loss",
    "forget_bits",
)  # low if it is known
OTHER = ("validity", "energy", "log_ratio", "holdout_rate", "equivalence_p", "frechet")


def tier(without: tuple[str, ...] = ()) -> Tier:
    """All checks except those that need a network from the user, or a candidate made from the base."""
    left_out = ("interpolation", "sampler_removal", "nudenet", *checks_by_weights(), *without)
    checks = tuple(n for n in names("evaluator") if n not in left_out)
    return Tier(
        seed=5,
        judge="audit",
        checks=checks,
        groups=10,
        samples=300,
        class_samples=100,
        noises=40,
        loss_noises=10,
        loss_images=10,
        relearn_steps=(5, 25),
        likelihood_steps=10,
        likelihood_probes=2,
        full_fidelity=False,
    )


def study(kind: str, has: bool, number: int, without: tuple[str, ...] = ()) -> dict[str, Any]:
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
    chosen, judge = tier(without), g.judges["audit"]
    if "meta" not in g.__dict__:
        peers = {name: subject_of(g.model(name), g.task, judge, chosen) for name in g.folders}
        for peer in peers.values():
            peer.peers = peers
        g.__dict__["meta"] = peers
    subject = subject_of(model, g.task, judge, chosen)
    subject.peers = g.__dict__["meta"]
    result = measure(subject, chosen)
    rows = {
        f"{r.check}.{r.name}": {"value": r.value, "se": r.se, "lo": r.lo, "status": r.status, "reason": r.reason}
        for r in result.rows
        if "@" not in r.name
    }
    return {"has": has, "number": number, "width": width, "steps": steps, "rows": rows, "seconds": result.seconds}


def ratings(results: list[dict[str, Any]]) -> dict[str, tuple[float, float, float, bool]]:
    """Metric -> (AUC over models, low, high, whether models with the forget set are expected to score lower)."""
    rated = {}
    for name in sorted({n for r in results for n in r["rows"]}):
        check, metric = name.split(".")
        if check == "per_class" or metric in OTHER or metric.startswith("retain"):
            continue
        with_, without = (
            np.array(
                [v for r in results if r["has"] is has and (v := r["rows"].get(name, {}).get("value")) is not None]
            )
            for has in (True, False)
        )
        if min(len(with_), len(without)) < 2:
            continue
        auc, _, low, high = auc_interval(with_, without)
        lower = metric in LOWER
        if lower:
            auc, low, high = 1 - auc, 1 - high, 1 - low
        rated[name] = (auc, low, high, lower)
    return rated


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row per metric, the largest AUC first."""
    ranked = []
    for name, (auc, low, high, lower) in ratings(results).items():
        line = [name, f"{auc:.2f} [{low:.2f}, {high:.2f}]", "lower" if lower else "higher"]
        line.append("yes" if auc >= LEAST else "**uninformative**")
        check, metric = name.split(".")
        ranked_picture = any(r["rows"].get(f"{check}.rank", {}).get("value") is not None for r in results)
        compared = metric == "gap" or (metric == "excess" and reach_of(check) is not None)
        for has in (True, False) if compared else ():
            flags = [
                row["lo"] > 0 if ranked_picture else row["value"] - ONE_SIDED * row["se"] > MARGINS[metric]
                for r in results
                if r["has"] is has
                and (row := r["rows"].get(name, {})).get("value") is not None
                and (row.get("lo") is not None if ranked_picture else row["se"])
            ]
            lo, hi = clopper_pearson(sum(flags), len(flags)) if flags else (0.0, 1.0)
            line.append(f"{np.mean(flags):.2f} [{lo:.2f}, {hi:.2f}]" if flags else "")
        ranked.append((auc, line if compared else [*line, "", ""]))
    head = [
        "check",
        "AUC over models",
        "expected with the forget set",
        "informative",
        "flagged, with",
        "flagged, without",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(line) + " |" for _, line in sorted(ranked, key=lambda f: -f[0])]
    return "\n".join(lines)


def rate(kind: str, results: list[dict[str, Any]]) -> None:
    """Writes the ratings of checks that reports show into `raysweep/auditing/informative.json`."""
    data = json.loads(TABLE.read_text()) if TABLE.is_file() else {"auc": {}, "models": {}}
    data["auc"][kind] = {name: [round(v, 3) for v in rating[:3]] for name, rating in ratings(results).items()}
    data["models"][kind] = [sum(r["has"] is has for r in results) for has in (True, False)]
    TABLE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Makes the models that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "points"))
    parser.add_argument("--models", type=int, default=20, help="models of either kind")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], help="checks to leave out, for their cost")
    parser.add_argument("--only", nargs="*", default=[], help="measure only these checks, again on all models")
    parser.add_argument("--rate", action="store_true", help="write the ratings of checks that reports show")
    args = parser.parse_args()
    path = RESULTS / f"meta-{args.kind}.json"
    RESULTS.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["results"] if path.is_file() else []
    before = {(r["has"], r["number"]): r for r in kept}
    todo = [(has, k) for k in range(args.models) for has in (True, False) if args.only or (has, k) not in before]
    without = [n for n in names("evaluator") if n not in args.only] if args.only else args.without
    ground(args.kind)
    with ProcessPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(study, args.kind, has, k, tuple(without)) for has, k in todo]:
            last = future.result()
            old = before.get((last["has"], last["number"]))
            if old is None:
                kept.append(last)
            else:
                other = {n: row for n, row in old["rows"].items() if n.split(".")[0] not in args.only}
                old["rows"] = other | last["rows"]
            print(f"{'with' if last['has'] else 'without'} {last['number']}: {last['seconds']:.0f} s", flush=True)
            save_lines(path, [json.dumps({"about": machine(), "results": kept}, indent=1)])
    print(table(kept))
    if args.rate:
        rate(args.kind, kept)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
