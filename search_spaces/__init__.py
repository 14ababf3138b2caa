"""Search spaces as data: one YAML file per method, of the same stem; `released/` holds what papers and released code state."""

from functools import cache
from importlib.resources import files

import yaml


def names() -> list[str]:
    """Methods that have a space."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def read(method: str) -> dict:
    """The space of a method as plain data; raises FileNotFoundError if there is none."""
    return yaml.safe_load(files(__name__).joinpath(f"{method}.yaml").read_text(encoding="utf-8"))


@cache
def released() -> dict:
    """Name of a paper -> its table of released values, as plain data."""
    tables = files(__name__).joinpath("released")
    found = sorted(f.name for f in tables.iterdir() if f.name.endswith(".yaml"))
    return {n.removesuffix(".yaml"): yaml.safe_load(tables.joinpath(n).read_text(encoding="utf-8")) for n in found}
