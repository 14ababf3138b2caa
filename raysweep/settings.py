"""Marks the settings on which no result depends; names the time limits; the fewest oracles that show their spread."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

# Annotates a setting of location, speed, time limits or display. It is not part of a sweep's digest, and may change when a run is
# resumed.
ASIDE = "aside"

# Settings that limit the time of a trial or an audit.
BUDGET = "train.budget_s"
TIMEOUT = "audit.timeout_s"
DISK = "disk"  # ends a trial as a limit does: there was no room for its files

ORACLES = 3  # fewest oracles whose spread is known well enough for useful intervals


def asides(model: BaseModel) -> dict[str, Any]:
    """The settings marked `ASIDE` of a model and of the models in it, in the form of `exclude` of `model_dump`."""
    excluded: dict[str, Any] = {}
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if ASIDE in field.metadata:
            excluded[key] = True
        elif isinstance(value, BaseModel):
            excluded[key] = asides(value)
    return {key: value for key, value in excluded.items() if value}
