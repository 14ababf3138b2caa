"""Time that shared prepared tensors save: training time of a SLUG sweep with the two gradients computed once, or per trial.

    python benchmarks/sharing.py [trials]

Runs the same (layer, step) trials of SLUG on the digits' class task twice, in this process: once with one preparation for
all of them, once with a preparation for each. Prints seconds, their ratio, the gradient passes that were made, machine and
versions. Model loading is not counted: both need it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ground import Ground, machine

import methods.slug
from methods.slug import SLUG, SLUGSettings

PASSES = 32


def main() -> None:
    """Times both ways and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="?", default=100)
    trials = parser.parse_args().trials
    ground = Ground("task=digits-class")
    base, task = ground.model("base"), ground.task
    settings = SLUGSettings(batch_size=64, passes=PASSES)
    passes = counted()
    started = time.perf_counter()
    prepared = SLUG.prepare(base, task, 0, settings)
    once = time.perf_counter() - started
    layers = SLUG.choices("layer", prepared, settings)
    edits = [edit(ground, prepared, layers[k % len(layers)], 0.02 * 1.05**k) for k in range(trials)]
    shared, shared_passes = once + sum(edits), passes[0]
    repeats = [timed_preparation(ground, settings) for _ in range(3)]
    alone = trials * sum(repeats) / len(repeats) + sum(edits)
    print(
        json.dumps(
            {
                "trials": trials,
                "gradient_passes_shared": shared_passes,
                "preparation_s": once,
                "edit_s": {"mean": sum(edits) / trials, "max": max(edits)},
                "repeated_preparation_s": {"mean": sum(repeats) / 3, "min": min(repeats), "max": max(repeats), "n": 3},
                "shared_s": shared,
                "alone_s": alone,
                "ratio": alone / shared,
            }
            | machine(),
            indent=2,
        )
    )


def edit(ground: Ground, prepared: dict[str, Any], layer: str, step: float) -> float:
    """Seconds of one trial's edit."""
    model = ground.model("base")
    started = time.perf_counter()
    method = SLUG(
        model, SLUGSettings(layer=layer, step=min(step, 8.0), batch_size=64, passes=PASSES), prepared, ground.task.goal
    )
    method.step({})
    method.finish()
    return time.perf_counter() - started


def timed_preparation(ground: Ground, settings: SLUGSettings) -> float:
    """Seconds of one preparation."""
    model = ground.model("base")
    started = time.perf_counter()
    SLUG.prepare(model, ground.task, 0, settings)
    return time.perf_counter() - started


def counted() -> list[int]:
    """Counts the gradient passes from now on."""
    count, real = [0], methods.slug.gradient_pass

    def passing(*args: Any) -> Any:
        count[0] += 1
        return real(*args)

    methods.slug.gradient_pass = passing
    return count


if __name__ == "__main__":
    main()
