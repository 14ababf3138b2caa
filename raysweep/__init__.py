"""raysweep: Pareto sweeps and audits of unlearning methods for diffusion models, on Ray.

The functions below are described in docs/api.md. Importing this package loads nothing but their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysweep.api import (
        audit,
        columns,
        load_model,
        load_task,
        measure,
        open_run,
        run,
        unlearn,
    )
    from raysweep.results.run import Run

__all__ = ["Run", "audit", "columns", "load_model", "load_task", "measure", "open_run", "run", "unlearn"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'raysweep' has no attribute {name!r}")
    if name == "Run":
        from raysweep.results.run import Run

        return Run
    from raysweep import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
