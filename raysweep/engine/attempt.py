"""One attempt at a run: claims its directory, and records there what the attempt works on and how it failed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

from raysweep.auditing.anchors import Unmeasured
from raysweep.config.schema import ConfigError, Drawn, Sweep
from raysweep.engine.cluster import RunFailed
from raysweep.models import families
from raysweep.rundir import RunDir, git_commit
from raysweep.storage.files import StoreError, write_folder, write_json
from raysweep.storage.places import out_of_space
from raysweep.tasks.task import Task


class Interrupted(RuntimeError):
    """A run was asked to stop. Its state is on disk, and the same command resumes it."""


@contextlib.contextmanager
def attempt(
    folder: RunDir, sweep: Sweep, task: Task, on_failure: Callable[[], None] = lambda: None, subject: str = ""
) -> Iterator[Sweep]:
    """Holds the run directory for one attempt at the run. The caller records how an attempt that did not fail ended.

    Yields the sweep in force: with what was drawn for its audits, now or by an earlier attempt.

    subject: hash of the model that is audited alone, for which everything is drawn afresh; "" for a sweep.
    on_failure: called once the manifest says why the attempt failed. Raises ConfigError if the directory cannot be claimed, and
    RunFailed in place of Unmeasured and of errors that come from a full disk; other errors of the block pass.
    """
    digests = {"config": sweep.digest, "task": task.digest}
    with folder.claim(sweep, digests, sweep.audit.checks_for(task), task.family):
        try:
            commits, commit = folder.commits, git_commit()
            folder.update(
                data=list(task.accounts),
                commits=commits if commits[-1] == commit else [*commits, commit],
                reason="",  # this and the next may be an earlier attempt's
                incomplete=[],
            )
            save_task(folder, task)
            yield sweep.with_drawn(_recorded_draw(folder, sweep, task, subject))
        except (Interrupted, KeyboardInterrupt):
            with contextlib.suppress(StoreError):  # on a full disk the state stays "running", which resumes as well
                folder.update(state="interrupted")
            raise
        except Exception as error:
            expected = isinstance(error, RunFailed | Unmeasured | ConfigError)
            full = out_of_space(error)
            with contextlib.suppress(StoreError):
                folder.update(
                    state="failed", reason=full or (str(error) if expected else f"{type(error).__name__}: {error}")
                )
            if full:  # where no report could be written, either
                raise RunFailed(full) from error
            on_failure()
            if isinstance(error, Unmeasured):
                raise RunFailed(str(error)) from error
            raise


def _recorded_draw(folder: RunDir, sweep: Sweep, task: Task, subject: str) -> Drawn:
    """What was drawn for the audits of `subject`, from the manifest, or drawn and recorded there before anything is measured."""
    recorded = folder.read_manifest().get("drawn", {})
    if subject not in recorded:
        model = families.example(task)
        schedule = len(model.alphas) if hasattr(model, "alphas") else None
        recorded = recorded | {subject: sweep.audit.draw(schedule, task.sampling.get("steps"))}
        folder.update(drawn=recorded)
    return recorded[subject]


def save_task(folder: RunDir, task: Task) -> None:
    """Writes the task for the workers and the report unless it is there; only how it is shown may have changed since."""
    file = folder.task / "task.json"
    if not file.is_file():
        write_folder(folder.task, task.save)
    stored = json.loads(file.read_text())
    if stored["sensitive"] != task.sensitive:
        write_json(file, stored | {"sensitive": task.sensitive})
