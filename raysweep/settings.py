"""Marks settings that no result depends on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

# In the annotation of a setting: it says where, how fast or for how long something is done, or how it is shown, and not what
# comes out. Such a setting is no part of a sweep's digest and may be another one when a run is resumed.
ASIDE = "aside"

# Limits of time, by the setting that a user raises.
BUDGET = "train.budget_s"
TIMEOUT = "audit.timeout_s"


def asides(model: BaseModel) -> dict[str, Any]:
    """The settings of a model, and of the models in it, that are marked `ASIDE`, as `exclude` of `model_dump` takes them."""
    found: dict[str, Any] = {}
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if ASIDE in field.metadata:
            found[key] = True
        elif isinstance(value, BaseModel):
            found[key] = asides(value)
    return {key: value for key, value in found.items() if value}
