"""An audit actor: loads a candidate, measures it, and leaves its rows and scores on the run's storage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from raysweep.audit.request import AuditRequest, rows_path, scores_path
from raysweep.storage.files import StoreError, digest_of, write_bytes
from raysweep.storage.recent import Recent
from raysweep.storage.schemas import ROWS, SCORES, read_table, write_table

if TYPE_CHECKING:
    from evaluators.base import Subject


class Peers(Mapping[str, Any]):
    """Anchors by name, loaded when a check first asks for them."""

    def __init__(self, makers: dict[str, Callable[[], Any]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Any:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclass
class OfTier:
    """What an auditor keeps for a tier: its anchors, with what was computed for them, by digest; and arrays by name."""

    anchors: dict[str, Subject] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=0)
class Auditor:
    """Measures models one at a time; a restarted auditor starts empty and loads what it needs.

    It keeps the anchors' models, once for all tiers, and what was computed for the last two tiers, which may take turns.
    """

    def __init__(self) -> None:
        self.tasks: Recent[Any] = Recent(1)
        self.judges: Recent[Any] = Recent(2)
        self.tiers: Recent[OfTier] = Recent(2)
        self.models: dict[str, Any] = {}

    def measure(self, request: AuditRequest) -> dict[str, Any]:
        """Does the audit, unless its parts are there already and no check failed in them; returns the seconds it took, the images
        made and the failed checks."""
        _one_thread()
        path = rows_path(Path(request.run), request.key)
        if not path.is_file() and request.cache and (Path(request.cache) / path.name).is_file():
            _copy_parts(Path(request.cache), request)
        if not path.is_file() or any(r["status"] == "failed" for r in read_table(path, ROWS).to_pylist()):
            return self._measure(request, path)
        return {"seconds": 0.0, "images": 0, "failed": []}

    def train_judge(self, task: str, seed: int, split: str, out: str) -> str:
        """Trains a judge on a split of the task, saves it, and returns the hash of its weights."""
        _one_thread()
        from evaluators.judge import train_judge
        from raysweep.storage.cache import save_tensors
        from raysweep.storage.files import digest_state

        images = self._task(task).splits[split]
        state = train_judge(images.x, images.groups, seed).state_dict()
        save_tensors(Path(out), state)
        return digest_state(state)

    def train_autoencoder(self, task: str, config: dict[str, Any], seed: int, out: str) -> str:
        """Trains the autoencoder of a latent model on a task's retained images, saves it, and returns its folder."""
        _one_thread()
        from raysweep.models.autoencoder import train_autoencoder
        from raysweep.storage.files import write_folder

        vae = train_autoencoder(self._task(task).splits["retain"].x, config, seed)
        write_folder(Path(out), lambda folder: vae.save_pretrained(folder, safe_serialization=True))
        return out

    def _measure(self, request: AuditRequest, path: Path) -> dict[str, Any]:
        from raysweep.audit.measure import measure

        result = measure(self._subject(request), request.tier)
        common = {
            "subject": request.subject, "method": request.method, "subject_digest": request.digest,
            "tier": request.tier_name, "paired_with": "", "level": 0.95, "seed": request.tier.seed,
            "judge_digest": request.judge_digest, "task_digest": request.task_digest,
            "tier_digest": request.tier.digest,
        }  # fmt: skip
        rows = []
        for row in result.rows:
            name = f"{row['check']}.{row['name']}"
            rest = {k: v for k, v in row.items() if k != "name"}
            rows.append(common | rest | {"metric": row["name"], "replicates": result.replicates.get(name)})
        scores = [
            {"subject": request.subject, "tier": request.tier_name, "score": name, "unit": i,
             "values": array[i].ravel().tolist(), "shape": list(array[i].shape)}
            for name, array in result.scores.items()
            for i in range(len(array))
        ]  # fmt: skip
        write_table(scores_path(Path(request.run), request.key), scores, SCORES)
        write_table(path, rows, ROWS)
        if request.cache and not any(r["status"] == "failed" for r in rows):
            write_bytes(
                Path(request.cache) / f"scores-{path.name}", scores_path(Path(request.run), request.key).read_bytes()
            )
            write_bytes(Path(request.cache) / path.name, path.read_bytes())
        return {
            "seconds": result.seconds,
            "images": result.images,
            "failed": sorted({r["check"] for r in rows if r["status"] == "failed"}),
        }

    def _subject(self, request: AuditRequest) -> Subject:
        """The model under audit with its peers: anchors keep what was computed for them, candidates do not stay."""
        from raysweep.audit.measure import subject_of
        from raysweep.models import families
        from raysweep.storage.seeds import derive_seed

        task, judge, tier = self._task(request.task), self._judge(request.judge), self._of_tier(request)
        folders = {folder for _, folder, _ in request.anchors}
        self.models = {folder: model for folder, model in self.models.items() if folder in folders}

        def made(model: Any) -> Subject:
            subject = subject_of(model, task, judge, request.tier)
            subject.peers, subject.kept = peers, partial(self._keep, request)
            return subject

        def anchor(folder: str, digest: str) -> Subject:
            if digest not in tier.anchors:
                if folder not in self.models:
                    self.models[folder] = families.load(folder).to(_device())
                tier.anchors[digest] = made(self.models[folder])
            return tier.anchors[digest]

        peers = Peers({name: partial(anchor, folder, digest) for name, folder, digest in request.anchors})
        own = next((folder for _, folder, digest in request.anchors if digest == request.digest), None)
        if own is not None:
            return anchor(own, request.digest)
        if request.model is None:  # of the base's architecture, with its frozen parts
            return made(families.load(request.anchors[0][1]).fresh(derive_seed("destroyed")).to(_device()))
        return made(families.load(request.model).to(_device()))

    def _of_tier(self, request: AuditRequest) -> OfTier:
        digests = [digest for _, _, digest in request.anchors]
        parts = (request.tier.digest, request.judge_digest, request.task_digest, request.code, digests)
        return self.tiers.get(digest_of(*parts), OfTier)

    def _task(self, folder: str):
        from raysweep.tasks.task import Task

        return self.tasks.get(folder, lambda: Task.load(Path(folder)))

    def _keep(self, request: AuditRequest, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that depends on task, judge, tier and code alone: from memory, else from the cache, else made and kept."""
        from raysweep.storage.cache import load_tensors, save_tensors

        name = digest_of(key, request.tier.weights_digest, request.task_digest, request.judge_digest, request.code)
        path = None if request.references is None else Path(request.references) / f"{name}.safetensors"
        arrays = self._of_tier(request).arrays
        if name not in arrays:
            array = None
            if path is not None and path.is_file():
                with contextlib.suppress(StoreError, KeyError):  # cut short or foreign: made again
                    array = load_tensors(path)["array"].numpy()
            if array is None:
                array = np.ascontiguousarray(make())  # as a file gives it back: sums depend on the order in memory
                if path is not None:
                    import torch

                    save_tensors(path, {"array": torch.from_numpy(array)})
            arrays[name] = array
        return arrays[name]

    def _judge(self, path: str):
        if not path:  # the model is its own judge
            return None
        return self.judges.get(path, lambda: load_judge(Path(path)))


def load_judge(path: Path):
    """Reads a judge's weights."""
    from evaluators.judge import Judge
    from raysweep.storage.cache import load_tensors

    state = load_tensors(path)
    judge = Judge(state["body.0.weight"].shape[1], state["head.weight"].shape[0])
    judge.load_state_dict(state)
    return judge.eval()


def _copy_parts(cache: Path, request: AuditRequest) -> None:
    """Takes an audit from the cache into the run, rows last: they are what says that it is there."""
    rows, scores = rows_path(Path(request.run), request.key), scores_path(Path(request.run), request.key)
    write_bytes(scores, (cache / f"scores-{rows.name}").read_bytes())
    write_bytes(rows, (cache / rows.name).read_bytes())


def _one_thread() -> None:
    import torch

    with contextlib.suppress(RuntimeError):
        if not torch.cuda.is_available():
            torch.set_num_threads(1)


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
