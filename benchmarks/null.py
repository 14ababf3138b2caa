"""False-flag rates of the audit: how often it calls models imperfect that never saw the forgotten data.

    python benchmarks/null.py points                # forget a memorised picture
    python benchmarks/null.py class --oracles 13    # forget a digit

Oracles are retrained from different seeds, and each is judged by disjoint sets of 3 and of 5 of the others, by every kind of
statement of raysweep. A statement at 95 % may be wrong in 5 %; the goal is at most 8 %. Rates come with the exact 95 % interval of a
share; judgements share models, so true intervals are wider. A rate above the goal therefore comes with its probability by chance: how
often a metric whose oracles are normally distributed, for which 5 % is exact, gives at least this rate in the same judgements. The mean
rate of all metrics, with a Student interval over the oracles, is known best. Scores per sample are kept in `benchmarks/results/`.
`--without-attacks` leaves out the verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from ground import machine, save_lines
from pool import TIERS, Judgement, Pool
from scipy import stats
from unlearning import RESULTS

from evaluators.statistics import LEVEL, clopper_pearson, t_interval
from raysweep.auditing.anchors import Unmeasured

FLAGGED = ("remembers", "merely avoided", "concealed", "destroyed")
GOAL = 0.08


def design(oracles: int, anchors: int) -> Iterator[tuple[int, list[int]]]:
    """The index of each oracle with those of the disjoint sets of `anchors` of the others that judge it."""
    for k in range(oracles):
        others = [*range(k + 1, oracles), *range(k)]
        for i in range(0, len(others) - anchors + 1, anchors):
            yield k, others[i : i + anchors]


def judgements(pool: Pool, anchors: int) -> Iterator[tuple[str, Judgement]]:
    """Each oracle by disjoint sets of `anchors` of the others."""
    for k, by in design(len(pool.oracles), anchors):
        name, others = pool.oracles[k], [pool.oracles[i] for i in by]
        try:
            yield name, pool.judge(name, others)
        except Unmeasured as error:
            print(f"{name} by {', '.join(others)}: {error}")


def rates_by_chance(oracles: int, anchors: int, tables: int = 2000) -> np.ndarray:
    """False-flag rates (tables,) of one metric whose oracles are normally distributed, in the judgements of `design`."""
    x, flags = np.random.default_rng(0).normal(size=(oracles, tables)), []
    for k, by in design(oracles, anchors):
        error = x[by].std(0, ddof=1) * np.sqrt(1 + 1 / anchors)
        flags.append(np.abs(x[k] - x[by].mean(0)) > error * stats.t.isf((1 - LEVEL) / 2, anchors - 1))
    rates: np.ndarray = np.mean(flags, axis=0)
    return rates


def statements(judged: Sequence[Judgement]) -> dict[str, list[bool]]:
    """Kind of statement -> whether each judgement makes it, wrongly."""
    kinds = {
        "the 95 % interval of the residue excludes 0": [j.place.residue_lo > 0 for j in judged],
        "the 95 % interval of the damage excludes 0": [j.place.damage_lo > 0 for j in judged],
        "the verdict accuses": [j.verdict.label in FLAGGED for j in judged if j.verdict is not None],
        "an error of the residue is 0": [j.place.residue_se == 0 for j in judged],
    }
    for metric in sorted({m for j in judged for m in j.differences}):
        if "@" not in metric:
            ends = [j.differences[metric] for j in judged if metric in j.differences]
            kinds[f"{metric} differs from the oracles"] = [not low <= 0 <= high for low, high in ends]
    return kinds


def table(pool: Pool, sizes: Sequence[int]) -> str:
    """Markdown: a line per kind of statement, a column per number of anchors; the noise floor; the verdicts."""
    named = {size: list(judgements(pool, size)) for size in sizes}
    columns = {size: [judgement for _, judgement in pairs] for size, pairs in named.items()}
    rates = {size: statements(judged) for size, judged in columns.items()}
    by_chance = {size: rates_by_chance(len(pool.oracles), size) for size in sizes}
    lines = ["| a true oracle is flagged because | " + " | ".join(f"{s} anchors" for s in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for kind in dict.fromkeys(kind for by_kind in rates.values() for kind in by_kind):
        cells = [_rate(rates[size].get(kind, []), by_chance[size]) for size in sizes]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| a metric differs, mean of all | " + " | ".join(_mean_rate(named[size]) for size in sizes) + " |")
    for size, judged in columns.items():
        floor = [[j.place.residue, j.place.damage] for j in judged]
        residue, damage = np.quantile(floor, 0.95, axis=0)
        labels = Counter(j.verdict.label for j in judged if j.verdict is not None)
        said = "; verdicts: " + ", ".join(f"{label} {n}" for label, n in labels.most_common()) if labels else ""
        lines.append("")
        lines.append(
            f"{size} anchors, {len(judged)} judgements of {len(pool.oracles)} oracles: 95 % of them have residue up to {residue:.3f} and "
            f"damage up to {damage:.3f}{said}."
        )
    return "\n".join(lines)


def _rate(flags: Sequence[bool], by_chance: np.ndarray) -> str:
    if not flags:
        return "-"
    rate, (low, high) = float(np.mean(flags)), clopper_pearson(sum(flags), len(flags))
    mark = "" if rate <= GOAL else f" **above the goal** (by chance {np.mean(by_chance >= rate):.2f})"
    return f"{rate:.3f} [{low:.3f}, {high:.3f}]{mark}"


def _mean_rate(named: Sequence[tuple[str, Judgement]]) -> str:
    """The rate at which a metric differs, over all metrics and judgements, with a 95 % interval over the oracles."""
    by_oracle: dict[str, list[bool]] = {}
    for name, judgement in named:
        ends = [ends for metric, ends in judgement.differences.items() if "@" not in metric]
        by_oracle.setdefault(name, []).extend(not low <= 0 <= high for low, high in ends)
    shares = [float(np.mean(flags)) for flags in by_oracle.values()]
    _, low, high = t_interval(np.array(shares))
    return f"{np.mean(shares):.3f} [{max(low, 0):.3f}, {high:.3f}]"


def main() -> None:
    """Makes and measures the models that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "points"))
    parser.add_argument("--oracles", type=int, default=13, help="oracles that are trained, each judged by the others")
    parser.add_argument("--anchors", type=int, nargs="+", default=[3, 5], help="oracles in a judgement")
    parser.add_argument("--without-attacks", action="store_true", help="no verdicts")
    args = parser.parse_args()
    pool = Pool(args.kind, args.oracles, ("audit",) if args.without_attacks else TIERS)
    pool.measure_anchors()
    text = table(pool, args.anchors)
    print(text)
    if args.without_attacks:
        return
    RESULTS.mkdir(exist_ok=True)
    save_lines(RESULTS / f"null-{args.kind}.md", [json.dumps(machine()), "", text])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
