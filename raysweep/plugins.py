"""The origin of what other packages offer through entry points, and hashes of its code for cache keys.

A package is hashed whole (bytecode aside), because nothing says which of its files a result depends on. The files of `methods`
that it imports are hashed with it, and what these import in turn.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from raysweep.registry import FAMILIES, external, module_of, provider
from raysweep.storage import code_digests

BYTECODE = (".pyc", ".pyo")


def method_code(name: str) -> str:
    """Hash of the code that training by a method depends on."""
    points = external("method").get(name)
    if not points:
        return code_digests.training_code(module_of("method", name))
    return _digest(package_digest(points[0]), *(code_digests.training_code(m) for m in methods_behind(points[0])))


def family_code(name: str) -> str:
    """Hash of the code that handles the models of another package's family; "" for raysweep's own, which other hashes cover."""
    points = external("family").get(name)
    return package_digest(points[0]) if points else ""


def audit_code(checks: Iterable[str]) -> str:
    """Hash of the code that measuring by `checks` depends on.

    Raises UnknownName if the package of a check is not installed.
    """
    installed, names = external("evaluator"), sorted(set(checks))
    for name in names:
        module_of("evaluator", name)
    packages = {name: package_digest(installed[name][0]) for name in names if name in installed}
    # what a family's models are and offer decides which checks apply to them
    families = {name: (record.model_kind, sorted(record.abilities)) for name, record in FAMILIES.items()}
    return _digest(code_digests.audit_code(), families, packages)


def used(**names: Iterable[str]) -> dict[str, str]:
    """The packages behind those names, by kind, that are not raysweep's own: "method NAME" -> "PACKAGE VERSION"."""
    return {
        f"{kind} {name}": provider(external(kind)[name][0])
        for kind in names
        for name in dict.fromkeys(names[kind])
        if name in external(kind)
    }


def package_digest(point: EntryPoint) -> str:
    """Hash of the files of the package that offers an entry point: of its outermost folder that is no namespace (or its
    module), and of those that the installed distribution lists."""
    return files_digest(point.module, tuple(sorted(_listed(point).items())))


@cache
def files_digest(module: str, listed: tuple[tuple[str, Path], ...]) -> str:
    """Hash of the files of a module's outermost package and of `listed` (name, file), kept: many cache keys ask for it."""
    sha = hashlib.sha256()
    for name, path in sorted({**dict(listed), **_sources(module)}.items()):
        with path.open("rb") as file:
            sha.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def _sources(module: str) -> dict[str, Path]:
    """The files of a module's outermost package, by name."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:depth]))
        if spec is None:
            return {}
        if spec.submodule_search_locations is None:
            return {} if spec.origin is None else {Path(spec.origin).name: Path(spec.origin)}
        if spec.origin is not None:  # a namespace has none, and other packages' files
            folders = [Path(folder) for folder in spec.submodule_search_locations]
            return {
                f"{folder.name}/{path.relative_to(folder).as_posix()}": path
                for folder in folders
                for path in folder.rglob("*")
                if path.is_file() and path.suffix not in BYTECODE
            }
    return {}


def _listed(point: EntryPoint) -> dict[str, Path]:
    """The files that the distribution of an entry point lists, without its metadata; {} if it lists none."""
    distribution = getattr(point, "dist", None)
    files = (distribution.files or []) if distribution is not None else []
    paths = {file.as_posix(): Path(str(file.locate())) for file in files}
    return {
        name: path
        for name, path in paths.items()
        if ".dist-info/" not in name and path.suffix not in BYTECODE and path.is_file()
    }


def methods_behind(point: EntryPoint) -> list[str]:
    """The modules of `methods` that the files of an entry point's package import, sorted."""
    files = {**_listed(point), **_sources(point.module)}
    sources = (path.read_bytes() for path in files.values() if path.suffix == ".py")
    return sorted({module for source in sources for module in code_digests.methods_imported(source)})


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
