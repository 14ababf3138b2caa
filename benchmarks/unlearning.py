"""Compares all methods at equal budgets and several seeds with base, oracle and two controls.

    python benchmarks/unlearning.py class            # forget a digit
    python benchmarks/unlearning.py points           # forget a memorised picture
    python benchmarks/unlearning.py class --methods rgd,siss --trials 4 --seeds 3 --jobs 2

For each (method, seed) a study of `--trials` trials runs as a sweep would: the method's search space, its points
first, then Optuna's TPE on residue and damage of the probe. The best trial by the probe is audited on fresh seeds by the
other judge, and so are two controls made from it: each changed tensor moved by as much in a random direction, and in the
opposite direction. "Best" is the largest min(UA, RA) for a class and the smallest max(residue, damage) for a picture, and
a candidate beats a control if it is better in the same sense. Results go to `benchmarks/results/unlearning-KIND.json`, from which
finished (method, seed) pairs are read again, and are printed as a table: mean over seeds, 95 % Student-t interval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from ground import Ground, machine, save_lines

from evaluators.statistics import t_interval
from raysweep.models.pixel import PixelDDPM
from raysweep.registry import method_names, resolve
from raysweep.search.spaces import load as load_space
from raysweep.storage.seeds import derive_seed

RESULTS = Path(__file__).parent / "results"
TASKS = {"class": ("task=digits-class",), "points": ("task=digits-picture",)}
GOALS = {"class": "UA >= 0.9 and RA >= 0.9", "points": "residue <= 0.2 and damage <= 0.35"}
_ground: dict[str, Ground] = {}


def ground(kind: str) -> Ground:
    """This process's ground."""
    if kind not in _ground:
        _ground[kind] = Ground(*TASKS[kind], "oracles=3")
    return _ground[kind]


def figures(g: Ground, model: PixelDDPM, tier: str) -> dict[str, float]:
    """The numbers of the table for one model."""
    measured = g.measure(model, tier)
    result, v = g.objectives(measured, tier), measured.values
    values = {"residue": result.residue, "damage": result.damage, "frechet": v["fidelity.frechet"]}
    if "classifier.recognised" in v:
        values |= {"ua": 1 - v["classifier.recognised"], "ra": v["classifier.retain_accuracy"]}
    return values | ({"membership_gap": v["loss.gap"]} if "loss.gap" in v else {})  # one picture's rank has no value


def score(kind: str, f: dict[str, float]) -> float:
    """Larger is better."""
    return min(f["ua"], f["ra"]) if kind == "class" else -max(f["residue"], f["damage"])


def reached(kind: str, f: dict[str, float]) -> bool:
    """Whether the goal of the task is met."""
    return f["ua"] >= 0.9 and f["ra"] >= 0.9 if kind == "class" else f["residue"] <= 0.2 and f["damage"] <= 0.35


def control(base: PixelDDPM, candidate: PixelDDPM, kind: str, seed: int) -> PixelDDPM:
    """The base with every tensor moved by the same distance as in the candidate, in a random or the opposite direction."""
    moved = base.with_net(base.net)
    moved.sampler = candidate.sampler
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p, q in zip(moved.net.parameters(), candidate.net.parameters(), strict=True):
            change = q - p
            if kind == "random":
                direction = torch.randn(p.shape, generator=generator)
                change = -direction * change.norm() / direction.norm().clamp(min=1e-12)
            p.sub_(change)
    return moved


