"""What the audit can see: the share of judgements that flag models which know some of the forgotten data.

    python benchmarks/power.py points               # forget a memorised picture
    python benchmarks/power.py class
    python benchmarks/power.py class --oracles 12 --copies 5 --residue 40 --kinds "alpha = 0.2"

Candidates: networks that answer with a mixture of the base (share alpha) and of an oracle; that are the base below step 100, below 300 or
above 600 of 1,000 and an oracle elsewhere; and, for the picture, models trained on its mirror image, its negative, a shift, a crop, and
on a blend of it with a digit. Each is judged by disjoint sets of 3 and of 5 oracles, without the one that it is made of. "Residue": its
95 % interval excludes 0; "verdict": the verdict accuses. Goal: alpha = 0.2 is flagged by either in at least 80 % with 5 oracles.
Candidates of alpha 0 are true oracles. With `--residue`, the residue alone, which needs no attacks, by that many random sets of oracles for
each candidate, and as many for each oracle by the others. Models and scores are kept in `benchmarks/results/`, and shared with `null.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ground import machine, save_lines
from null import FLAGGED
from pool import TIERS, Judgement, Mixture, Pool
from unlearning import RESULTS

from evaluators.altered import ALTERATIONS
from evaluators.statistics import clopper_pearson
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing import objectives
from raysweep.auditing.anchors import Unmeasured
from raysweep.models.pixel import PixelDDPM
from raysweep.storage.seeds import derive_seed

ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.4)
GOAL, GOAL_ALPHA = 0.8, 0.2


@dataclass(frozen=True)
class Candidate:
    """A model that knows some of the forgotten data. of: the oracle that it is made of, "" for none."""

    name: str
    of: str
    make: Callable[[], PixelDDPM]


def candidates(pool: Pool, copies: int) -> Iterator[tuple[str, list[Candidate]]]:
    """Kind of candidate -> `copies` of it, each made of another oracle or trained from another seed."""
    for alpha in ALPHAS:
        yield f"alpha = {alpha:g}", [_mixture(pool, f"alpha{alpha:g}", k, _constant(alpha)) for k in range(copies)]
    ranges = {"below step 100": (0, 100), "below step 300": (0, 300), "above step 600": (600, 1000)}
    for name, (low, high) in ranges.items():
        yield f"the base {name}", [_mixture(pool, f"range{low}-{high}", k, _within(low, high)) for k in range(copies)]
    if pool.kind == "points":
        for name, alter in (ALTERATIONS | {"blend": _blend(pool)}).items():
            yield f"trained on: {name}", [_trained(pool, name, k, alter) for k in range(copies)]


def _constant(alpha: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full(t.shape, alpha)


def _within(low: int, high: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: ((t >= low) & (t < high)).float()


def _mixture(pool: Pool, name: str, k: int, share: Callable[[torch.Tensor], torch.Tensor]) -> Candidate:
    oracle = pool.oracles[k]

    def make() -> PixelDDPM:
        base, other = pool.ground.model("base"), pool.ground.model(oracle)
        return other.with_net(Mixture(base.net, other.net, share))

    return Candidate(f"{name}-{k}", oracle, make)


def _trained(pool: Pool, name: str, k: int, alter: Callable[[torch.Tensor], torch.Tensor]) -> Candidate:
    """A model trained like the base, on an altered picture instead of the forgotten one."""

    def make() -> PixelDDPM:
        task, seed = pool.ground.task, derive_seed("power", name, k)
        train = task.splits["train"]
        forgotten = task.splits["forget"].distinct().x
        known = (train.x[:, None] == forgotten[None]).flatten(2).all(2).any(1)
        x = train.x.clone()
        x[known] = alter(x[known])
        taught = replace(task, splits=task.splits | {"train": replace(train, x=x)})
        model = PixelDDPM.build(task.model, seed)
        method = Retrain(model, RetrainSettings(**task.recipe | {"split": "train"}))
        for step in range(method.steps):
            method.step(taught.batch(method.draws(), seed, step))
        method.finish()
        return model

    return Candidate(f"trained-{name}-{k}", "", make)


def _blend(pool: Pool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Half of the picture and half of a retained image."""
    other = pool.ground.task.splits["retain"].x[0]
    return lambda x: (x + other) / 2


def judged(pool: Pool, candidate: Candidate, anchors: int) -> Iterator[Judgement]:
    """The candidate by disjoint sets of oracles, without the one that it is made of."""
    others = [name for name in pool.oracles if name != candidate.of]
    for i in range(0, len(others) - anchors + 1, anchors):
        try:
            yield pool.judge(candidate.name, others[i : i + anchors])
        except Unmeasured as error:
            print(f"{candidate.name}: {error}")


