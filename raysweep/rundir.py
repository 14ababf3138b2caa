"""The directory of a run: its layout, its manifest, and the rules that keep two runs or two configs from mixing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raysweep.config.reader import validate as validate_config
from raysweep.config.schema import ConfigError, Sweep
from raysweep.plugins import used
from raysweep.storage.cache import cache_folder
from raysweep.storage.code_digests import ROOT
from raysweep.storage.files import CHECKPOINT, DAY_S, clear_temporaries, write_bytes, write_json
from raysweep.storage.places import PlaceError, check_writable
from raysweep.storage.texts import load_yaml

PACKAGES = (
    "raysweep", "torch", "ray", "optuna", "diffusers", "torch-fidelity", "numpy", "scipy", "pyarrow", "moocore",
    "open-clip-torch", "transformers", "torchdiffeq",
)  # fmt: skip


MONTH_S = 30 * DAY_S


class RunDir:
    """Paths of a run. Nothing is created before `claim`."""

    def __init__(self, path: Path):
        self.path = path.absolute()

    @classmethod
    def of(cls, sweep: Sweep) -> RunDir:
        return cls(sweep.storage / sweep.name)

    config = property(lambda self: self.path / "config.yaml")
    manifest = property(lambda self: self.path / "manifest.json")
    journal = property(lambda self: self.path / "study.journal")
    trials = property(lambda self: self.path / "trials.parquet")
    rows = property(lambda self: self.path / "rows")
    scores = property(lambda self: self.path / "scores")
    prepared = property(lambda self: self.path / "prepared")
    task = property(lambda self: self.path / "prepared" / "task")
    context = property(lambda self: self.path / "prepared" / "context.json")
    candidates = property(lambda self: self.path / "candidates")
    front_json = property(lambda self: self.path / "front.json")
    front_table = property(lambda self: self.path / "front.parquet")
    report = property(lambda self: self.path / "report.html")
    figures = property(lambda self: self.path / "figures")

    def anchors(self, tier: str) -> Path:
        """Where a tier's anchors and views are."""
        return self.prepared / f"anchors-{tier}.json"

    def exists(self) -> bool:
        return self.manifest.is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; raises ConfigError if this is not a run."""
        if not self.exists():
            raise ConfigError(f"{self.path}: not a run directory (manifest.json is missing)")
        return json.loads(self.manifest.read_text())

    @property
    def run_id(self) -> str:
        """Names the run's study, actors and jobs, as when the run began: settings that raysweep has learnt since would change it."""
        manifest = self.read_manifest()
        return f"{manifest['name']}-{manifest['config_digest'][:8]}"

    @property
    def commits(self) -> list[str]:
        """The commits of raysweep that the run began at and was resumed at, in order."""
        manifest = self.read_manifest()
        return manifest.get("commits", [manifest["commit"]])

    def sweep(self) -> Sweep:
        """The resolved config of the run."""
        self.read_manifest()
        text = self.config.read_text()
        return validate_config(load_yaml(text), str(self.config), text, stored=True)

    def check(self, sweep: Sweep, task: str = "") -> None:
        """Raises ConfigError if the directory holds something else than this sweep. task: hash of its task; "" if not known."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: exists and is not a folder")
        try:
            check_writable(self.path, "choose another storage, for example storage=FOLDER")
            check_writable(cache_folder(sweep.cache), "choose another cache: RAYSWEEP_CACHE=FOLDER, or cache=FOLDER")
        except PlaceError as error:
            raise ConfigError(str(error)) from error
        if not self.exists():
            if self.path.is_dir() and any(p.name != "lock" for p in self.path.iterdir()):
                raise ConfigError(f"{self.path}: not empty and not a run; choose another name or storage")
            return
        manifest = self.read_manifest()
        if manifest["config_digest"] != sweep.digest:
            old, new = _flat(self.sweep().decisive()), _flat(sweep.decisive())
            keys = sorted(set(old) | set(new))
            changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)][:3]
            raise ConfigError(
                f"{self.path}: belongs to a run of another config ({'; '.join(changed) or 'made by another version'}); "
                "choose another name, for example name=" + sweep.name + "-2"
            )
        began = manifest["digests"].get("task", task)
        if task and began != task:  # the run keeps the task's data of its beginning, and would measure on them
            raise ConfigError(
                f"{self.path}: began with other data: its task has the hash {began}, and what the config names gives {task}; "
                f"restore the data, or choose another name, for example name={sweep.name}-2"
            )

    @contextlib.contextmanager
    def claim(self, sweep: Sweep, digests: dict[str, str], checks: tuple[str, ...] = ()) -> Iterator[None]:
        """Holds the directory for this process; raises ConfigError if another one has it or it holds another config.

        digests, checks: of the config and the task, and of all tiers, for the manifest of a new run. A run that is there must have
        the same task.
        """
        self.check(sweep, digests.get("task", ""))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / "lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{self.path}: another raysweep run is at work on this directory") from error
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            self.check(sweep, digests.get("task", ""))
            clear_temporaries(self.path)
            clear_temporaries(cache_folder(sweep.cache), DAY_S)  # other runs write there too
            clear_temporaries(cache_folder(sweep.cache), MONTH_S, CHECKPOINT)
            text = ("# resolved config of this run\n" + sweep.recipe()).encode()
            if not self.config.is_file() or self.config.read_bytes() != text:  # other limits, resources, places
                write_bytes(self.config, text)
            if not self.exists():
                write_json(self.manifest, _manifest(sweep, digests, checks))
            self.update(state="running", pid=os.getpid(), resumed_at=now())
            yield
        finally:
            clear_temporaries(self.path)  # also what processes of a killed run were at when this one began
            lock.release()

    def update(self, **changes: Any) -> None:
        """Changes entries of the manifest."""
        write_json(self.manifest, self.read_manifest() | changes)


def list_runs(storage: Path) -> list[RunDir]:
    """All runs below a storage folder, by name."""
    return [RunDir(p.parent) for p in sorted(storage.glob("*/manifest.json"))]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from source" if name == "raysweep" else "missing"
    return found


def git_commit() -> str:
    """The commit of the source tree, with "+changes" if it was changed since; "unknown" outside of a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _manifest(sweep: Sweep, digests: dict[str, str], checks: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": sweep.name,
        "config_digest": sweep.digest,
        "digests": digests,
        "seeds": {"search": sweep.search.seed, "probe": sweep.audit.probe.seed, "audit": sweep.audit.audit.seed},
        "versions": versions(),
        "plugins": used(method=sweep.methods, evaluator=checks, task=[sweep.task.name], sampler=[sweep.search.sampler]),
        "commit": git_commit(),
        "created_at": now(),
        "state": "new",
    }


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def now() -> str:
    """The local time in ISO format, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
