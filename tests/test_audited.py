"""A run that was resumed after its code had changed: all results shown come from the audits behind its answer."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from click.testing import CliRunner
from finished import trial
from tiny import tiny_task

from raysweep.cli import main
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.context import Context
from raysweep.engine.run import probed_otherwise
from raysweep.report.data import gather
from raysweep.results.audited import keys_of, rows_of, scores_of
from raysweep.results.front_row import FrontRow
from raysweep.results.trials import Trial, trial_table
from raysweep.rundir import RunDir
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Parameter, Space
from raysweep.storage.files import write_json
from raysweep.storage.schemas import FRONT, ROWS, SCORES, TRIALS, write_table

TRIAL, ANCHORS = "000-rgd", ("base", "oracle-0", "destroyed")
OLD, NEW = 0.111, 0.222


def context(folder: RunDir) -> Context:
    pair = ("/model", "b" * 16)
    return Context(
        run=str(folder.path),
        run_id="r",
        task_digest="t",
        quality="fidelity.frechet",
        validity="classifier.validity",
        base=pair[0],
        base_digest=pair[1],
        oracles={"oracle-0": pair},
        judges={},
        prepared={},
        cache=str(folder.path / "cache"),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run whose every audit was made twice, the first time by other code; names of parts sort the old before the new."""
    storage = tmp_path_factory.mktemp("storage")
    sweep = load(None, (f"storage={storage}", "name=twice", "methods=[rgd]"))
    folder = RunDir.of(sweep)
    with folder.claim(sweep, {}):
        task = tiny_task()
        folder.task.mkdir(parents=True)
        task.save(folder.task)
    probe = context(folder).request("probe", sweep.audit.probe, TRIAL, "rgd", None, "d")
    search = ParetoSearch(
        folder.journal,
        f"{sweep.name}-{sweep.digest[:8]}",
        [Space("rgd", {}, (Parameter("lr", "log", (1e-5, 1e-3), {}),), ())],
        1,
        1,
        0,
    )
    search.suggest("a")
    search.on_trial_complete("a", {"residue": 0.1, "damage": 0.2, "digest": "d", "probe": probe.key, FINAL: True})
    keys: dict[str, dict[str, str]] = {}
    for tier in ("probe", "audit", "durability"):
        for subject in (TRIAL, *ANCHORS):
            new = probe.key if (tier, subject) == ("probe", TRIAL) else f"{subject}-{tier}-new"
            keys.setdefault(tier, {})[subject] = new
            for key, value in ((f"{subject}-{tier}-0", OLD), (new, NEW)):
                row = {
                    "subject": subject,
                    "tier": tier,
                    "check": "loss",
                    "metric": "auc",
                    "paired_with": "",
                    "value": value,
                    "method": "rgd" if subject == TRIAL else "",
                    "n": 9,
                    "direction": "target",
                    "interval": "DeLong",
                    "status": "ok",
                    "reason": "",
                    "lo": value,
                    "hi": value,
                }
                write_table(folder.rows / f"{key}.parquet", [row], ROWS)
                write_table(folder.rows / f"paired-{key}.parquet", [row | {"paired_with": "oracle"}], ROWS)
                score = {
                    "subject": subject,
                    "tier": tier,
                    "score": "loss.forget",
                    "unit": 0,
                    "values": [value],
                    "shape": [],
                }
                write_table(folder.scores / f"{key}.parquet", [score], SCORES)
    for tier in ("probe", "audit"):
        write_json(folder.anchors(tier), {"keys": {n: keys[tier][n] for n in ANCHORS}, "views": []})
    points = [{"trial": n, "kind": "candidate" if n == TRIAL else "anchor", "method": ""} for n in (TRIAL, *ANCHORS)]
    write_table(folder.front_table, points, FRONT)
    audits = {tier: keys[tier] for tier in ("audit", "durability")}
    write_json(folder.front_json, {"audits": audits, "answer": [], "recommended": {"trial": None}})
    return folder


def test_the_report_shows_only_the_audits_behind_its_front(home):
    data = gather(home)
    assert {r["value"] for r in data.rows} == {NEW}
    assert {(r["subject"], r["tier"]) for r in data.rows} == {
        (s, t)
        for s in (TRIAL, *ANCHORS)
        for t in ("audit", "durability")  # no page shows a probe's rows
    }
    assert data.metric(TRIAL, "loss.auc")["value"] == NEW
    assert data.metric(TRIAL, "loss.auc", "oracle")["value"] == NEW
    assert {float(a.item()) for a in data.scores.values()} == {NEW}
    assert len(data.scores) == 4


def test_show_prints_only_the_audits_behind_the_front(home):
    shown = CliRunner().invoke(main, ["show", str(home.path), TRIAL, "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.output)["rows"]
    assert {r["value"] for r in rows} == {NEW}
    assert sorted(r["tier"] for r in rows) == sorted(2 * ["probe", "audit", "durability"])


def test_a_run_without_a_front_shows_its_anchors_and_probes(home, tmp_path):
    early = RunDir(tmp_path / "early")
    for tier in ("probe", "audit"):
        write_json(early.anchors(tier), json.loads(home.anchors(tier).read_text()))
    keys = keys_of(early, [trial(TRIAL, probe="p"), trial("001-rgd")])
    assert set(keys["audit"]) == set(ANCHORS)
    assert set(keys["probe"]) == {*ANCHORS, TRIAL}
    assert keys_of(RunDir(tmp_path / "none"), []) == {"probe": {}}
    assert {r["value"] for r in rows_of(home, {"audit": keys["audit"]}, ANCHORS)} == {NEW}
    assert {name: a.tolist() for name, a in scores_of(home, keys["audit"], ["base", "unknown"]).items()} == {
        ("base", "loss.forget"): [[NEW]]
    }
    assert scores_of(home, keys["audit"], ["base"], ("strip.",)) == {}


def test_a_front_that_does_not_name_its_audits_is_refused(tmp_path):
    write_json((folder := RunDir(tmp_path)).front_json, {"points": []})
    with pytest.raises(ConfigError, match=r"front\.json: was written by an earlier raysweep, whose runs"):
        keys_of(folder, [])


def test_trials_probed_by_other_code_are_counted_in_a_warning(home):
    sweep = home.sweep()
    trials = trial_table(home, f"{sweep.name}-{sweep.digest[:8]}")
    assert probed_otherwise(trials, context(home), sweep) == ""
    other = replace(context(home), task_digest="another")
    assert probed_otherwise(trials, other, sweep).startswith("1 of 1 trials were probed before")
    assert probed_otherwise([], other, sweep) == ""


def test_records_have_the_columns_of_their_tables():
    assert [f.name for f in fields(Trial)] == TRIALS.names
    assert {f.name for f in fields(FrontRow)} == set(FRONT.names)
