"""Search spaces as data: METHOD.yaml for each method, `released/` with values from papers and their code, and `presets/`."""

from functools import cache
from importlib.resources import files

import yaml


def names() -> list[str]:
    """Names of the methods that have a search space, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def read(method: str) -> dict:
    """The search space of a method as plain data; raises FileNotFoundError if there is none."""
    return yaml.safe_load(files(__name__).joinpath(f"{method}.yaml").read_text(encoding="utf-8"))


@cache
def released() -> dict:
    """File stem in `released/` -> its table, as plain data."""
    tables = sorted((f for f in files(__name__).joinpath("released").iterdir() if f.name.endswith(".yaml")), key=str)
    return {f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text(encoding="utf-8")) for f in tables}
