"""What a run keeps on disk: never more candidates than its bound, all that the final audit picks, and the rest made again bit for bit."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from method_table import settings_for
from tiny import tiny_model, tiny_task

from raysweep.config.reader import load
from raysweep.context import Context, Prepared, prepared_key
from raysweep.engine.cached_jobs import preparation_defaults, prepare_job, prepares
from raysweep.engine.cluster import RunFailed
from raysweep.engine.events import Silent
from raysweep.engine.final_audit import FinalAudit
from raysweep.engine.remake import Here, remake
from raysweep.engine.retention import Retention, bound, keep_only
from raysweep.models import delta, families, stored
from raysweep.models.folders import CARD
from raysweep.registry import resolve
from raysweep.results.trials import Trial, pick_for_audit
from raysweep.rundir import RunDir
from raysweep.storage.files import checkpoint_path, digest_state
from raysweep.train.jobs import finished

METHODS = ("rgd", "siss", "neggrad")


def sweep(*overrides: str):
    return load(None, ("methods=[rgd,siss,neggrad]", "search.trials=999", "audit.top=4", *overrides))


def config(number: int, method: str) -> dict:
    name = f"{number:03d}-{method}"
    return {"trial": name, "place": number, "method": method, "source": "", "hyperparameters": {}, "seed": 0}


def trial_of(config: dict, **result) -> Trial:
    """The complete trial with a config."""
    return Trial(
        number=config["place"], **{k: v for k, v in config.items() if k != "place"}, state="COMPLETE", **result
    )


def complete(number: int, method: str, residue: float, damage: float) -> Trial:
    return trial_of(config(number, method), residue=residue, damage=damage)


def made(folder: RunDir, name: str) -> Path:
    """A candidate as it lies there, without content."""
    path = folder.candidates / name
    path.mkdir(parents=True)
    (path / CARD).write_text("{}")
    (path / stored.FILE).write_bytes(b"weights")
    return path


def on_disk(folder: RunDir) -> set[str]:
    return {p.parent.name for p in folder.candidates.glob(f"*/{stored.FILE}")}


@pytest.mark.parametrize("seed", range(5))
def test_during_a_search_the_disk_is_bounded_and_holds_what_would_be_audited(tmp_path, seed):
    """Values of two decimals, so that some are equal, on a convex trade-off that moves as the search learns."""
    folder, settings, draw = RunDir(tmp_path), sweep(), random.Random(seed)
    retention, trials = Retention(folder, settings, []), []
    assert bound(settings) == 16
    for number in range(150):
        x = draw.random()
        shift = max(0.0, 0.5 - number / 200) + draw.random() / 5
        t = complete(number, draw.choice(METHODS), round(x + shift, 2), round((1 - x) ** 2 + shift, 2))
        made(folder, t.trial)
        trials.append(t)
        retention.ended(config(t.number, t.method), {"residue": t.residue, "damage": t.damage})
        kept = on_disk(folder)
        assert len(kept) <= 16
        assert {t.trial for t in pick_for_audit(trials, 4)} <= kept
        if number % 50 == 49:  # as after a kill
            assert Retention(folder, settings, trials).held == retention.held == kept
    assert len(list(folder.candidates.glob(f"*/{CARD}"))) == 150
    picked = {t.trial for t in pick_for_audit(trials, settings.audit.top)}
    keep_only(folder, settings, trials, picked)
    assert on_disk(folder) == picked


def test_a_run_that_keeps_everything_drops_nothing(tmp_path):
    folder, settings = RunDir(tmp_path), sweep("candidates.keep=all")
    trials = [complete(k, "rgd", k, k) for k in range(3)]
    for t in trials:
        made(folder, t.trial)
    retention = Retention(folder, settings, trials)
    retention.ended(config(3, "rgd"), {"reason": "x"})
    keep_only(folder, settings, trials, set())
    assert len(on_disk(folder)) == 3
    assert bound(settings) == 999
    assert settings.digest == sweep().digest  # may be changed when a run is resumed


def test_failed_trials_leave_nothing_behind_unless_a_wider_limit_lets_them_go_on(tmp_path):
    folder, settings = RunDir(tmp_path), sweep()
    retention = Retention(folder, settings, [])
    made(folder, "000-rgd")
    retention.ended(config(0, "rgd"), {"reason": "probe: broke"})
    assert not (folder.candidates / "000-rgd").exists()
    for number in range(1, 21):
        made(folder, f"{number:03d}-rgd")
        checkpoint_path(folder.candidates / f"{number:03d}-rgd").write_text("state")
        retention.ended(config(number, "rgd"), {"reason": "too slow", "limit": "train.budget_s"})
    left = {p.name for p in folder.candidates.iterdir()}
    assert left == {name for k in range(5, 21) for name in (f"{k:03d}-rgd", f".{k:03d}-rgd.partial.pt")}
    again = Retention(folder, settings, [replace(complete(k, "rgd", 0, 0), state="FAIL") for k in range(21)])
    assert {p.name for p in folder.candidates.iterdir()} == left
    again.ended(config(21, "rgd"), {"reason": "too slow", "limit": "train.budget_s"})
    assert not (folder.candidates / "005-rgd").exists()


# Making dropped candidates again


class Run:
    """A run's folder with one trained candidate, and its context."""

    def __init__(self, home: Path, method: str):
        task = tiny_task("class")
        self.sweep = load(None, (f"cache={home / 'cache'}", f"methods=[{method}]", "search.trials=2"))
        self.folder, self.here = RunDir(home / "run"), Here(Silent())
        self.folder.task.mkdir(parents=True)
        task.save(self.folder.task)
        base = tiny_model(task)
        base.save(home / "base")
        context = Context(
            run=str(self.folder.path),
            run_id="tiny-0",
            task_digest=task.digest,
            quality="",
            validity="",
            base=str(home / "base"),
            base_digest=base.digest,
            oracles={},
            judges={},
            prepared={},
            cache=str(home / "cache" / "audits"),
        )
        hyperparameters = settings_for(method)
        kind = resolve("method", method)
        if prepares(kind):
            preparation = prepare_job(self.sweep, context, method, hyperparameters)
            assert self.here.run(preparation).status == "ok"
            key = prepared_key(preparation.hyperparameters, preparation.hyperparameters)
            context.prepared[method] = Prepared(preparation_defaults(kind), {key: preparation.out})
            self.prepared = Path(preparation.out)
        context.save()
        stored.say_place(self.folder.candidates, context.base)
        self.context = context
        trial = config(0, method) | {"hyperparameters": hyperparameters, "seed": 5}
        outcome = self.here.run(context.job(self.sweep, trial))
        assert outcome.status == "ok", outcome.reason
        self.trial = trial_of(trial, residue=0.1, damage=0.1, digest=outcome.digest)
        self.candidate = self.folder.candidates / self.trial.trial