def study(kind: str, method: str, seed: int, trials: int) -> dict[str, Any]:
    """One (method, seed): its trials, and the audit of the best and of its controls."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    g, space = ground(kind), load_space(method, None, kind)
    if any(p.open for p in space.parameters):
        cls = resolve("method", method)
        hp = cls.Hyperparameters(**space.fixed)
        prepared = g.prepared(cls, hp)
        space = space.resolved(lambda name: cls.choices(name, prepared, hp))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=2)
    search = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    best, runs = None, []
    for k in range(trials):
        point = space.points[k].values if k < len(space.points) else {}
        search.enqueue_trial({f"{method}.{n}": v for n, v in point.items()})
        trial = search.ask()
        settings = space.ask(trial, point)
        candidate = g.make(method, settings, derive_seed("benchmark", seed, k))
        if isinstance(candidate, str):
            search.tell(trial, state=optuna.trial.TrialState.FAIL)
            runs.append({"settings": settings, "failed": candidate})
            continue
        probed = figures(g, candidate.model, "probe")
        search.tell(trial, [probed["residue"], probed["damage"]])
        runs.append({"settings": settings, "seconds": candidate.seconds, "probe": probed})
        if best is None or score(kind, probed) > score(kind, best[1]):
            best = candidate, probed, settings
    result: dict[str, Any] = {"method": method, "seed": seed, "runs": runs}
    if best is None:
        return result
    candidate, _, settings = best
    result |= {"settings": settings, "seconds": candidate.seconds, "audit": figures(g, candidate.model, "audit")}
    for step in ("random", "opposite") if candidate.diagnostics["distance"] > 0 else ():
        result[step] = figures(g, control(g.model("base"), candidate.model, step, seed), "audit")
    return result


def interval(values: list[float]) -> str:
    """Mean with its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    _, low, high = t_interval(np.array(values))
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def table(kind: str, results: list[dict[str, Any]], anchors: dict[str, list[dict[str, float]]]) -> str:
    """Markdown."""
    own = ("ua", "ra", "membership_gap") if kind == "class" else ()
    names = [*own, "frechet", "residue", "damage"]
    head = ["model", *names, "seconds", "goal", "beats random", "beats opposite"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, measured in anchors.items():
        lines.append(
            "| "
            + " | ".join([name, *(interval([f[n] for f in measured if n in f]) for n in names), "", "", "", ""])
            + " |"
        )
    for method in sorted({r["method"] for r in results}):
        mine = [r for r in results if r["method"] == method and "audit" in r]
        row = [
            method,
            *(interval([r["audit"][n] for r in mine if n in r["audit"]]) for n in names),
            interval([r["seconds"] for r in mine]),
        ]
        row.append(f"{sum(reached(kind, r['audit']) for r in mine)}/{len(mine)}")
        for step in ("random", "opposite"):
            with_control = [r for r in mine if step in r]
            wins = sum(score(kind, r["audit"]) > score(kind, r[step]) for r in with_control)
            row.append(f"{wins}/{len(with_control)}" if with_control else "none")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(TASKS))
    parser.add_argument("--methods", help="comma-separated; default: all that serve the task")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    serving = [m for m in method_names() if args.kind in resolve("method", m).kinds]
    wanted = args.methods.split(",") if args.methods else serving
    path = RESULTS / f"unlearning-{args.kind}.json"
    RESULTS.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["results"] if path.is_file() else []
    done = {(r["method"], r["seed"]) for r in kept}
    g = ground(args.kind)
    anchors = {
        "base": [figures(g, g.model("base"), "audit")],
        "oracle": [figures(g, g.model(s), "audit") for s in g.folders if s.startswith("oracle")],
        "destroyed": [figures(g, g.model("destroyed"), "audit")],
    }
    todo = [(m, s) for s in range(args.seeds) for m in wanted if (m, s) not in done]
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(study, args.kind, m, s, args.trials): (m, s) for m, s in todo}
        for future in futures:
            kept.append(future.result())
            last = kept[-1]
            print(f"{last['method']} seed {last['seed']}: {json.dumps(last.get('audit', {}))}", flush=True)
            data = {
                "about": machine() | {"trials": args.trials, "goal": GOALS[args.kind]},
                "anchors": anchors,
                "results": kept,
            }
            save_lines(path, [json.dumps(data, indent=1, default=_plain)])
    print(table(args.kind, [r for r in kept if r["method"] in wanted], anchors))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else str(value)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