def line(pool: Pool, kind: str, models: Sequence[Candidate], sizes: Sequence[int]) -> str:
    """Markdown: the shares that residue, verdict, and either flag, and the mean residue, for each number of oracles."""
    cells = []
    for size in sizes:
        judgements = [judgement for model in models for judgement in judged(pool, model, size)]
        residue = np.array([j.place.residue_lo > 0 for j in judgements])
        accused = np.array([j.verdict is not None and j.verdict.label in FLAGGED for j in judgements])
        either = residue | accused
        low, high = clopper_pearson(int(either.sum()), len(either))
        missed = kind == f"alpha = {GOAL_ALPHA:g}" and size == 5 and either.mean() < GOAL
        cells += [f"{residue.mean():.2f}", f"{accused.mean():.2f}"]
        cells += [f"{either.mean():.2f} [{low:.2f}, {high:.2f}]{' **under the goal**' if missed else ''}"]
        cells += [f"{np.mean([j.place.residue for j in judgements]):.2f}"]
    return f"| {kind} | " + " | ".join(cells) + " |"


def by_residue(pool: Pool, kind: str, models: Sequence[tuple[str, str]], sizes: Sequence[int], sets: int) -> str:
    """Markdown: the share that the residue flags, and its mean, by random sets of oracles. models: (name, what it is made of)."""
    draws, cells = random.Random(0), []
    for size in sizes:
        flags, residues = [], []
        for name, of in models:
            others = [o for o in pool.oracles if o not in (name, of)]
            for _ in range(sets):
                try:
                    place = pool.place(name, draws.sample(others, size))
                except Unmeasured as error:
                    print(f"{name}: {error}")
                    continue
                flags.append(place.residue_lo > 0)
                residues.append(place.residue)
        by_model = np.mean(np.reshape(flags, (len(models), -1)), axis=1) if len(flags) == len(models) * sets else []
        spread = f" ({min(by_model):.2f} to {max(by_model):.2f})" if len(by_model) else ""
        cells += [f"{np.mean(flags):.3f}{spread}", f"{np.mean(residues):.2f}"]
    return f"| {kind} | {len(models)} | " + " | ".join(cells) + " |"


def residue_table(pool: Pool, args: argparse.Namespace) -> list[str]:
    """The lines of the table of the residue alone."""
    titles = [f"{title}, {size} oracles" for size in args.anchors for title in ("flagged (by model)", "mean residue")]
    lines = ["| candidate | models | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    lines.append(by_residue(pool, "a further oracle", [(o, o) for o in pool.oracles], args.anchors, args.residue))
    for kind, models in candidates(pool, args.copies):
        if kind in args.kinds or not args.kinds:
            for model in models:
                pool.scores(model.name, model.make)
            lines.append(by_residue(pool, kind, [(m.name, m.of) for m in models], args.anchors, args.residue))
    return lines


def main() -> None:
    """Makes and measures the models that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "points"))
    parser.add_argument("--oracles", type=int, default=13)
    parser.add_argument("--copies", type=int, default=3, help="candidates of each kind")
    parser.add_argument("--anchors", type=int, nargs="+", default=[3, 5], help="oracles in a judgement")
    parser.add_argument("--residue", type=int, help="random sets of oracles for each model; no verdicts")
    parser.add_argument("--kinds", nargs="+", default=[], help="with --residue: kinds of candidates, all by default")
    parser.add_argument(
        "--share", type=float, help="share of the error for the mean of the views, in (0, 1); default: the audit's"
    )
    args = parser.parse_args()
    objectives.MEAN_SHARE = args.share or objectives.MEAN_SHARE
    pool = Pool(args.kind, args.oracles, ("audit",) if args.residue else TIERS)
    pool.measure_anchors()
    if args.residue:
        print("\n".join(residue_table(pool, args)))
        return
    head = ["residue", "verdict", "either", "mean residue"]
    titles = [f"{title}, {size} oracles" for size in args.anchors for title in head]
    lines = ["| candidate | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for kind, models in candidates(pool, args.copies):
        for model in models:
            pool.scores(model.name, model.make)
        lines.append(line(pool, kind, models, args.anchors))
        print(lines[-1], flush=True)
    print("\n".join(lines))
    save_lines(RESULTS / f"power-{args.kind}.md", [json.dumps(machine()), "", *lines])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
