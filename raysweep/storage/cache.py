"""Content-addressed storage of what is made once and used again: base models, oracles, judges, prepared tensors.

An artifact's key hashes everything that it is made from, the source code included, so a stale one is never found.
"""

from __future__ import annotations

import ast
import hashlib
import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.storage.files import StoreError, write_bytes
from raysweep.storage.places import absolute

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]


def cache_folder(configured: Path | None) -> Path:
    """The folder of artifacts that outlive a run: as configured, or RAYSWEEP_CACHE, or ~/.cache/raysweep"""
    chosen = configured or os.environ.get("RAYSWEEP_CACHE")
    return absolute(chosen or Path("~") / ".cache" / "raysweep")


@cache
def code_digest(*patterns: str) -> str:
    """Hash of source files, given as glob patterns below the folder that holds the packages, and of torch's version.

    Raises FileNotFoundError for a pattern that matches nothing: a file that was moved would silently drop out of cache keys.
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
    """Hash of the code that training by the method in `module` depends on: its file, what it imports of `methods`, the
    model handles and the task. Other methods may change without making its artifacts stale."""
    files, waiting = dict[str, bytes](), [module]
    while waiting:
        name = waiting.pop()
        spec = None if name in files else find_spec(name)
        if spec is None or spec.origin is None:
            continue
        files[name] = Path(spec.origin).read_bytes()
        waiting += methods_imported(files[name])
    sha = hashlib.sha256(code_digest("raysweep/models/*.py", "raysweep/tasks/task.py").encode())
    for name in sorted(files):
        sha.update(name.encode() + files[name])
    return sha.hexdigest()[:16]


def methods_imported(source: bytes) -> list[str]:
    """The modules of `methods` that a source file imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "methods":
            found += [f"methods.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("methods."):
            found.append(str(node.module))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("methods.")]
    return found


def judge_code() -> str:
    """Hash of the code that a judge depends on."""
    return code_digest("evaluators/judge.py")


def audit_code() -> str:
    """Hash of raysweep's code that a measurement depends on (see `plugins.audit_code` for other packages')."""
    return code_digest("evaluators/*.py", "raysweep/models/*.py", "raysweep/audit/measure.py", "methods/sld.py")


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors atomically in safetensors format."""
    from safetensors.torch import save

    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file; raises StoreError if it is missing, truncated or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path}: not a readable safetensors file ({error})") from error
