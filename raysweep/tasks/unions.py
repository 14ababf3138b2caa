"""Unions of settings that are discriminated by which key is present, such as `folder`, `parquet` or `shards` of a source.

An error is then reported for the one model that the keys select, not for every member of the union.
"""

from __future__ import annotations

from typing import Any

from pydantic import Discriminator

OPEN = "<"  # prefix of union tags in pydantic's error locations; no setting's name begins with it


def tag(key: str) -> str:
    """The union tag of the model that has `key`."""
    return f"{OPEN}{key}>"


def by_key(*keys: str) -> Discriminator:
    """Selects from a union of models, tagged with `tag(key)`, the one whose key is present."""

    def tag_of(value: Any) -> str | None:
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        present = [key for key in keys if key in fields]
        return tag(present[0]) if len(present) == 1 else None

    return Discriminator(
        tag_of, custom_error_type="kind", custom_error_message=f"needs exactly one of the keys {', '.join(keys)}"
    )
