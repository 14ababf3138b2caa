"""Checks that all nodes of a cluster see the same folders, before anything is written to them.

The driver leaves a file with a fresh name in each folder. Every node looks for it, leaves one of its own, and the driver looks for
that. Nothing of it stays.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysweep.config.schema import ConfigError
from raysweep.storage.files import temporary_path

LAG_S = 5.0  # after which a file of another node must be visible
ANSWER_S = 90.0  # after which a node's answer is no longer waited for: a hung mount gives none
DECLARED_S = 45.0  # for Ray to declare dead a node that gave no answer
SLICE_S = 0.5
NAMED = 5  # nodes that the message names per reason
REMEDY = (
    "mount one file system (NFS, Lustre, EFS, FSx, ...) at the same path on all nodes, writable for the user that runs Ray, and name "
    "folders in it: storage=FOLDER, and cache=FOLDER or RAYSWEEP_CACHE"
)


@dataclass(frozen=True)
class Look:
    """What a node found in a folder.

    reason: why it does not share it, as the words between folder and node, "" if it does; token: the file that it left there.
    """

    reason: str
    token: str = ""


def check_shared(nodes: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> None:
    """Checks that every node reads and writes the driver's folders; needs a connection to the cluster.

    nodes: as `ray.nodes()` lists them, those that are not alive are skipped; with one node there is nothing to check. folders:
    absolute; missing ones are created for the check. Raises ConfigError, with the nodes, if some do not share a folder.
    """
    names = {n["NodeID"]: name_of(n) for n in nodes if n["Alive"]}
    if len(names) < 2:
        return
    message = complaint(folders, {names[node]: answer.reasons for node, answer in ask(names, folders).items()})
    if message:
        raise ConfigError(message)


@dataclass(frozen=True)
class Answer:
    """A node's answer. reasons: for each folder why it does not share it, or ""; certain: False if the node could not be asked."""

    reasons: list[str]
    certain: bool


class Stopped(RuntimeError):
    """Nobody waits for the answers any more."""


def ask(
    nodes: Iterable[str], folders: Sequence[Path], stopped: Callable[[], bool] = lambda: False
) -> dict[str, Answer]:
    """Node -> whether it shares the folders. nodes: their ids; those that die meanwhile are left out. stopped: asked at least each second.

    Raises ConfigError or OSError if the driver cannot write or read, and Stopped.
    """
    with _tokens(folders) as tokens:
        looks, silent = _looks(nodes, tokens, stopped)
        answers = {node: Answer([_reason(look, node) for look in of_node], True) for node, of_node in looks.items()}
        for node in _still_alive(silent, stopped):
            answers[node] = Answer([silent[node]] * len(folders), False)
        return answers


def name_of(node: Mapping[str, Any]) -> str:
    """A node of `ray.nodes()` for people: its address and its role."""
    role = node.get("Labels", {}).get("role", "")
    return str(node["NodeManagerAddress"]) + (f" ({role})" if role else "")


def complaint(folders: Sequence[Path], reasons: Mapping[str, Sequence[str]]) -> str:
    """The message for nodes that do not share some folders, "" if all do. reasons: node -> for each folder why not, or ""."""
    parts = []
    for k, folder in enumerate(folders):
        by_reason: dict[str, list[str]] = {}
        for node, of_node in reasons.items():
            if of_node[k]:
                by_reason.setdefault(of_node[k], []).append(node)
        for reason, named in by_reason.items():
            more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
            parts.append(f"{folder} {reason} {', '.join(sorted(named)[:NAMED])}{more}")
    return f"the nodes do not share their storage: {'; '.join(parts)}. To run on them, {REMEDY}" if parts else ""


def look(token: Path) -> Look:
    """Looks for the driver's file on this node, and leaves one beside it if it is there."""
    if not token.parent.is_dir():
        return Look("does not exist on")
    if not appears(token):
        return Look("is another folder on")
    mine = temporary_path(token.parent / "shared")
    try:
        mine.touch(exist_ok=False)
    except OSError as error:
        return Look(f"cannot be written ({error.strerror}) on")
    return Look("", str(mine))


def appears(file: Path) -> bool:
    """Whether a file is visible here, if need be after a while: file systems of a network cache what a folder holds."""
    end = time.monotonic() + LAG_S
    while not file.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _reason(look: Look, node: str) -> str:
    """Why a node does not share a folder, also by the driver's own look at the file that the node left, which is removed."""
    if look.reason:
        return look.reason
    file = Path(look.token)
    if appears(file):
        file.unlink(missing_ok=True)
        return ""
    ray.wait([_remove_in_task.options(scheduling_strategy=on_node(node)).remote(file)], timeout=LAG_S)
    return "does not show the driver the files of"


@contextlib.contextmanager
def _tokens(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """The driver's file in each folder; folders that were created for them are removed again if they stay empty."""
    created = [p for folder in folders for p in (folder, *folder.parents) if not p.exists()]
    tokens = [temporary_path(folder / "shared") for folder in folders]
    try:
        for token in tokens:
            try:
                token.parent.mkdir(parents=True, exist_ok=True)
                token.touch(exist_ok=False)
            except OSError as error:
                raise ConfigError(f"{token.parent}: cannot be written ({error.strerror})") from error
        yield tokens
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)
        for folder in sorted(created, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # another process uses it now
                folder.rmdir()


def _looks(
    nodes: Iterable[str], tokens: Sequence[Path], stopped: Callable[[], bool]
) -> tuple[dict[str, list[Look]], dict[str, str]]:
    """Node -> its look at each folder; node -> why it did not look."""
    tasks = {_look_in_task.options(scheduling_strategy=on_node(node)).remote(tokens): node for node in nodes}
    waiting, end = list(tasks), time.monotonic() + ANSWER_S
    while waiting and time.monotonic() < end:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SLICE_S)
        _check(stopped)
    looks, silent = {}, {}
    for task, node in tasks.items():
        try:
            looks[node] = ray.get(task, timeout=0)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(task, force=True)
            silent[node] = f"could not be read within {ANSWER_S:g} s on"
        except ray.exceptions.RayError as error:
            silent[node] = f"could not be looked at ({str(error).strip().splitlines()[0]}) on"
    return looks, silent


def _still_alive(nodes: Iterable[str], stopped: Callable[[], bool]) -> set[str]:
    """Those of the nodes that Ray does not declare dead within a while."""
    left, end = set(nodes), time.monotonic() + DECLARED_S
    while left and time.monotonic() < end:
        left &= {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        _check(stopped)
        time.sleep(min(SLICE_S, DECLARED_S) if left else 0)
    return left


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Stopped


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Schedules on the node with this id and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _look_at_all(tokens: Sequence[Path]) -> list[Look]:
    return [look(token) for token in tokens]


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)


_look_in_task, _remove_in_task = (ray.remote(num_cpus=0, max_retries=0)(work) for work in (_look_at_all, _remove))