@pytest.mark.parametrize("method", ["finetune", "salun"])
def test_a_dropped_candidate_is_made_again_bit_for_bit(tmp_path, method):
    run = Run(tmp_path, method)
    card, (header, tensors) = (run.candidate / CARD).read_bytes(), delta.read(run.candidate / stored.FILE)
    stored.drop(run.candidate)
    if method == "salun":
        run.prepared.unlink()
    job = run.context.job(run.sweep, vars(run.trial))
    assert finished(job).digest == run.trial.digest  # a resumed run does not train it again
    again = remake(run.here, run.sweep, run.context, run.trial)
    assert again.is_same
    assert again.folder == run.candidate
    assert (run.candidate / CARD).read_bytes() == card
    header_again, tensors_again = delta.read(run.candidate / stored.FILE)
    assert (header_again, digest_state(tensors_again)) == (header, digest_state(tensors))
    assert families.load(run.candidate).digest == run.trial.digest
    assert not list(run.folder.remade.iterdir())


def test_a_candidate_that_comes_out_differently_replaces_nothing(tmp_path):
    run = Run(tmp_path, "finetune")
    stored.drop(run.candidate)
    other = replace(run.trial, digest="0" * 16)
    again = remake(run.here, run.sweep, run.context, other)
    assert not again.is_same
    assert [p.name for p in run.candidate.iterdir()] == [CARD]
    assert families.load(again.folder).digest == run.trial.digest == again.digest
    assert again.folder == run.folder.remade / run.trial.trial
    assert "the run measured 0000000000000000 (only a CPU" in again.difference
    card = json.loads((run.candidate / CARD).read_text())
    card["job"]["inputs"]["code"] = "older"
    (run.candidate / CARD).write_text(json.dumps(card))
    again = remake(run.here, run.sweep, run.context, other)
    assert "what it was made from has changed since: code" in again.difference
    tiny_model(tiny_task("class"), 3).save(tmp_path / "base")
    with pytest.raises(RunFailed, match="it has changed; put it back"):
        remake(run.here, run.sweep, run.context, run.trial)


class Said:
    def __init__(self):
        self.lines = []

    def say(self, kind, text):
        self.lines.append((kind, text))


class Threads:
    """Stands for the engine's threads."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function, *arguments)
        return future


@pytest.mark.parametrize("digest", ["", "0" * 16])
def test_the_final_audit_makes_picked_candidates_again_that_the_search_had_dropped(tmp_path, digest):
    """One point that dominates all that were kept brings a dropped one among the picked."""
    run, said = Run(tmp_path, "finetune"), Said()
    stored.drop(run.candidate)
    from types import SimpleNamespace

    engine = SimpleNamespace(sweep=run.sweep, folder=run.folder, executor=run.here, events=said, threads=Threads)
    trial = replace(run.trial, digest=digest or run.trial.digest)
    audit = FinalAudit.of(engine, run.context, [trial], [])
    if digest:
        with pytest.raises(RunFailed, match="was made again and is another model"):
            audit.restore()
        assert audit.picked == {}
    else:
        audit.restore()
        assert list(audit.picked) == ["000-finetune"]
        assert families.load(run.candidate).digest == run.trial.digest
    assert said.lines[0] == ("prepare", "dropped during the search, and made again: 000-finetune")
    assert bool(audit.incomplete) == bool(digest)
