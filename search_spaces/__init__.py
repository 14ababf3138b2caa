"""Search spaces as data: one YAML file per method, of the same stem."""

from importlib.resources import files

import yaml


def names() -> list[str]:
    """Methods that have a space."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def read(method: str) -> dict:
    """The space of a method as plain data; raises FileNotFoundError if there is none."""
    return yaml.safe_load(files(__name__).joinpath(f"{method}.yaml").read_text(encoding="utf-8"))
