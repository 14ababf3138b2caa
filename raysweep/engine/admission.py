"""Which nodes may work: those that share the run's folders. Nodes that join during a run are checked before anything starts there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ray
from ray.actor import ActorHandle

from raysweep.config.schema import ConfigError
from raysweep.engine.events import Events
from raysweep.engine.resources import TRIAL_SLOT, Node
from raysweep.engine.shared import Answer, ask, complaint, name_of, on_node

TRIES = 3  # to get an answer of a node that joined


@ray.remote(max_restarts=-1)
class Occupant:
    """Holds all resources of a node, so that Ray starts nothing of this run there."""


class Admission:
    """Tells the nodes that share the folders from those that do not.

    admitted: ids of nodes that have been checked already. A node that is refused stays so until it starts again under another id.
    """

    def __init__(self, folders: Sequence[Path], admitted: Iterable[str], events: Events):
        self.folders, self.admitted, self.events = folders, set(admitted), events
        self.refused: dict[str, ActorHandle] = {}
        self.checking: frozenset[str] = frozenset()
        self._unanswered: Counter[str] = Counter()
        self._ending = threading.Event()
        self._said = ""
        # a hung mount answers late, and those who look after the run must not wait for it
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admission")
        self._answer: Future[dict[str, Answer]] | None = None

    def of(self, nodes: Mapping[str, Node]) -> dict[str, Node]:
        """Those of the nodes that are admitted, by id. Begins to check new ones, which are admitted by a later call."""
        if self._answer is not None and self._answer.done():
            answer, self._answer, self.checking = self._answer, None, frozenset()
            self._judge(answer, nodes)
        self.refused = {node: occupant for node, occupant in self.refused.items() if node in nodes}
        fresh = nodes.keys() - self.admitted - self.refused.keys()
        if fresh and self._answer is None:
            self.checking = frozenset(fresh)
            self._answer = self._thread.submit(ask, sorted(fresh), self.folders, self._ending.is_set)
        return {key: node for key, node in nodes.items() if key in self.admitted}

    @property
    def barred(self) -> frozenset[str]:
        """Ids of the nodes on which nothing may be done."""
        return self.checking | self.refused.keys()

    def close(self) -> None:
        """Ends the thread: one that is inside Ray while Ray shuts down would abort the process."""
        self._ending.set()
        self._thread.shutdown(cancel_futures=True)

    def _judge(self, answer: Future[dict[str, Answer]], nodes: Mapping[str, Node]) -> None:
        try:
            answers = answer.result()
        except (
            ConfigError,
            OSError,
            ray.exceptions.RayError,
        ) as error:  # of the driver's own folder, or of Ray: asked again
            self._say(f"nodes that joined could not be checked: {error}")
            return
        self._unanswered.update(node for node, given in answers.items() if not given.certain)
        self.admitted |= {node for node, given in answers.items() if not any(given.reasons)}
        bad = {
            node: given.reasons
            for node, given in answers.items()
            if any(given.reasons) and node in nodes and (given.certain or self._unanswered[node] >= TRIES)
        }
        details = {n["NodeID"]: n for n in ray.nodes() if n["NodeID"] in bad}
        for node in bad:
            self.refused[node] = _occupy(nodes[node], details[node]["Resources"])
        if bad:
            self._say(complaint(self.folders, {name_of(details[node]): why for node, why in bad.items()}))

    def _say(self, text: str) -> None:
        if text != self._said:
            self.events.say("warning", text)
        self._said = text


def _occupy(node: Node, resources: Mapping[str, float]) -> ActorHandle:
    slots = resources.get(TRIAL_SLOT, 0)
    options = {"num_cpus": node.cpus, "num_gpus": node.gpus, "resources": {TRIAL_SLOT: slots} if slots else {}}
    return Occupant.options(**options, scheduling_strategy=on_node(node.id)).remote()  # type: ignore[attr-defined]
