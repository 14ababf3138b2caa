"""What clusters of 8 to 1,000 GPUs give: trials at once, use of the slots, disk and hours of a preset, as its dry run counts.

    python benchmarks/capacity.py                           # prints a Markdown table
    python benchmarks/capacity.py siss-celebahq --trials 200

The clusters are those of cluster.yaml with other numbers of nodes, a quarter of which audit. One node alone does both. Nothing is
run: arithmetic is counted, time is that arithmetic at an assumed share of an H100's peak (`raysweep.planning.forecast`), and the use
of the slots is simulated.
"""

from __future__ import annotations

import argparse

from raysweep.config import presets
from raysweep.config.reader import load
from raysweep.engine.arrival import expected_nodes
from raysweep.engine.resources import make_plan
from raysweep.planning import footprint
from raysweep.planning.forecast import disk_of, forecast, images_task, timeline, wall_hours
from raysweep.search.spaces import load as load_space

NODES = {8: (1, 0), 32: (3, 1), 256: (24, 8), 1000: (94, 31)}  # GPUs -> nodes that train, nodes that audit
HEAD_GB = 4.0  # Ray's services, the driver and the two desks
SLOT_GB = 0.064  # of the head, at most, for each slot and each auditor


def expectation(train: int, audit: int) -> str:
    """The setting that expects so many nodes of each role, or nodes that do both."""
    node = "cpus: 192, gpus: 8"
    both = f"any: {{nodes: {train}, {node}}}"
    apart = f"train: {{nodes: {train}, {node}}}, audit: {{nodes: {audit}, {node}}}"
    return f"resources.expect={{{apart if audit else both}}}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="rgd-sd-artist")
    parser.add_argument("--trials", type=int, default=1000)
    arguments = parser.parse_args()
    network = footprint.of(presets.about(arguments.preset).network)
    print(
        "| GPUs | nodes: train + audit | slots + auditors | slots busy | auditors after the search | head's memory | disk | hours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for gpus, (train, audit) in NODES.items():
        settings = (f"search.trials={arguments.trials}", expectation(train, audit))
        sweep = load(presets.path_of(arguments.preset), settings, absent=True)
        spaces = [load_space(name, sweep.spaces.get(name), images_task(sweep).kind) for name in sweep.methods]
        cost, plan = forecast(sweep, network, spaces), make_plan(expected_nodes(sweep), sweep)
        search = timeline(sweep, network, spaces, plan)
        head = HEAD_GB + SLOT_GB * (plan.slots + plan.auditors)
        print(
            f"| {gpus:,} | {f'{train} + {audit}' if audit else '1 that does both'} | {search.slots} + "
            f"{plan.slots + plan.auditors - search.slots} | {search.busy:.0%} | {plan.auditors + plan.late_auditors} | {head:.0f} GB | {disk_of(sweep, network, plan).search / 1e12:.1f} TB | "
            f"{wall_hours(cost, plan, search):.1f} |"
        )
    print(f"\n{arguments.preset}, {arguments.trials} trials: {cost.gpu_hours:,.0f} hours of an H100")


if __name__ == "__main__":
    main()
