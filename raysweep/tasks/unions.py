"""Settings of several kinds that are told apart by the key that only one of them has.

A mistake is then explained by that kind alone, not by all that it is not.
"""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator

OPEN = "<"  # what a kind's tag begins with in the place of an error, where settings have none


def tag(key: str) -> str:
    """The name of the kind that has `key`."""
    return f"{OPEN}{key}>"


def by_key(*keys: str) -> Discriminator:
    """Picks from a union of models, tagged with `tag(key)`, the one whose key is given."""

    def which(value: Any) -> str | None:
        given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        found = [key for key in keys if key in given]
        return tag(found[0]) if len(found) == 1 else None

    return Discriminator(
        which, custom_error_type="kind", custom_error_message=f"needs exactly one of the keys {', '.join(keys)}"
    )
