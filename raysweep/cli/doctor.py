"""Checks of the machine for `raysweep doctor`: versions, memory, disk, ports, installation, access to Ray."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil

from raysweep.rundir import PACKAGES, versions
from raysweep.storage.cache import cache_folder
from raysweep.storage.code_digests import ROOT
from raysweep.storage.places import PlaceError, ray_folder

GIGABYTE = 1024**3
MEMORY_GB = 6  # peak of the embedded sweep
DISK_GB = 2  # cache and run of the embedded sweep
SHM_GB = 0.5
PORTS = {6379: "Ray head", 8265: "Ray dashboard and jobs"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. level: ok, warn or fail."""

    name: str
    level: str
    text: str


def examine() -> list[Finding]:
    """Runs all checks, in the order in which they are shown."""
    return [
        _python(),
        *_packages(),
        _torch(),
        _memory(),
        _disk(),
        _shm(),
        _temporary(),
        *_ports(),
        _install(),
        _token(),
    ]


def _python() -> Finding:
    level = "ok" if sys.version_info >= (3, 11) else "fail"
    return Finding("python", level, f"{sys.version.split()[0]} (3.11 or later is needed)")


def _packages() -> list[Finding]:
    installed = versions()
    missing = [name for name, version in installed.items() if version == "missing"]
    if missing:
        return [Finding("packages", "fail", f"not installed: {', '.join(missing)}; run pip install -e .")]
    broken = []
    for module in ("ray.tune", "ray.train", "diffusers", "torch_fidelity", "moocore", "pyarrow"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            broken.append(f"{module} ({error})")
    if broken:
        return [Finding("packages", "fail", f"do not import: {'; '.join(broken)}")]
    return [Finding("packages", "ok", ", ".join(f"{name} {installed[name]}" for name in PACKAGES[1:]))]


def _torch() -> Finding:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        import torchvision

        vision = f"torchvision {torchvision.__version__}"
    except (ImportError, RuntimeError) as error:
        return Finding("torch", "fail", f"torchvision does not work with torch {torch.__version__}: {error}")
    return Finding("torch", "ok", f"{torch.__version__}, {vision}, {gpus} GPUs, {os.cpu_count()} CPUs")


def _memory() -> Finding:
    free = psutil.virtual_memory().available / GIGABYTE
    level = "ok" if free >= MEMORY_GB else "warn"
    return Finding("memory", level, f"{free:.1f} GB available (the embedded sweep takes up to {MEMORY_GB} GB)")


def _disk() -> Finding:
    folder = cache_folder(None)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIGABYTE
    if not os.access(folder, os.W_OK):
        return Finding("disk", "fail", f"the cache folder {cache_folder(None)} cannot be written")
    return Finding(
        "disk", "ok" if free >= DISK_GB else "fail", f"{free:.1f} GB free for the cache {cache_folder(None)}"
    )


def _shm() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "ok", "not present; Ray uses temporary files")
    free = shutil.disk_usage(path).free / GIGABYTE
    text = f"{free:.1f} GB free" + ("" if free >= SHM_GB else "; in Docker start with --shm-size=1g or more")
    return Finding("/dev/shm", "ok" if free >= SHM_GB else "warn", text)


def _temporary() -> Finding:
    """The folder in which a local Ray keeps its sockets and logs."""
    try:
        return Finding("temporary", "ok", f"{ray_folder()} is short enough for Ray's sockets and can be written")
    except PlaceError as error:
        return Finding("temporary", "fail", str(error))


def _ports() -> list[Finding]:
    findings = []
    for port, use in PORTS.items():
        with socket.socket() as connection:
            taken = connection.connect_ex(("127.0.0.1", port)) == 0
        text = f"in use: is another {use} running?" if taken else f"free ({use})"
        findings.append(Finding(f"port {port}", "warn" if taken else "ok", text))
    return findings


def _install() -> Finding:
    """Whether one copy of raysweep is used: workers would import an old wheel instead of the checkout."""
    import methods

    imported = Path(str(methods.__file__)).resolve().parent.parent
    if imported != ROOT:
        return Finding(
            "install", "fail", f"methods comes from {imported}, raysweep from {ROOT}: reinstall with pip install -e ."
        )
    try:
        location = Path(str(distribution("raysweep").locate_file(""))).resolve()
    except PackageNotFoundError:
        return Finding("install", "ok", f"not installed; used from {ROOT}")
    if (location / "raysweep").is_dir() and location != ROOT:
        return Finding("install", "fail", f"old copy in {location}: pip uninstall raysweep, then pip install -e .")
    return Finding("install", "ok", f"used from {ROOT}")


def _token() -> Finding:
    """Whether Ray asks for a token: its jobs API runs any code that it is sent."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return Finding("ray token", "warn", "RAY_AUTH_MODE=disabled: anyone who reaches the jobs API can run code")
    return Finding("ray token", "ok", "token authentication is not switched off")
