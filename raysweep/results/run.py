"""A run in Python: its tables, its answer and its models. No Ray."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raysweep.config.schema import ConfigError, Sweep
from raysweep.context import Context
from raysweep.models import stored
from raysweep.results.audited import keys_of
from raysweep.results.trials import read_trials
from raysweep.rundir import RunDir
from raysweep.storage.schemas import FRONT, PROFILE, ROWS, SCORES, TRIALS, read_table
from raysweep.tasks.task import Task

TIERS = ("probe", "audit", "durability")


@dataclass(frozen=True)
class StoredModel:
    """A model of a run. name: trial id, base or oracle-K; digest: hash of its weights."""

    name: str
    folder: Path
    digest: str

    @property
    def is_kept(self) -> bool:
        """Whether its weights are on disk; `raysweep remake` makes those of a candidate that were dropped again."""
        return stored.is_kept(self.folder)

    def load(self) -> Any:
        """The model as a handle (docs/models.md)."""
        from raysweep.models import families

        return families.load(self.folder)

    def pipeline(self) -> Any:
        """The model as a pipeline of diffusers.

        Raises ValueError if diffusers has no pipeline for it, or if it is sampled by raysweep's sampler, which a pipeline of
        diffusers would ignore.
        """
        import diffusers

        from raysweep.models import samplers
        from raysweep.models.folders import INDEX, read_json

        with tempfile.TemporaryDirectory() as temporary:
            folder = self.folder
            if stored.base_of(folder) is not None:
                folder = Path(temporary)
                self.load().save(folder)
            if (folder / samplers.FILE).is_file():
                raise ValueError(f"{self.folder}: is sampled by raysweep's sampler ({samplers.FILE}); use load()")
            index = folder / INDEX
            name = read_json(index).get("_class_name") if index.is_file() else None
            if not hasattr(diffusers, str(name)):
                raise ValueError(f"{self.folder}: diffusers has no pipeline for it; load() gives raysweep's handle")
            return diffusers.DiffusionPipeline.from_pretrained(folder)


class Run:
    """A run directory. Tables are `pyarrow.Table`s, of which `to_pandas()` makes data frames; `raysweep.columns` describes them."""

    def __init__(self, path: str | Path):
        self.folder = RunDir(Path(path))
        self.folder.read_manifest()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, state={self.state!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.folder.path

    @property
    def state(self) -> str:
        """running, done, incomplete (some checks failed or are missing), failed or interrupted."""
        return str(self.folder.read_manifest()["state"])

    @property
    def sweep(self) -> Sweep:
        """The resolved config, with what was drawn for its audits."""
        return self.folder.in_force()

    @property
    def task(self) -> Task:
        """The task with its data, as the run stored it."""
        if not self.folder.task.is_dir():
            raise ConfigError(f"{self.path}: the run has not prepared its task yet")
        return Task.load(self.folder.task)

    @property
    def report(self) -> Path:
        """The file of the report."""
        return self.folder.report

    @property
    def answer(self) -> list[str]:
        """Sentences on the outcome; raises ConfigError before the final audit."""
        return list(self._front_json()["answer"])

    @property
    def trials(self) -> pa.Table:
        """One row per trial, in the order of the sweep."""
        return self._table(self.folder.trials, TRIALS)

    @property
    def profile(self) -> pa.Table:
        """Seconds by phase of the run and by check of its audits."""
        return self._table(self.folder.profile, PROFILE)

    @property
    def front(self) -> pa.Table:
        """One row per audited candidate and anchor; `on_front` marks the front."""
        return self._table(self.folder.front_table, FRONT)

    def rows(self, tier: str = "audit", subject: str | None = None) -> pa.Table:
        """Measurements that the answer rests on, one row per metric. tier: probe, audit or durability (the attacks).

        subject: a trial, base, oracle-K or destroyed; None for all. With differences to base and oracles (`paired_with`).
        """
        files = []
        for key in self._keys(tier, subject):
            files += [self.folder.rows / f"{key}.parquet", self.folder.rows / f"paired-{key}.parquet"]
        return pa.concat_tables([read_table(f, ROWS) for f in files if f.is_file()] or [ROWS.empty_table()])

    def scores(self, check: str, tier: str = "audit", subject: str | None = None) -> pa.Table:
        """Raw scores of a check, one row per independent unit (an image or a seed), such as those of "loss"."""
        files = [self.folder.scores / f"{key}.parquet" for key in self._keys(tier, subject)]
        table = pa.concat_tables([read_table(f, SCORES) for f in files if f.is_file()] or [SCORES.empty_table()])
        return table.filter(pc.starts_with(table["score"], f"{check}."))

    @property
    def base(self) -> StoredModel:
        """The model before unlearning."""
        context = self._context()
        return StoredModel("base", Path(context.base), context.base_digest)

    @property
    def oracles(self) -> list[StoredModel]:
        """The models that never saw the forgotten data."""
        return [
            StoredModel(name, Path(path), digest) for name, (path, digest) in sorted(self._context().oracles.items())
        ]

    @property
    def candidates(self) -> dict[str, StoredModel]:
        """Trial -> its model, of all trials that made one."""
        complete = [t for t in read_trials(self.folder) if t.is_complete]
        return {t.trial: StoredModel(t.trial, self.folder.candidates / t.trial, t.digest) for t in complete}

    @property
    def recommended(self) -> StoredModel | None:
        """The recommended candidate; None if there is none (`answer` says why)."""
        trial = self._front_json()["recommended"]["trial"]
        return None if trial is None else self.candidates[trial]

    def _keys(self, tier: str, subject: str | None) -> list[str]:
        if tier not in TIERS:
            raise ConfigError(f"tier: {tier!r} is not one of {', '.join(TIERS)}")
        by_subject = keys_of(self.folder, read_trials(self.folder)).get(tier, {})
        if subject is not None and subject not in by_subject:
            raise ConfigError(f"{self.path}: {subject!r} was not measured in the tier {tier}; {_listed(by_subject)}")
        return [key for name, key in by_subject.items() if subject in (None, name)]

    def _context(self) -> Context:
        if not self.folder.context.is_file():
            raise ConfigError(f"{self.path}: the run has no base model yet")
        return Context.load(str(self.path))

    def _front_json(self) -> dict[str, Any]:
        if not self.folder.front_json.is_file():
            raise ConfigError(f"{self.path}: the run has no front yet; its state is {self.state}")
        front: dict[str, Any] = json.loads(self.folder.front_json.read_text())
        return front

    def _table(self, file: Path, schema: pa.Schema) -> pa.Table:
        if not file.is_file():
            raise ConfigError(f"{file}: the run has not written it yet; its state is {self.state}")
        return read_table(file, schema)


def _listed(by_subject: dict[str, str]) -> str:
    return f"measured were {', '.join(sorted(by_subject))}" if by_subject else "nothing was measured in it yet"
