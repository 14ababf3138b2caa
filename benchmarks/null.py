"""False-flag rates of the audit: how often it calls models imperfect that never saw the forgotten data.

    python benchmarks/null.py points                # forget a memorised picture
    python benchmarks/null.py class --oracles 13    # forget a digit

Oracles are retrained from different seeds, and each is judged by disjoint sets of 3 and of 5 of the others, by every kind of
statement of raysweep. A statement at 95 % may be wrong in 5 %; the goal is at most 8 %. Rates come with the exact 95 % interval of a
share; judgements share models, so true intervals are wider. Scores per sample are kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from ground import machine, save_lines
from pool import Judgement, Pool
from unlearning import RESULTS

from evaluators.statistics import clopper_pearson
from raysweep.auditing.anchors import Unmeasured

FLAGGED = ("remembers", "merely avoided", "concealed", "destroyed")
GOAL = 0.08


def judgements(pool: Pool, anchors: int) -> Iterator[tuple[str, Judgement]]:
    """Each oracle by disjoint sets of `anchors` of the others."""
    for k, name in enumerate(pool.oracles):
        others = pool.oracles[k + 1 :] + pool.oracles[:k]
        for i in range(0, len(others) - anchors + 1, anchors):
            try:
                yield name, pool.judge(name, others[i : i + anchors])
            except Unmeasured as error:
                print(f"{name} by {', '.join(others[i : i + anchors])}: {error}")


def statements(judged: Sequence[Judgement]) -> dict[str, list[bool]]:
    """Kind of statement -> whether each judgement makes it, wrongly."""
    kinds = {
        "the 95 % interval of the residue excludes 0": [j.place.residue_lo > 0 for j in judged],
        "the 95 % interval of the damage excludes 0": [j.place.damage_lo > 0 for j in judged],
        "the verdict accuses": [j.verdict.label in FLAGGED for j in judged],
        "an error of the residue is 0": [j.place.residue_se == 0 for j in judged],
    }
    for metric in sorted({m for j in judged for m in j.differences}):
        if "@" not in metric:
            ends = [j.differences[metric] for j in judged if metric in j.differences]
            kinds[f"{metric} differs from the oracles"] = [not low <= 0 <= high for low, high in ends]
    return kinds


def table(pool: Pool, sizes: Sequence[int]) -> str:
    """Markdown: a line per kind of statement, a column per number of anchors; the noise floor; the verdicts."""
    columns = {size: [judgement for _, judgement in judgements(pool, size)] for size in sizes}
    rates = {size: statements(judged) for size, judged in columns.items()}
    lines = ["| a true oracle is flagged because | " + " | ".join(f"{s} anchors" for s in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for kind in dict.fromkeys(kind for by_kind in rates.values() for kind in by_kind):
        lines.append(f"| {kind} | " + " | ".join(_rate(rates[size].get(kind, [])) for size in sizes) + " |")
    for size, judged in columns.items():
        floor = [[j.place.residue, j.place.damage] for j in judged]
        residue, damage = np.quantile(floor, 0.95, axis=0)
        labels = Counter(j.verdict.label for j in judged)
        lines.append("")
        lines.append(
            f"{size} anchors, {len(judged)} judgements of {len(pool.oracles)} oracles: 95 % of them have residue up to {residue:.3f} and "
            f"damage up to {damage:.3f}; verdicts: {', '.join(f'{label} {n}' for label, n in labels.most_common())}."
        )
    return "\n".join(lines)


def _rate(flags: Sequence[bool]) -> str:
    if not flags:
        return "-"
    low, high = clopper_pearson(sum(flags), len(flags))
    mark = "" if np.mean(flags) <= GOAL else " **above the goal**"
    return f"{np.mean(flags):.3f} [{low:.3f}, {high:.3f}]{mark}"


def main() -> None:
    """Makes and measures the models that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "points"))
    parser.add_argument("--oracles", type=int, default=13, help="oracles that are trained, each judged by the others")
    parser.add_argument("--anchors", type=int, nargs="+", default=[3, 5], help="oracles in a judgement")
    args = parser.parse_args()
    pool = Pool(args.kind, args.oracles)
    pool.measure_anchors()
    text = table(pool, args.anchors)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    save_lines(RESULTS / f"null-{args.kind}.md", [json.dumps(machine()), "", text])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
