"""An actor that audits models: loads a model, measures it, and writes its rows and scores to the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.actor import ActorHandle

from raysweep.auditing.request import Answer, AuditRequest, Chore, Outcome, failed
from raysweep.dispatch.holder import Holder, ended_after
from raysweep.settings import DISK, TIMEOUT
from raysweep.storage.files import StoreError, digest_of, write_bytes
from raysweep.storage.places import out_of_space
from raysweep.storage.recent import Recent
from raysweep.storage.schemas import ROWS, SCORES, read_table, write_table

if TYPE_CHECKING:
    import torch

    from evaluators.base import Subject
    from raysweep.auditing.measure import Measurement
    from raysweep.tasks.task import Task


class Peers(Mapping[str, "Subject"]):
    """Anchors by name, each loaded when a check first reads it."""

    def __init__(self, makers: dict[str, Callable[[], Subject]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Subject:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclass
class TierCache:
    """An auditor's cache for one tier: anchors by digest, with everything computed for them, and arrays by name."""

    anchors: dict[str, Subject] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@ray.remote(num_cpus=0.5)
class Auditor:
    """Measures models one at a time.

    It keeps the models of the anchors, shared by all tiers, and the caches of the two most recent tiers, which may alternate.
    """

    def __init__(self) -> None:
        from evaluators.batches import Batches

        self.tasks: Recent[Task] = Recent(1)
        self.judges: Recent[torch.nn.Module] = Recent(2)
        self.tiers: Recent[TierCache] = Recent(2)
        self.models: dict[str, Any] = {}
        self.batches = Batches()

    def serve(self, manager: ActorHandle, name: str, timeout_s: float) -> None:
        """Does what the manager hands out, as the worker `name`, until that lets it end.

        timeout_s: seconds after which an audit counts as hung; this process then ends, and the steward hires another one.
        """
        holder: Holder[AuditRequest | Chore, Outcome] = Holder(manager, name)
        hung = failed(f"no answer within {timeout_s:g} s", TIMEOUT)
        while (task := holder.next()) is not None:
            limit = None if isinstance(task, Chore) else timeout_s
            with ended_after(limit, lambda: holder.finish(hung, again=True)):
                outcome = self.do(task)
            holder.finish(outcome, again=outcome["status"] != "ok")

    def do(self, task: AuditRequest | Chore) -> Outcome:
        """Does an audit or a chore; an error becomes a failed outcome."""
        try:
            if isinstance(task, Chore):
                value = getattr(self, task.method)(*task.arguments)
                return {"status": "ok", "reason": "", "seconds": 0.0, "failed": [], "value": value}
            answer = self.measure(task)
        except Exception as error:  # any exception of a check must end as a recorded failure of its audit alone
            full = out_of_space(error)
            return failed(full or f"{type(error).__name__}: {error}", DISK if full else "")
        return {"status": "ok", "reason": "", **answer}  # type: ignore[typeddict-item]

    def measure(self, request: AuditRequest) -> Answer:
        """Performs an audit.

        An audit that the run or the cache already holds without failed checks is not repeated.
        """
        _use_one_thread()
        path = request.rows_path
        if not path.is_file() and request.cache and (Path(request.cache) / path.name).is_file():
            _copy_from_cache(Path(request.cache), request)
        if path.is_file() and not any(r["status"] == "failed" for r in read_table(path, ROWS).to_pylist()):
            return {"seconds": 0.0, "checks": {}, "images": 0, "failed": []}
        return self._measure(request)

    def train_judge(self, task: str, seed: int, split: str, out: str) -> str:
        """Trains a judge on a split of the task, saves it, and returns the hash of its weights."""
        _use_one_thread()
        from raysweep.auditing.judges import train_judge

        return train_judge(self._task(task), seed, split, Path(out))

    def train_autoencoder(self, task: str, config: dict[str, Any], seed: int, out: str) -> str:
        """Trains the autoencoder of a latent model on a task's retained images, saves it, and returns its folder."""
        _use_one_thread()
        from raysweep.models.autoencoder import train_autoencoder
        from raysweep.storage.files import write_folder

        vae = train_autoencoder(self._task(task).splits["retain"].x, config, seed)
        write_folder(Path(out), lambda folder: vae.save_pretrained(folder, safe_serialization=True))
        return out

    def subject(self, request: AuditRequest) -> Subject:
        """The model to audit and its peers; of the subjects only the anchors stay in memory."""
        from raysweep.auditing.measure import subject_of
        from raysweep.models import families
        from raysweep.storage.seeds import derive_seed

        task, judge, cache = self._task(request.task), self._judge(request.judge), self._tier_cache(request)
        folders = {folder for _, folder, _ in request.anchors}
        self.models = {folder: model for folder, model in self.models.items() if folder in folders}

        def subject(model: Any) -> Subject:
            subject = subject_of(model, task, judge, request.tier, self.batches)
            subject.peers, subject.kept = peers, partial(self._kept, request)
            return subject

        def anchor(folder: str, digest: str) -> Subject:
            if digest not in cache.anchors:
                if folder not in self.models:
                    self.models[folder] = families.load(folder).to(_device())
                cache.anchors[digest] = subject(self.models[folder])
            return cache.anchors[digest]

        peers = Peers({name: partial(anchor, folder, digest) for name, folder, digest in request.anchors})
        same = next((folder for _, folder, digest in request.anchors if digest == request.digest), None)
        if same is not None:
            return anchor(same, request.digest)
        if request.model is None:  # a fresh model of the base's architecture, with the base's frozen parts
            return subject(families.load(request.anchors[0][1]).fresh(derive_seed("destroyed")).to(_device()))
        return subject(families.load(request.model).to(_device()))

    def _measure(self, request: AuditRequest) -> Answer:
        from raysweep.auditing.measure import measure, table_rows

        result = measure(self.subject(request), request.tier)
        rows = table_rows(request, result)
        failed = sorted({r["check"] for r in rows if r["status"] == "failed"})
        write_table(request.scores_path, _table_scores(request, result), SCORES)
        write_table(request.rows_path, rows, ROWS)
        if request.cache and not failed:
            _copy_to_cache(Path(request.cache), request)
        return {"seconds": result.seconds, "checks": result.checks, "images": result.images, "failed": failed}

    def _tier_cache(self, request: AuditRequest) -> TierCache:
        digests = [digest for _, _, digest in request.anchors]
        parts = (request.tier.digest, request.judge_digest, request.task_digest, request.code, digests)
        return self.tiers.get(digest_of(*parts), TierCache)

    def _task(self, folder: str) -> Task:
        from raysweep.tasks.task import Task

        return self.tasks.get(folder, lambda: Task.load(Path(folder)))

    def _judge(self, path: str) -> torch.nn.Module | None:
        """The judge of a tier; None for models that are their own judge."""
        from raysweep.auditing.judges import load_judge

        return self.judges.get(path, lambda: load_judge(Path(path))) if path else None

    def _kept(self, request: AuditRequest, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that depends only on task, judge, tier and code: from memory, from the cache, or made and stored."""
        from raysweep.storage.cache import load_tensors, save_tensors

        name = digest_of(key, request.tier.weights_digest, request.task_digest, request.judge_digest, request.code)
        path = None if request.references is None else Path(request.references) / f"{name}.safetensors"
        arrays = self._tier_cache(request).arrays
        if name not in arrays:
            array = None
            if path is not None and path.is_file():
                with contextlib.suppress(StoreError, KeyError):  # a truncated or foreign file is replaced
                    array = load_tensors(path)["array"].numpy()
            if array is None:
                array = np.ascontiguousarray(make())  # as read from a file: sums depend on the order in memory
                if path is not None:
                    import torch

                    save_tensors(path, {"array": torch.from_numpy(array)})
            arrays[name] = array
        return arrays[name]


def _table_scores(request: AuditRequest, result: Measurement) -> list[dict[str, Any]]:
    """Rows of `SCORES`."""
    common = {"subject": request.subject, "tier": request.tier_name}
    return [
        common | {"score": name, "unit": i, "values": array[i].ravel().tolist(), "shape": list(array[i].shape)}
        for name, array in result.scores.items()
        for i in range(len(array))
    ]


def _copy_to_cache(cache: Path, request: AuditRequest) -> None:
    rows = request.rows_path
    write_bytes(cache / f"scores-{rows.name}", request.scores_path.read_bytes())
    write_bytes(cache / rows.name, rows.read_bytes())


def _copy_from_cache(cache: Path, request: AuditRequest) -> None:
    rows = request.rows_path
    write_bytes(request.scores_path, (cache / f"scores-{rows.name}").read_bytes())
    write_bytes(rows, (cache / rows.name).read_bytes())


def _use_one_thread() -> None:
    """Limits PyTorch to one thread in this process, an auditor's: several share the cores of a machine without a GPU."""
    import torch

    with contextlib.suppress(RuntimeError):
        if not torch.cuda.is_available():
            torch.set_num_threads(1)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
