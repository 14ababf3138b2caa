"""What the searcher costs: CPU time per trial after 100 to 10,000 trials, of attaching to the journal, and what its view costs in quality.

    python benchmarks/search.py                 # times; prints one JSON object
    python benchmarks/search.py --trials 1000   # after fewer trials
    python benchmarks/search.py --quality       # what the searches find, for 3 seeds

A journal is filled by the real searcher with random suggestions, under the window of 24 slots; then a sampler suggests and completes
trials at its end. CPU times are those of this process, without waiting for the disk. Quality compares the view that a sampler has
(see `raysweep.search.view`) with one that holds every trial: hypervolume of the front that a search of two noisy objectives finds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import optuna
from ground import machine

from raysweep.results import pareto
from raysweep.search import spaces, view
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Parameter, Space

WINDOW, FLIGHT, QUALITY = 100, 33, 1500
SPACES = {"sfd alone, 7 parameters": ["sfd"], "rgd, siss, esd": ["rgd", "siss", "esd"]}
NAMES = count()


def drive(search: ParetoSearch, trials: int, under_way: list[tuple[str, dict]], objectives) -> list[float]:
    """Completes and suggests trials; returns CPU seconds of each pair."""
    seconds = []
    for _ in range(trials):
        started = time.process_time()
        if len(under_way) >= FLIGHT:
            name, config = under_way.pop(0)
            residue, damage = objectives(config)
            result = {"residue": residue, "damage": damage, "constraint": -0.1, "train_s": 60.0, FINAL: True}
            search.on_trial_complete(name, result | {"digest": "0" * 64, "probe": "0" * 64})
        config = search.suggest(name := str(next(NAMES)))
        seconds.append(time.process_time() - started)
        assert isinstance(config, dict), config
        under_way.append((name, config))
    return seconds


def times(methods: list[str], trials: int, timed: int = 100) -> dict[str, object]:
    """CPU times after `trials` trials: of a suggestion with the completion of another trial, by sampler, and of attaching."""
    draws, measured = random.Random(0), {}
    searched = [spaces.load(method) for method in methods]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        journal, under_way = Path(folder) / "study.journal", []

        def attached() -> ParetoSearch:
            return ParetoSearch(journal, "search", searched, 2 * trials + 1000, WINDOW, 0, "random")

        search = attached()
        drive(search, trials, under_way, lambda config: (draws.random(), draws.random()))
        for sampler in ("random", "tpe"):
            search.sampler = sampler
            drive(
                search, 1, under_way, lambda config: (draws.random(), draws.random())
            )  # learns what it had not needed
            seconds = [
                1000 * s for s in drive(search, timed, under_way, lambda config: (draws.random(), draws.random()))
            ]
            measured[f"{sampler}_ms"] = {
                "median": round(statistics.median(seconds), 1),
                "p90": round(sorted(seconds)[int(0.9 * timed)], 1),
                "max": round(max(seconds), 1),
                "n": timed,
            }
        attach = []
        for _ in range(3):
            started = time.process_time()
            attached()
            attach.append(round(time.process_time() - started, 2))
        size = journal.stat().st_size / 1e6
    return {"trials": trials, **measured, "attach_s": attach, "journal_mb": round(size, 1)}


SIX = Space(
    "finetune",
    {},
    (
        *(Parameter(f"x{k}", "uniform", (0.0, 1.0), {}) for k in range(4)),
        Parameter("rate", "log", (1e-5, 1e-2), {}),
        Parameter("steps", "int", (1, 100), {}),
    ),
    (),
)


def quality(trials: int, learned: int, seed: int, sampler: str = "tpe") -> float:
    """Hypervolume (reference 1.1, 1.1) of the noise-free front that a search finds, with so many trials in its view."""
    noise = random.Random(seed)

    def truth(config: dict) -> tuple[float, float]:
        h = config["hyperparameters"]
        far = sum((h[f"x{k}"] - 0.2 - 0.15 * k) ** 2 for k in range(4))
        rate, steps = (np.log10(h["rate"]) + 5) / 3, h["steps"] / 100
        pushed = 0.5 * (rate + steps)
        return 1 - pushed + far, pushed**2 + far + 0.5 * (rate - steps) ** 2

    def measured(config: dict) -> tuple[float, float]:
        points.append(truth(config))
        return points[-1][0] + noise.gauss(0, 0.02), points[-1][1] + noise.gauss(0, 0.02)

    before, points = (view.LEARNED, view.BEST), []
    view.LEARNED, view.BEST = learned, learned // 4
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            search = ParetoSearch(Path(folder) / "j", "quality", [SIX], trials, WINDOW, seed, sampler)
            drive(search, trials, [], measured)
    finally:
        view.LEARNED, view.BEST = before
    return float(pareto.hypervolume(np.array(points)))


def main() -> None:
    """Measures times, or quality."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quality:
        compared = {"bounded": (view.LEARNED, "tpe"), "everything": (10**9, "tpe"), "random": (1, "random")}
        result: dict[str, object] = {
            f"hypervolume after {QUALITY:,} trials, {name}": [
                round(quality(QUALITY, learned, seed, sampler), 4) for seed in range(arguments.seeds)
            ]
            for name, (learned, sampler) in compared.items()
        }
    else:
        counts = [n for n in (100, 1000, 10_000) if n <= arguments.trials]
        result = {name: [times(methods, n) for n in counts] for name, methods in SPACES.items()}
    print(json.dumps(result | {"machine": machine() | {"optuna": optuna.__version__}}, indent=1))


if __name__ == "__main__":
    main()
