"""How busy a search keeps its slots, by cluster and by how much the lengths of trials vary, in simulated time.

    python benchmarks/utilisation.py            # all clusters; prints one JSON object
    python benchmarks/utilisation.py 750 --rule # clusters with 750 slots, by the rule of the window alone

Trials train for 1 on average, in units of the mean, and are then probed for 0.15, both with the same coefficient of variation (cv),
lognormal or gamma, independent of their settings. Slots and auditors are those of cluster.yaml (24 and 8) and of 125 nodes with 8 GPUs
(750 and 250), and of a laptop. At time 0 all slots are free; the busy share counts to the end of the last trial, so it includes ramp-up
and tail. No trial fails and starting one takes no time. The first seed of each row of at most 10,000 trials drives the real
`ParetoSearch`, with its journal, through all trials, and must give the same times as the rule of the window alone, which gives the
other seeds; at 10,000 trials that takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ground import machine

from raysweep.config.sections import SearchConfig
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.utilisation import Ahead, Timeline, simulate
from raysweep.search.window import resolve_window

CLUSTERS = ((2, 2, 36), (24, 8, 240), (24, 8, 960), (750, 250, 10_000), (750, 250, 30_000))  # slots, auditors, trials
METHODS = ("rgd", "siss")
PROBE, SEEDS, REAL, LEARNING = (
    0.15,
    10,
    10_000,
    240,
)  # LEARNING: most trials that TPE suggests; others are drawn at random


def drawn(kind: str, cv: float, mean: float, count: int, seed: int) -> list[float]:
    """Lengths of trials."""
    generator = np.random.default_rng(seed)
    if kind == "gamma":
        return generator.gamma(cv**-2, mean * cv**2, count).tolist()
    sigma = np.log(1 + cv**2) ** 0.5
    return generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).tolist()


def searched(slots: int, auditors: int, trials: int, window: int, train: list[float], probe: list[float]) -> Timeline:
    """The timeline of the real searcher."""
    values = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        search = ParetoSearch(
            Path(folder) / "study.journal",
            "utilisation",
            [spaces.load(method) for method in METHODS],
            trials,
            window,
            0,
            "tpe" if trials <= LEARNING else "random",
        )
        return simulate(
            search,
            slots,
            auditors,
            slots + auditors + 1,
            train.__getitem__,
            probe.__getitem__,
            lambda config: {"residue": values.random(), "damage": values.random(), FINAL: True},
        )


def row(slots: int, auditors: int, trials: int, kind: str, cv: float, rule: bool) -> dict[str, object]:
    """Busy shares on one cluster, with the window and without. rule: without the real searcher."""
    concurrent = slots + auditors + 1
    window = resolve_window(SearchConfig(trials=trials), concurrent)
    busy, free = [], []
    for seed in range(SEEDS):
        train = drawn(kind, cv, 1.0, trials, seed)
        probe = drawn(kind, cv, PROBE, trials, seed + 1000)
        for size, shares in ((window, busy), (None, free)):
            ahead = Ahead(size, trials)
            line = simulate(ahead, slots, auditors, concurrent, train.__getitem__, probe.__getitem__, dict)
            shares.append(line.busy)
            if seed == 0 and size and trials <= REAL and not rule:
                real = searched(slots, auditors, trials, window, train, probe)
                assert real == line, (real, line)
    return {
        "slots": slots,
        "trials": trials,
        "lengths": kind,
        "cv": cv,
        "window": window,
        "n": len(busy),
        "busy": round(float(statistics.mean(busy)), 3),
        "busy_sd": round(statistics.stdev(busy), 3),
        "asynchronous": round(float(statistics.mean(free)), 3),
        "asynchronous_sd": round(statistics.stdev(free), 3),
    }


def main() -> None:
    """Measures all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("slots", type=int, nargs="*", default=sorted({cluster[0] for cluster in CLUSTERS}))
    parser.add_argument("--rule", action="store_true")
    arguments = parser.parse_args()
    started, rows = time.perf_counter(), []
    for cluster in (c for c in CLUSTERS if c[0] in arguments.slots):
        for kind in ("lognormal", "gamma"):
            for cv in (0.3, 0.8):
                rows.append(row(*cluster, kind, cv, arguments.rule))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "machine": machine(), "seconds": time.perf_counter() - started}, indent=1))


if __name__ == "__main__":
    main()
