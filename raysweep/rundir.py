"""The directory of a run: its layout, its manifest, and the checks that keep it to one config, one task and one process."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

from raysweep.config.reader import validate as validate_config
from raysweep.config.schema import ConfigError, Drawn, Sweep
from raysweep.plugins import used
from raysweep.storage.cache import cache_folder
from raysweep.storage.claims import LOCK, RECORD, ClaimError, claimed
from raysweep.storage.code_digests import ROOT
from raysweep.storage.files import CHECKPOINT, DAY_S, clear_temporaries, write_bytes, write_json
from raysweep.storage.places import PlaceError, check_writable
from raysweep.storage.texts import load_yaml

if TYPE_CHECKING:
    from raysweep.tasks.records import Account

PACKAGES = (
    "raysweep",
    "torch",
    "ray",
    "optuna",
    "diffusers",
    "torch-fidelity",
    "numpy",
    "scipy",
    "pyarrow",
    "moocore",
    "open-clip-torch",
    "transformers",
    "torchdiffeq",
)
MONTH_S = 30 * DAY_S
STORAGE = Path("runs")  # where runs are looked for by name


class Changes(TypedDict, total=False):
    """Entries of a manifest that change during a run."""

    state: str  # new, running, done, incomplete, failed or interrupted
    reason: str  # why it failed
    incomplete: list[str]  # checks that failed or are missing
    host: str  # of the process that works or worked last on it
    pid: int
    resumed_at: str
    commits: list[str]  # of raysweep, as the run began and at every resumption
    data: list[Account]  # of what was read for the task
    digests: dict[str, str]  # "config" and "task" -> hash
    drawn: dict[str, Drawn]  # hash of the model that is audited alone, or "" for a sweep -> what was drawn
    window: int  # of the search, as `search.window: auto` came out on the cluster that the run began on
    train_workers_idle: float  # share of the search's time


class Manifest(Changes):
    """The content of manifest.json."""

    name: str
    config_digest: str
    seeds: dict[str, int]  # those that the config gives
    versions: dict[str, str]  # of Python and packages, as the run began
    plugins: NotRequired[dict[str, str]]  # extension in use -> the package that it comes from
    commit: str  # of raysweep, as the run began
    created_at: str


class RunDir:
    """The paths of a run. Nothing is created before `claim`."""

    def __init__(self, path: Path):
        self.path = path.absolute()

    @classmethod
    def open(cls, name: str | Path) -> RunDir:
        """A run that exists, by its directory or by its name below ./runs; raises ConfigError if there is none."""
        folder = cls(Path(name))
        if not folder.exists() and cls(STORAGE / name).exists():
            folder = cls(STORAGE / name)
        folder.read_manifest()
        return folder

    @classmethod
    def of(cls, sweep: Sweep) -> RunDir:
        """The directory of a sweep: its name below its storage."""
        return cls(sweep.storage / sweep.name)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Names, versions and hashes of the run, and its state."""
        return self.path / "manifest.json"

    @property
    def journal(self) -> Path:
        """Optuna's journal of the search."""
        return self.path / "study.journal"

    @property
    def trials(self) -> Path:
        """One row per trial."""
        return self.path / "trials.parquet"

    @property
    def rows(self) -> Path:
        """A folder of tables with one row per measurement."""
        return self.path / "rows"

    @property
    def scores(self) -> Path:
        """A folder of tables with one row per sample."""
        return self.path / "scores"

    @property
    def prepared(self) -> Path:
        """A folder of what all trials share: task, context and anchors."""
        return self.path / "prepared"

    @property
    def task(self) -> Path:
        """A folder of the task that the run measures on."""
        return self.prepared / "task"

    @property
    def context(self) -> Path:
        """Paths and hashes of the base, the oracles, the judges and prepared tensors."""
        return self.prepared / "context.json"

    @property
    def candidates(self) -> Path:
        """A folder of models, one per trial that ended well; of those that were dropped, their cards."""
        return self.path / "candidates"

    @property
    def remade(self) -> Path:
        """A folder of candidates that were made again and came out differently."""
        return self.path / "remade"

    @property
    def front_json(self) -> Path:
        """The front, the answer and the standing of every candidate."""
        return self.path / "front.json"

    @property
    def front_table(self) -> Path:
        """One row per point of the figure of the front."""
        return self.path / "front.parquet"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def profile(self) -> Path:
        """One row per phase of the run and per check of its audits, with their seconds."""
        return self.path / "profile" / "profile.parquet"

    @property
    def timeline(self) -> Path:
        """The last attempt in the format of Chrome's traces, if the sweep asks for it."""
        return self.path / "profile" / "timeline.json"

    @property
    def figures(self) -> Path:
        """A folder of the report's figures as PNG."""
        return self.path / "figures"

    def anchors(self, tier: str) -> Path:
        """The anchors of a tier: measured models that fix the ends of residue and damage, and the views that they allow."""
        return self.prepared / f"anchors-{tier}.json"

    def exists(self) -> bool:
        """Whether this is the directory of a run."""
        return self.manifest.is_file()

    def read_manifest(self) -> Manifest:
        """The manifest; raises ConfigError if this is not a run."""
        if not self.exists():
            raise ConfigError(f"{self.path}: not a run directory (manifest.json is missing)")
        manifest: Manifest = json.loads(self.manifest.read_text())
        return manifest

    @property
    def run_id(self) -> str:
        """Name of the run's study, actors and jobs, by the config's digest when it began: a newer raysweep may compute another."""
        manifest = self.read_manifest()
        return f"{manifest['name']}-{manifest['config_digest'][:8]}"

    @property
    def commits(self) -> list[str]:
        """The commits of raysweep that the run began and was resumed at, in order."""
        manifest = self.read_manifest()
        return manifest.get("commits", [manifest["commit"]])

    def sweep(self) -> Sweep:
        """The resolved config of the run, without what was drawn for its audits."""
        self.read_manifest()
        text = self.config.read_text()
        return validate_config(load_yaml(text), str(self.config), text, stored=True)

    def in_force(self) -> Sweep:
        """The resolved config of the run, with what was drawn for its audits and its search's window: it reproduces the run."""
        manifest = self.read_manifest()
        return self.sweep().with_drawn(manifest.get("drawn", {}).get("", {})).with_window(manifest.get("window"))

    def check(self, sweep: Sweep, task: str = "") -> None:
        """Raises ConfigError if the directory cannot be written, or holds anything but a run of this sweep.

        task: hash of the sweep's task; "" if it is not known.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: exists and is not a folder")
        try:
            check_writable(self.path, "choose another storage, for example storage=FOLDER")
            check_writable(cache_folder(sweep.cache), "choose another cache: RAYSWEEP_CACHE=FOLDER, or cache=FOLDER")
        except PlaceError as error:
            raise ConfigError(str(error)) from error
        if not self.exists():
            if self.path.is_dir() and any(p.name not in (LOCK, RECORD) for p in self.path.iterdir()):
                raise ConfigError(f"{self.path}: not empty and not a run; choose another name or storage")
            return
        manifest = self.read_manifest()
        recorded = manifest["config_digest"]
        same_version = self.sweep().digest == recorded  # settings that are added later change the hash
        if sweep.digest != recorded and not (same_version and sweep.digest == self.in_force().digest):
            old, new = _flat(self.sweep().decisive()), _flat(sweep.decisive())
            keys = sorted(set(old) | set(new))
            changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)][:3]
            raise ConfigError(
                f"{self.path}: belongs to a run of another config ({'; '.join(changed) or 'made by another version'}); "
                "choose another name, for example name=" + sweep.name + "-2"
            )
        began = manifest["digests"].get("task", task)
        if task and began != task:  # the run keeps the data that it began with, and would measure on them
            raise ConfigError(
                f"{self.path}: began with other data: its task has the hash {began}, and what the config names gives {task}; "
                f"restore the data, or choose another name, for example name={sweep.name}-2"
            )

    @contextlib.contextmanager
    def claim(
        self, sweep: Sweep, digests: dict[str, str], checks: tuple[str, ...] = (), family: str = ""
    ) -> Iterator[None]:
        """Reserves the directory for this process inside a `with` block, and writes config and manifest.

        digests: "config" and "task" -> hash; checks: names of all tiers' checks; family: that of the task's models. They go to the
        manifest of a new run; an existing run must have the same task. Raises ConfigError as `check` does, or if another process
        holds the directory.
        """
        self.check(sweep, digests.get("task", ""))
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(claimed(self.path))
            except ClaimError as error:
                raise ConfigError(str(error)) from error
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
            self.check(sweep, digests.get("task", ""))
            clear_temporaries(self.path)
            stack.callback(clear_temporaries, self.path)  # processes of a killed run may write while this one begins
            clear_temporaries(cache_folder(sweep.cache), DAY_S)  # younger ones may belong to other runs
            clear_temporaries(cache_folder(sweep.cache), MONTH_S, CHECKPOINT)
            text = ("# resolved config of this run\n" + sweep.recipe()).encode()
            if not self.config.is_file() or self.config.read_bytes() != text:  # limits, resources or paths changed
                write_bytes(self.config, text)
            if not self.exists():
                write_json(self.manifest, _manifest(sweep, digests, checks, family))
            self.update(state="running", host=socket.gethostname(), pid=os.getpid(), resumed_at=now())
            yield

    def update(self, **changes: Unpack[Changes]) -> None:
        """Changes entries of the manifest."""
        write_json(self.manifest, {**self.read_manifest(), **changes})


def list_runs(storage: Path) -> list[RunDir]:
    """All runs below a storage folder, by name."""
    return [RunDir(p.parent) for p in sorted(storage.glob("*/manifest.json"))]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "from source" if name == "raysweep" else "missing"
    return installed


def git_commit() -> str:
    """The commit of the source tree, with "+changes" if files differ from it; "unknown" outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return process.stdout.strip()


def _manifest(sweep: Sweep, digests: dict[str, str], checks: tuple[str, ...], family: str) -> Manifest:
    tiers = {name: getattr(sweep.audit, name).seed for name in ("probe", "audit", "durability")}
    seeds = {"search": sweep.search.seed} | tiers
    return {
        "name": sweep.name,
        "config_digest": sweep.digest,
        "digests": digests,
        "seeds": {key: seed for key, seed in seeds.items() if seed is not None},
        "versions": versions(),
        "plugins": used(
            method=sweep.methods,
            evaluator=checks,
            task=[sweep.task.name],
            family=[family],
            sampler=[sweep.search.sampler],
        ),
        "commit": git_commit(),
        "created_at": now(),
        "state": "new",
    }


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: dotted key -> value."""
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def now() -> str:
    """The local time in ISO format, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
