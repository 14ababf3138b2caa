"""The two judges of a task: small classifiers that are trained on its real images and kept in the cache. No Ray."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.storage.cache import cache_folder, load_tensors, save_tensors
from raysweep.storage.code_digests import judge_code
from raysweep.storage.files import StoreError, digest_of, digest_state
from raysweep.tasks.task import Task

if TYPE_CHECKING:
    from evaluators.judge import Judge


@dataclass(frozen=True)
class JudgeFile:
    """A judge's file in the cache, and the seed and the split of the task by which it is trained."""

    path: Path
    seed: int
    split: str


def judge_files(task: Task, cache: Path | None = None) -> dict[str, JudgeFile]:
    """The file of each judge, by its name; empty where a model is its own judge.

    cache: as configured; None for the default folder.
    """
    files: dict[str, JudgeFile] = {}
    if task.model_kind == "contrastive":
        return files
    for seed, name in enumerate(("probe", "audit")):
        split = f"judge_{name}"
        key = digest_of(task.splits[split].ids, task.splits[split].groups.tolist(), seed, judge_code())
        files[name] = JudgeFile(cache_folder(cache) / "judges" / f"{name}-{key}.safetensors", seed, split)
    return files


def train_judge(task: Task, seed: int, split: str, file: Path) -> str:
    """Trains a judge on a split of the task and saves it; the hash of its weights."""
    from evaluators import judge
    from raysweep.models.threads import one_thread

    images = task.splits[split]
    with one_thread():
        state = judge.train_judge(images.x, images.groups, seed).state_dict()
    save_tensors(file, state)
    return digest_state(state)


def load_judge(file: Path) -> Judge:
    """The judge in a file, in evaluation mode; raises StoreError if it cannot be read."""
    from evaluators.judge import Judge

    state = load_tensors(file)
    judge = Judge(state["body.0.weight"].shape[1], state["head.weight"].shape[0])
    judge.load_state_dict(state)
    return judge.eval()


def judge_of(task: Task, name: str, cache: Path | None = None) -> Judge | None:
    """A judge of the task (name: probe or audit), from the cache or trained now; None where a model is its own judge."""
    files = judge_files(task, cache)
    if not files:
        return None
    file = files[name]
    with contextlib.suppress(StoreError):  # absent or cut short
        return load_judge(file.path)
    train_judge(task, file.seed, file.split, file.path)
    return load_judge(file.path)
