"""Keeps the disk of a run bounded: drops the weights of candidates that no later phase needs. Their cards stay.

The final audit takes candidates from the fronts of the methods alone (`results.trials.pick_for_audit`), and a candidate that another
one of its method dominates never comes back to that front. Fronts may have any number of members, so during the search at most
`bound(sweep)` candidates are kept, the first by the order in which the final audit picks. In the rare case that one dropped for that
reason is picked in the end, it is made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from raysweep.config.schema import Sweep
from raysweep.models import stored
from raysweep.results.trials import Trial, fronts_of_methods, pick_for_audit
from raysweep.rundir import RunDir
from raysweep.storage.files import checkpoint_path

SPARE = 4  # candidates kept during the search for each that will be audited


def audited(sweep: Sweep) -> int:
    """The largest number of candidates that the final audit takes."""
    return max(sweep.audit.top, len(sweep.methods))


def bound(sweep: Sweep) -> int:
    """The largest number of candidates on disk during the search, besides one per trial in flight."""
    return sweep.search.trials if sweep.candidates.keep == "all" else min(sweep.search.trials, SPARE * audited(sweep))


class Retention:
    """The candidates of a search on disk; told of each trial that ends.

    trials: those of an earlier attempt, from whose candidates what is no longer needed is dropped at once.
    """

    def __init__(self, folder: RunDir, sweep: Sweep, trials: Sequence[Trial]):
        self.folder, self.most = folder.candidates, bound(sweep)
        self.everything = sweep.candidates.keep == "all"
        self.front: list[Trial] = []  # of each method, with members that are not kept
        self.held: set[str] = set()
        self.unfinished: list[str] = []  # what trials left that a wider limit would let go on, the oldest first
        if not self.everything:
            for t in trials:
                if t.is_complete:
                    self.front.append(t)
                    if stored.is_kept(self.folder / t.trial):
                        self.held.add(t.trial)
                elif t.has_failed:
                    self._failed(t.trial, any(path.exists() for path in self._left_by(t.trial)))
            self.front = fronts_of_methods(self.front)
            self._drop()

    def ended(self, config: dict[str, Any], result: dict[str, Any]) -> None:
        """Takes note of a trial that has ended: its config, and what it reported last."""
        if self.everything:
            return
        if result.get("reason"):
            self._failed(config["trial"], bool(result.get("limit")))
            return
        fields = ("trial", "method", "source", "hyperparameters", "seed")
        objectives = {"residue": result["residue"], "damage": result["damage"]}
        same = {name: config[name] for name in fields}
        t = Trial(number=config["place"], **same, **objectives, state="COMPLETE")
        self.front = fronts_of_methods([*self.front, t])
        self.held.add(t.trial)
        self._drop()

    def _drop(self) -> None:
        needed = {t.trial for t in pick_for_audit(self.front, self.most)}
        for name in self.held - needed:
            drop(self.folder / name)
        self.held &= needed

    def _failed(self, name: str, limited: bool) -> None:
        """Removes what a failed trial left; if a limit ended it, only when too many have left something."""
        self.unfinished.append(name)
        for oldest in self.unfinished[: -self.most] if limited else [name]:
            self.unfinished.remove(oldest)
            for path in self._left_by(oldest):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _left_by(self, name: str) -> tuple[Path, Path]:
        """A candidate whose probe failed, and the checkpoint of an unfinished one."""
        return self.folder / name, checkpoint_path(self.folder / name)


def keep_only(folder: RunDir, sweep: Sweep, trials: Sequence[Trial], needed: Collection[str]) -> None:
    """Drops the weights of all candidates but those of the trials `needed`, unless the run keeps everything."""
    if sweep.candidates.keep != "all":
        for t in trials:
            if t.is_complete and t.trial not in needed:
                drop(folder.candidates / t.trial)


def drop(candidate: Path) -> None:
    """Removes a candidate's weights, if they are there; its card stays."""
    if stored.is_kept(candidate):
        stored.drop(candidate)
