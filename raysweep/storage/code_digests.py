"""Hashes of source code, as parts of cache keys: a changed source file makes what was computed with it stale."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the packages


@cache
def code_digest(*patterns: str) -> str:
    """Hash of the source files that match glob patterns below `ROOT`, and of torch's version.

    Raises FileNotFoundError for a pattern that matches nothing: a moved file would silently drop out of cache keys.
    """
    sha = hashlib.sha256(version("torch").encode())
    for pattern in patterns:
        files = sorted(ROOT.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no source file matches {pattern} below {ROOT}")
        for path in files:
            sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


@cache
def training_code(module: str) -> str:
    """Hash of the code that training by the method in `module` depends on.

    That is its file, the modules of `methods` that it imports, directly or not, the model handles, the task and the training
    loop. Other methods may change without making its artifacts stale.
    """
    sources, to_visit = dict[str, bytes](), [module]
    while to_visit:
        name = to_visit.pop()
        spec = None if name in sources else find_spec(name)
        if spec is None or spec.origin is None:
            continue
        sources[name] = Path(spec.origin).read_bytes()
        to_visit += methods_imported(sources[name])
    sha = hashlib.sha256(
        code_digest("raysweep/models/**/*.py", "raysweep/tasks/task.py", "raysweep/train/unlearning.py").encode()
    )
    for name in sorted(sources):
        sha.update(name.encode() + sources[name])
    return sha.hexdigest()[:16]


def methods_imported(source: bytes) -> list[str]:
    """The modules of `methods` that a source file imports."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "methods":
            modules += [f"methods.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("methods."):
            modules.append(str(node.module))
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names if alias.name.startswith("methods.")]
    return modules


def judge_code() -> str:
    """Hash of the code that a judge depends on."""
    return code_digest("evaluators/judge.py")


def audit_code() -> str:
    """Hash of raysweep's code that a measurement depends on (`plugins.audit_code` adds that of other packages)."""
    return code_digest("evaluators/*.py", "raysweep/models/**/*.py", "raysweep/auditing/measure.py")
