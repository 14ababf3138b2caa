"""The context of a run, kept on its storage for all its processes: where task, models and judges are, and their hashes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.metrics import SHARE
from evaluators.statistics import share_floor
from raysweep.auditing.anchors import Anchors, View
from raysweep.auditing.request import AuditRequest, rows_path
from raysweep.auditing.terms import Measured
from raysweep.config.schema import Sweep, Tier
from raysweep.plugins import audit_code, method_code
from raysweep.rundir import RunDir
from raysweep.storage.files import digest_of, write_json
from raysweep.storage.schemas import ROWS, read_table
from raysweep.train.jobs import Job

MEASURED = (
    "check",
    "metric",
    "value",
    "n",
    "interval",
    "status",
    "reason",
    "replicates",
)  # columns behind a `Measured`


@dataclass(frozen=True)
class Prepared:
    """Tensors that a method prepared. by: the settings that it depends on, with their defaults; files: its files, by `prepared_key`."""

    by: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Context:
    """Paths and digests that do not change during a run.

    run, run_id: the run's directory, and the name of its study, actors and jobs.
    quality, validity, views: metrics of damage, of valid samples, and of residue.
    base, base_digest; oracles: folder and hash of the models; judges: tier's judge -> (file, hash).
    prepared: what each method that prepares something has prepared.
    cache: folder of the anchors' audits. clip_digest: hash of the CLIP model that a task names beside its base; "" for none.
    """

    run: str
    run_id: str
    task_digest: str
    quality: str
    validity: str
    base: str
    base_digest: str
    oracles: dict[str, tuple[str, str]]
    judges: dict[str, tuple[str, str]]
    prepared: dict[str, Prepared]
    cache: str
    views: tuple[str, ...] = ()
    clip_digest: str = ""

    def save(self) -> None:
        write_json(RunDir(Path(self.run)).context, asdict(self))

    @classmethod
    def load(cls, run: str) -> Context:
        data = json.loads(RunDir(Path(run)).context.read_text())
        pairs = {k: {n: tuple(v) for n, v in data[k].items()} for k in ("oracles", "judges")}
        views, prepared = tuple(data.get("views", ())), {n: Prepared(**p) for n, p in data["prepared"].items()}
        path = str(Path(run).absolute())  # a run may have been moved
        return cls(**data | pairs | {"views": views, "prepared": prepared, "run": path})

    @property
    def folder(self) -> RunDir:
        return RunDir(Path(self.run))

    def job(self, sweep: Sweep, config: dict[str, Any]) -> Job:
        """The training job of a trial."""
        card = {k: config[k] for k in ("trial", "method", "hyperparameters", "seed", "source")}
        return Job(
            id=f"{self.run_id}-{config['trial']}",
            kind="train",
            method=config["method"],
            hyperparameters=config["hyperparameters"],
            seed=config["seed"],
            task=str(self.folder.task),
            base=self.base,
            out=str(self.folder.candidates / config["trial"]),
            as_delta=True,
            prepared=self.prepared_file(config["method"], config["hyperparameters"]),
            budget_s=sweep.train.budget_s,
            checkpoint_s=sweep.train.checkpoint_s,
            modules=sweep.train.modules,
            precision=sweep.train.precision,
            lora=None if sweep.train.lora is None else sweep.train.lora.model_dump(),
            inputs=self.inputs(config["method"]),
            card=card | {"run": self.run_id, "base_digest": self.base_digest, "task_digest": self.task_digest},
        )

    def inputs(self, method: str) -> dict[str, str]:
        """Content hashes of what a method's work on the base depends on besides its settings."""
        hashes = {"task": self.task_digest, "base": self.base_digest, "code": method_code(method)}
        return hashes | ({"clip": self.clip_digest} if self.clip_digest else {})

    def prepared_file(self, method: str, hyperparameters: dict[str, Any]) -> str | None:
        """The prepared tensors that belong to a trial's settings; None for a method that prepares nothing."""
        if method not in self.prepared:
            return None
        entry = self.prepared[method]
        return entry.files[prepared_key(entry.by, hyperparameters)]

    def request(
        self,
        tier_name: str,
        tier: Tier,
        subject: str,
        method: str,
        model: str | None,
        digest: str,
        cache: str | None = None,
    ) -> AuditRequest:
        """The audit of one model in one tier."""
        judge, judge_digest = self.judges.get(tier.judge, ("", ""))
        return AuditRequest(
            subject=subject,
            method=method,
            model=model,
            digest=digest,
            tier_name=tier_name,
            tier=tier,
            judge=judge,
            judge_digest=judge_digest,
            task=str(self.folder.task),
            task_digest=self.task_digest,
            run=self.run,
            code=audit_code(tier.checks_for(self)),
            cache=cache,
            references=str(Path(self.cache).parent / "references"),
            anchors=(("base", self.base, self.base_digest), *((n, *o) for n, o in sorted(self.oracles.items()))),
        )

    def anchor_requests(self, tier_name: str, tier: Tier) -> dict[str, AuditRequest]:
        """The audits of the models that fix a tier's scales, by subject.

        Those with a drawn seed are not kept beyond the run: no other audit will ask for them.
        """
        drawn = self.folder.read_manifest().get("drawn", {}) if self.folder.exists() else {}
        is_drawn = any("seed" in tiers.get(tier_name.partition("-")[0], {}) for tiers in drawn.values())
        cache = None if is_drawn else self.cache
        subjects: dict[str, tuple[str | None, str]] = {"base": (self.base, self.base_digest)}
        subjects |= self.oracles
        subjects["destroyed"] = (None, "fresh")
        return {name: self.request(tier_name, tier, name, "", *model, cache) for name, model in subjects.items()}

    def control_requests(self, tier_name: str, tier: Tier) -> dict[str, AuditRequest]:
        """The audits of the base and the oracles, the controls of an attack."""
        return {n: r for n, r in self.anchor_requests(tier_name, tier).items() if n != "destroyed"}

    def anchor_keys(self, tier_name: str) -> dict[str, str]:
        """Keys of the audits of a tier's anchors, by subject."""
        keys: dict[str, str] = json.loads(self.folder.anchors(tier_name).read_text())["keys"]
        return keys

    def load_anchors(self, tier_name: str) -> tuple[Anchors, list[View]]:
        """A tier's anchors and views, as `save_anchors` wrote them."""
        data = json.loads(self.folder.anchors(tier_name).read_text())
        measured = {name: load_measured(self.folder.path, key) for name, key in data["keys"].items()}
        oracles = tuple(m for name, m in measured.items() if name.startswith("oracle"))
        return Anchors(measured["base"], oracles, measured["destroyed"]), [View(**v) for v in data["views"]]

    def save_anchors(self, tier_name: str, keys: dict[str, str], views: list[View]) -> None:
        write_json(self.folder.anchors(tier_name), {"keys": keys, "views": [asdict(v) for v in views]})


def prepared_key(defaults: dict[str, Any], hyperparameters: dict[str, Any]) -> str:
    """Names a preparation by the settings that it depends on."""
    return digest_of({name: hyperparameters.get(name, value) for name, value in defaults.items()})


def load_measured(run: Path, key: str) -> Measured:
    """Values and replicates of one audit, from its rows, and the reasons for those that are absent."""
    table = read_table(rows_path(run, key), ROWS, MEASURED)
    replicates_of = table["replicates"]
    values, replicates, absent, floors = {}, {}, {}, {}
    for k, row in enumerate(table.drop_columns("replicates").to_pylist()):
        name = f"{row['check']}.{row['metric']}"
        if row["status"] == "ok" and replicates_of[k].is_valid:
            values[name], replicates[name] = row["value"], np.array(replicates_of[k].values)
            if row["interval"].startswith(SHARE):
                floors[name] = share_floor(row["n"])
        elif row["status"] != "ok":
            absent[name] = f"{row['status']}: {row['reason']}"
    return Measured(values, replicates, absent, floors)
