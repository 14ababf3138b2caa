"""What clusters of 8 to 1,000 GPUs give: trials at once, memory of the head, disk and hours of a preset, as its dry run counts.

    python benchmarks/capacity.py                           # prints a Markdown table
    python benchmarks/capacity.py siss-celebahq --trials 200

The clusters are those of cluster.yaml with other numbers of nodes, a quarter of which audit. One node alone does both. Nothing is
run: arithmetic is counted, time is that arithmetic at an assumed share of an H100's peak (`raysweep.planning.forecast`).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import yaml

from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.engine.expectation import expected_nodes
from raysweep.engine.resources import make_plan
from raysweep.planning import footprint
from raysweep.planning.forecast import cluster_file, forecast, images_task, wall_hours
from raysweep.search.spaces import load as load_space

NODES = {8: (1, 0), 32: (3, 1), 256: (24, 8), 1000: (94, 31)}  # GPUs -> nodes that train, nodes that audit
HEAD_GB = 4.0  # Ray's services, the driver and the control actors
SLOT_GB = 0.064  # at most, of each slot and each auditor


def launcher(train: int, audit: int) -> dict[str, Any]:
    """cluster.yaml with so many nodes of each role."""
    content = copy.deepcopy(yaml.safe_load(cluster_file().read_text(encoding="utf-8")))
    content["max_workers"] = train + audit
    content["available_node_types"]["train"]["max_workers"] = train
    content["available_node_types"]["audit"]["max_workers"] = audit
    return content


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="rgd-sd-artist")
    parser.add_argument("--trials", type=int, default=1000)
    arguments = parser.parse_args()
    sweep = load(presets.path_of(arguments.preset), (f"search.trials={arguments.trials}",), absent=True)
    spaces = [load_space(name, sweep.spaces.get(name), images_task(sweep).kind) for name in sweep.methods]
    cost = forecast(sweep, footprint.of(presets.about(arguments.preset).network), spaces)
    print(f"{arguments.preset}, {arguments.trials} trials: {cost.gpu_hours:,.0f} hours of an H100\n")
    print(
        "| GPUs | nodes: train + audit | trials at once | auditors, after the search | head's memory | disk | hours |"
    )
    print("|---|---|---|---|---|---|---|")
    for gpus, (train, audit) in NODES.items():
        plan = make_plan(expected_nodes(launcher(train, audit)), sweep)
        head = HEAD_GB + SLOT_GB * (plan.slots + plan.auditors)
        print(
            f"| {gpus:,} | {f'{train} + {audit}' if audit else '1 that does both'} | {plan.slots} | {plan.auditors}, "
            f"{plan.auditors + plan.late_auditors} | {head:.0f} GB | {cost.disk / 1e12:.1f} TB | {wall_hours(cost, plan):.1f} |"
        )


if __name__ == "__main__":
    main()
