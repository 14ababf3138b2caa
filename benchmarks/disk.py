"""Disk of a sweep: candidates as they are stored against whole models, and what a long search keeps at a time.

The first table trains a candidate of each method of the default sweep for a few steps, which decides which tensors change, and weighs
it. The second feeds the real retention with searches whose probes are drawn: `even`, points without any order, and `front`, points
that approach a convex trade-off with noise, which gives long fronts. It counts candidates on disk, and those among the final audit's
picks that had been dropped and would be made again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from ground import machine

from raysweep.config.reader import load
from raysweep.engine.events import Silent
from raysweep.engine.remake import Here
from raysweep.engine.retention import Retention, bound
from raysweep.models import families, stored
from raysweep.models.folders import CARD
from raysweep.registry import resolve
from raysweep.results.trials import Trial, pick_for_audit
from raysweep.rundir import RunDir
from raysweep.train.jobs import Job


def weigh(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def default_sweep(home: Path) -> None:
    """Prints the bytes of a candidate of each method of the default sweep, and of all its candidates."""
    sweep = load(None, ())
    task = sweep.task.build()
    (home / "task").mkdir()
    task.save(home / "task")
    families.example(task).save(home / "base")
    here, share, sizes = Here(Silent()), sweep.search.trials // len(sweep.methods), {}
    for method in sweep.methods:
        for as_delta in (False, True):
            fields = resolve("method", method).Hyperparameters.model_fields
            job = Job(
                id=method,
                kind="train",
                method=method,
                hyperparameters={k: v for k, v in {"steps": 2, "lr": 1e-3}.items() if k in fields},
                seed=0,
                task=str(home / "task"),
                base=str(home / "base"),
                out=str(home / "candidates" / f"{method}-{as_delta}"),
                as_delta=as_delta,
            )
            outcome = here.run(job)
            assert outcome.status == "ok", outcome.reason
            sizes[method, as_delta] = weigh(Path(job.out))
        print(f"{method:<12} whole {sizes[method, False] / 1e3:8.1f} kB, as stored {sizes[method, True] / 1e3:8.1f} kB")
    whole, delta = (
        share * sum(size for (_, kind), size in sizes.items() if kind is as_delta) for as_delta in (False, True)
    )
    kept = max(sweep.audit.top, len(sweep.methods))
    mean = delta / sweep.search.trials
    print(f"{sweep.search.trials} candidates: whole {whole / 1e6:.2f} MB, as stored {delta / 1e6:.2f} MB")
    print(
        f"during the search at most {bound(sweep)} and those in flight; afterwards {kept}: {kept * mean / 1e6:.2f} MB"
    )


def probe(kind: str, draw: random.Random, progress: float) -> tuple[float, float]:
    """(residue, damage) of a trial. progress: of the search, 0 to 1."""
    if kind == "even":
        return draw.random(), draw.random()
    x, distance = draw.random(), abs(draw.gauss(0, 0.02)) + 0.3 * max(0.0, 0.5 - progress) * draw.random()
    return x + distance, (1 - x) ** 2 + distance


def long_search(home: Path, kind: str, trials: int, seed: int) -> None:
    """Prints what the retention of a long search kept, dropped and took."""
    sweep = load(None, (f"search.trials={trials - trials % 6}",))
    folder, draw = RunDir(home / f"{kind}-{seed}"), random.Random(seed)
    retention, ended, seconds, most = Retention(folder, sweep, []), [], [], 0
    for number in range(sweep.search.trials):
        method = draw.choice(sweep.methods)
        config = {"trial": f"{number:05d}-{method}", "method": method, "source": "", "seed": 0, "hyperparameters": {}}
        residue, damage = probe(kind, draw, number / trials)
        candidate = folder.candidates / config["trial"]
        candidate.mkdir(parents=True)
        for name in (CARD, stored.FILE):
            (candidate / name).write_text("")
        started = time.process_time()
        retention.ended(config | {"place": number}, {"residue": residue, "damage": damage})
        seconds.append(time.process_time() - started)
        most = max(most, len(retention.held))
        ended.append(Trial(**config, number=number, state="COMPLETE", residue=residue, damage=damage))
    kept = {path.parent.name for path in folder.candidates.glob(f"*/{stored.FILE}")}
    assert kept == retention.held
    picked = pick_for_audit(ended, sweep.audit.top)
    again = [t for t in picked if t.trial not in kept]
    median, slowest = np.median(seconds) * 1e3, max(seconds) * 1e3
    print(
        f"{kind:<6} seed {seed}: {len(ended)} trials, fronts of {len(retention.front)}, at most {most} of {bound(sweep)} on disk, "
        f"{len(again)} of {len(picked)} picked ones made again; CPU per trial {median:.2f} ms median, {slowest:.1f} ms most"
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        default_sweep(home)
        for kind in ("even", "front"):
            for seed in range(arguments.seeds):
                long_search(home, kind, arguments.trials, seed)


if __name__ == "__main__":
    main()
