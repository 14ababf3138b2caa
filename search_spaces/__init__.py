"""Search spaces as data: METHOD.yaml for each method, `released/` with values from papers and their code, and `presets/`."""

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

import yaml


def names() -> list[str]:
    """Names of the methods that have a search space, sorted."""
    return _stems(files(__name__))


def read(method: str) -> dict:
    """The search space of a method as plain data; raises FileNotFoundError if there is none."""
    return _parsed(files(__name__).joinpath(f"{method}.yaml"))


def tables() -> list[str]:
    """Names of the tables in `released/`, sorted."""
    return _stems(files(__name__).joinpath("released"))


@cache
def released(table: str) -> dict:
    """A table in `released/`, as plain data; raises FileNotFoundError if there is none."""
    return _parsed(files(__name__).joinpath("released", f"{table}.yaml"))


def _stems(folder: Traversable) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def _parsed(file: Traversable) -> dict:
    # libyaml's parser, where PyYAML was built with it, is several times as fast
    return yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
