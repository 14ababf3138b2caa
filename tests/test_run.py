"""A whole sweep through real Ray: killed midway, resumed by the same command, and all files that it writes."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from small import SMALL, install_faulty, kill_after_two_trials, log, recipe_of, start
from tiny import ROOT

from raysweep.auditing import card as cards
from raysweep.cli import main
from raysweep.models import families, stored
from raysweep.results import trials as results_trials
from raysweep.results.profile import PHASES, read_profile, whole
from raysweep.results.run import Run
from raysweep.rundir import RunDir
from raysweep.storage.files import digest_of
from raysweep.storage.schemas import FRONT, ROWS, SCORES, TRIALS, read_table, write_table

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def home(tmp_path_factory, cache) -> Path:
    """A folder in which a sweep was killed after two trials, and then run again to its end, with a profile."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "small.yaml").write_text(SMALL)
    faulty = install_faulty(folder / "faulty")
    methods = ("methods=[neggrad, siss_no_is, raises]",)
    kill_after_two_trials(folder, cache, "run", "small.yaml", *methods, PYTHONPATH=faulty)
    before = {p.parent.name: p.stat().st_mtime_ns for p in (folder / "runs/small/candidates").glob("*/raysweep.json")}
    (folder / "before.json").write_text(json.dumps(before))
    second = start(folder, cache, "run", "small.yaml", *methods, "profile=true", PYTHONPATH=faulty)
    assert second.wait(timeout=500) == 0, log(folder)
    return folder


@pytest.fixture
def run(home, monkeypatch) -> RunDir:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home / "faulty")
    return RunDir(home / "runs" / "small")


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def audited(run: RunDir) -> str:
    """An audited candidate, whose weights the run keeps."""
    return next(n for n in json.loads(run.front_json.read_text())["candidates"] if n.endswith("neggrad"))


def test_nothing_is_lost_redone_or_done_twice_by_a_kill(home, run):
    trials = read_table(run.trials, TRIALS).to_pylist()
    methods = ("neggrad", "siss_no_is", "raises")
    assert [t["trial"] for t in trials] == [f"{k:03d}-{methods[k % 3]}" for k in range(6)]
    assert [t["state"] for t in trials] == ["COMPLETE", "COMPLETE", "FAIL"] * 2
    after = {p.parent.name: p.stat().st_mtime_ns for p in run.candidates.glob("*/raysweep.json")}
    before = json.loads((home / "before.json").read_text())
    assert len(before) >= 2
    assert {k: after[k] for k in before} == before
    keys = [json.loads(line)["key"] for line in (run.path / "audits.jsonl").read_text().splitlines() if line]
    assert len(keys) == len(set(keys))
    assert "resuming" in log(home)
    assert re.search(r"Ray dashboard  http://127\.0\.0\.1:\d+", log(home))


def test_where_the_time_went_is_in_a_table_and_in_a_trace(home, run):
    profile = read_profile(run)
    phases = {line.name: line for line in profile if line.part == "phase"}
    assert tuple(phases) == PHASES
    assert all(0 <= line.busy < 1.001 and line.seconds > 0 for line in phases.values())
    assert phases["search"].train_s > 0
    assert phases["attacks"].audit_s > 0 == phases["attacks"].train_s
    assert whole(profile).busy > 0.05
    assert {"reconstruction", "relearning", "quantisation", "pictures"} < {p.name for p in profile if p.part == "check"}
    for text in ("seconds of slots", "seconds of auditors", "quantisation", "time line for chrome://tracing"):
        assert text in log(home)
    events = [e for e in json.loads(run.timeline.read_text()) if e["ph"] == "X"]
    assert {type(e[key]) for e in events for key in ("pid", "tid")} == {int}
    own = {e["name"] for e in events if e["cat"] == "raysweep"}
    assert set(PHASES) <= own
    assert any("005-raises" in name for name in own)
    assert any(name.startswith("base-durability") for name in own)
    assert any("Broker.submit" in e["name"] for e in events if e["cat"] != "raysweep")


def test_a_method_that_raises_is_a_failed_trial_with_its_reason(run):
    failed = [t for t in read_table(run.trials, TRIALS).to_pylist() if t["method"] == "raises"]
    assert all(t["reason"] == "RuntimeError: this method is broken" for t in failed)
    assert "this method is broken" in call("status", "small").output


def test_the_directory_is_laid_out_as_promised(run):
    files = (
        "config.yaml manifest.json study.journal trials.parquet front.json front.parquet report.html figures/front.png"
    )
    for name in (*files.split(), "tune", "rows", "scores", "prepared", "candidates"):
        assert (run.path / name).exists(), name
    assert not [p for p in run.path.rglob("*") if p.name.endswith(".tmp") or "overdue" in p.name or "partial" in p.name]
    logged = {p.parent.name for p in (run.path / "tune").rglob("events.out.tfevents*")}
    assert logged  # of the second attempt: the first was killed before it wrote any
    assert logged <= {t["trial"] for t in read_table(run.trials, TRIALS).to_pylist()}  # which TensorBoard shows
    manifest = run.read_manifest()
    assert manifest["state"] == "done"
    assert manifest["commit"]


def test_the_recipe_of_the_report_is_the_same_sweep(run, tmp_path):
    result = call("validate", str(recipe_of(run.path, tmp_path)), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["digest"] == run.in_force().digest


def test_every_row_has_its_n_and_its_interval(run):
    rows = read_table(run.rows, ROWS).to_pylist()
    assert {r["tier"] for r in rows} - {"audit-2"} == {"probe", "audit", "durability"}
    assert {"base", "oracle-0", "oracle-1", "destroyed", "000-neggrad"} <= {r["subject"] for r in rows}
    for r in rows:
        if r["status"] == "ok":
            assert r["n"] > 0
            assert r["interval"] != "none" or r["reason"]
            assert r["lo"] is None or r["lo"] <= r["hi"]
        else:
            assert r["status"] == "skipped"
            assert r["reason"]
    probe, audit = ({r["seed"] for r in rows if r["tier"] == t and not r["paired_with"]} for t in ("probe", "audit"))
    judges = [{r["judge_digest"] for r in rows if r["tier"] == t and not r["paired_with"]} for t in ("probe", "audit")]
    assert not probe & audit
    assert not judges[0] & judges[1]
    assert read_table(run.scores, SCORES).num_rows > 1000
    paired = [r for r in rows if r["subject"] == "base" and r["paired_with"] == "base"]
    assert paired
    assert all(abs(r["value"]) < 1e-12 for r in paired)


def test_the_front_names_the_best_sound_candidate_and_the_attacked_ones(run):
    front = json.loads(run.front_json.read_text())
    points = {p["trial"]: p for p in read_table(run.front_table, FRONT).to_pylist()}
    assert points["base"]["residue"] == pytest.approx(1.0)
    assert points["destroyed"]["damage"] == pytest.approx(1.0)
    worst = {n: max(points[n]["residue"], points[n]["damage"]) for n in front["candidates"]}
    sound = {n: worst[n] for n, reasons in front["against"].items() if not reasons}
    chosen = front["recommended"]["trial"]  # None if there is an objection to each
    assert chosen is None if not sound else sound[chosen] == min(sound.values())
    for n, v in front["verdicts"].items():
        assert n not in sound or v["label"] not in ("remembers", "destroyed")
    assert set(front["standing"]) == set(front["candidates"])
    assert front["reference_point"] == [1.1, 1.1]
    assert front["hypervolume"]["lo"] <= front["hypervolume"]["value"] <= front["hypervolume"]["hi"]
    attacked = set(front["verdicts"])
    assert {"base", "oracle-0", "oracle-1"} < attacked
    assert len(attacked & set(front["candidates"])) == 1
    assert {p["trial"] for p in points.values() if p["verdict"]} == attacked
    assert sum(bool(p["on_front"]) for p in points.values()) >= 1
    assert set(front["undecided"]) <= set(front["candidates"])
    picks = front["picks"]
    assert {picks["balanced"]["trial"], picks["knee"]["trial"]} <= set(front["candidates"])
    assert set(picks["forgotten"]["trials"]) <= set(front["candidates"])


def test_only_uncertain_candidates_are_audited_again(run):
    """In a separate round: seeds of no other tier, the same judge, its own anchors; values are means of rounds."""
    points = {p["trial"]: p for p in read_table(run.front_table, FRONT).to_pylist() if p["kind"] == "candidate"}
    rows = [r for r in read_table(run.rows, ROWS).to_pylist() if not r["paired_with"]]
    tiers = {tier: {r["subject"] for r in rows if r["tier"] == tier} for tier in ("audit", "audit-2")}
    again = {trial for trial, p in points.items() if p["audits"] == 2}
    assert tiers["audit-2"] == (again | {"base", "oracle-0", "oracle-1", "destroyed"} if again else set())
    seeds = {
        tier: {r["seed"] for r in rows if r["tier"] == tier} for tier in ("probe", "audit", "audit-2", "durability")
    }
    assert sum(len(s) for s in seeds.values()) == len(set().union(*seeds.values()))


def test_the_report_is_one_file_without_requests(run):
    html = run.report.read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?!data:)[a-z]+:", html)
    parts = "ecommended|Knee of the front|false discoveries|Search against audit|Audit sheets|Not tested|Provenance|oracle-0|search saw"
    for part in (*parts.split("|"), "Under attack", "quantisation int4", "this method is broken", "data:image/png"):
        assert part in html, part
    assert len(html) < 10_000_000


def test_the_report_can_be_rebuilt_and_escapes_html(run):
    assert call("report", "small").exit_code == 0
    from raysweep.report.contents import page_context
    from raysweep.report.data import gather

    data = gather(run)
    data.trials[0] = replace(data.trials[0], trial="<script>alert(1)</script>", state="FAIL")
    context = page_context(data)
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("raysweep.report"), autoescape=True).get_template("report.html.j2")
    assert "<script>alert" not in template.render(context)


def test_how_far_trials_are_is_read_from_their_table_and_from_the_study(run, monkeypatch):
    expected = [(t.trial, t.state, t.reason) for t in results_trials.trials_of(run)]
    assert results_trials.standings_of(run) == expected
    monkeypatch.setattr(results_trials, "_up_to_date", lambda *_: False)
    assert results_trials.standings_of(run) == expected


def test_show_status_export_and_ls_agree_with_the_run(run, tmp_path):
    status = json.loads(call("status", "small", "--json").output)
    assert (status["state"], status["exit_code"], status["trials"]) == ("done", 0, {"COMPLETE": 4, "FAIL": 2})
    name = audited(run)
    shown = call("show", "small", name)
    assert shown.exit_code == 0
    assert "reconstruction.correlation" in shown.output
    front = json.loads(run.front_json.read_text())
    standing = front["standing"][name]
    assert f"standing         {standing}" in shown.output
    assert status["answer"] == front["answer"]
    assert call("show", "small", "000-neggrd").exit_code == 2
    exported = call("export", "small", name, str(tmp_path / "out"))
    assert exported.exit_code == 0, exported.output
    assert (f"warning: {name} is {standing}" in exported.output) == (standing != "recommended")
    from diffusers import DDIMPipeline

    DDIMPipeline.from_pretrained(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "raysweep.json").read_text())
    assert card["method"] == "neggrad"
    assert call("export", "small", name, str(tmp_path / "out")).exit_code == 2
    page = (tmp_path / "out" / "README.md").read_text()
    assert card["outcome"]["digest"] in page
    assert "library_name: diffusers" in page
    assert "not a proof of erasure" in page
    assert json.loads(call("ls", "runs", "--json").output)[0]["state"] == "done"


def test_base_and_oracles_are_exported_and_given_back(run, tmp_path):
    kept = Run(run.path)
    for anchor in (kept.base, kept.oracles[1]):
        out = tmp_path / anchor.name
        done = call("export", "small", anchor.name, str(out))
        assert done.exit_code == 0, done.output
        assert families.load(out).digest == anchor.digest
        assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {out.stat().st_mode & 0o666}
    assert "no 'oracle-7'" in call("export", "small", "oracle-7", str(tmp_path / "out")).output
    assert "not made from another model" in call("export", "small", "base", str(tmp_path / "out"), "--delta").output
    models = (f"task.base={tmp_path / 'base'}", f"oracle_models=[{tmp_path / 'oracle-1'}]")
    done = call("validate", "small.yaml", "name=other", *models)
    assert done.exit_code == 0, done.output


def test_export_refuses_weights_that_do_not_match_their_card(run, tmp_path):
    card = run.candidates / audited(run) / "raysweep.json"
    text = card.read_text()
    data = json.loads(text)
    data["outcome"]["digest"] = "0" * 16
    card.write_text(json.dumps(data))
    try:
        result = call("export", "small", audited(run), str(tmp_path / "out"))
    finally:
        card.write_text(text)
    assert result.exit_code == 1
    assert "not exported" in result.output
    assert os.listdir(tmp_path) == []


def test_a_run_keeps_what_it_audited_and_makes_the_rest_again(run, tmp_path):
    """The process here, without Ray, gives the same bits as the run's workers."""
    trials = {t["trial"]: t for t in read_table(run.trials, TRIALS).to_pylist() if t["state"] == "COMPLETE"}
    candidates = json.loads(run.front_json.read_text())["candidates"]
    kept = {p.parent.name for p in run.candidates.glob(f"*/{stored.FILE}")}
    assert kept == set(candidates) < set(trials)
    assert {p.parent.name for p in run.candidates.glob("*/raysweep.json")} == set(trials)
    assert Run(run.path).candidates.keys() == trials.keys()
    name = min(set(trials) - kept)
    assert not Run(run.path).candidates[name].is_kept
    command = f"raysweep remake {run.path} {name}"
    out = tmp_path / "out"
    for verb in (
        ("export", "small", name, str(out)),
        ("audit", str(run.candidates / name), "small.yaml", "name=other"),
    ):
        refused = call(*verb)
        assert (refused.exit_code, command in refused.output) == (2, True), refused.output
    assert f"raysweep remake runs/small {name}" in call("show", "small", name).output
    made = call(*command.split()[1:])
    assert made.exit_code == 0, made.output
    assert f"the same model as before, hash {trials[name]['digest']}" in made.output
    assert run.read_manifest()["state"] == "done"
    assert call("export", "small", name, str(out)).exit_code == 0
    assert families.load(out).digest == Run(run.path).candidates[name].load().digest == trials[name]["digest"]
    again = call(*command.split()[1:])
    assert (again.exit_code, "nothing to make" in again.output) == (2, True)
    failed = next(t["trial"] for t in read_table(run.trials, TRIALS).to_pylist() if t["state"] == "FAIL")
    refused = call("remake", "small", failed)
    assert (refused.exit_code, "made no candidate: RuntimeError: this method is broken" in refused.output) == (2, True)
    assert call("remake", "small", "000-neggrd").exit_code == 2


def test_another_config_is_refused(run):
    result = call("run", "small.yaml", "search.trials=8")
    assert result.exit_code == 2
    assert "another config" in result.output


@pytest.fixture(scope="module")
def card(home, cache) -> Path:
    """The audit card of a candidate, made by the command; its folder has the name of an anchor."""
    shutil.copytree(home / "runs/small/candidates" / audited(RunDir(home / "runs/small")), home / "base")
    process = start(home, cache, "audit", "base", "small.yaml", "name=other")
    assert process.wait(timeout=400) == 0, log(home)
    return next((home / "runs/other-audits/cards").iterdir())


def test_a_card_states_its_findings_and_verifies(card, home):
    answer = call("verify", str(card))
    assert answer.exit_code == 0, answer.output
    assert "DIFFERS" not in answer.output
    content = json.loads((card / "card.json").read_text())
    source = json.loads((home / "base/raysweep.json").read_text())
    name = f"base@{source['outcome']['digest'][:8]}"
    assert {"base", "oracle-0", "oracle-1", name} == set(content["models"])
    assert content["models"][name]["folder"] == str(home / "base")
    assert content["models"][name]["digest"] == source["outcome"]["digest"]
    assert content["models"]["base"]["digest"] == source["base_digest"]
    rows = read_table(card / "audit-rows.parquet", ROWS).to_pylist()
    assert {(r["subject"], r["subject_digest"]) for r in rows} == {(name, source["outcome"]["digest"])}
    assert content["verdict"]["label"]
    html = (card / "card.html").read_text()
    for part in (f"Audit of {name}", "loss.gap", "Not tested", "fixed before the audit", content["digest"]):
        assert part in html, part
    assert not re.findall(r"<(?:script|link|img|iframe)", html)


def test_verification_names_each_change(card, tmp_path):
    def copied(name: str) -> Path:
        return Path(shutil.copytree(card, tmp_path / name))

    number = copied("number")
    content = json.loads((number / "card.json").read_text())
    content["findings"][0]["value"] = 0.123
    (number / "card.json").write_text(json.dumps(content))
    answer = call("verify", str(number))
    assert answer.exit_code == 1
    assert "DIFFERS  the card's own digest" in answer.output
    content["digest"] = digest_of({k: v for k, v in content.items() if k != "digest"})  # a careful forger
    (number / "card.json").write_text(json.dumps(content))
    answer = call("verify", str(number))
    assert (answer.exit_code, "DIFFERS  card: findings" in answer.output) == (1, True)
    cut = copied("cut")
    (cut / "audit-scores.parquet").write_bytes((cut / "audit-scores.parquet").read_bytes()[:-9])
    assert "DIFFERS  audit-scores.parquet" in call("verify", str(cut)).output
    gone = copied("gone")
    content = json.loads((gone / "card.json").read_text())
    content["models"]["base"]["folder"] = "/absent"
    content["digest"] = digest_of({k: v for k, v in content.items() if k != "digest"})
    (gone / "card.json").write_text(json.dumps(content))
    (gone / "card.html").write_bytes(cards.page(cards.read(gone)).encode())
    answer = call("verify", str(gone))
    assert (answer.exit_code, "unknown  model base" in answer.output) == (3, True)
    absent = call("verify", str(tmp_path / "absent"))
    assert (absent.exit_code, "no such file" in absent.output) == (2, True)


def test_cards_are_compared_and_their_differences_named(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(card, tmp_path / "other"))
    content = json.loads((other / "card.json").read_text())
    content["subject"] = "<b>another</b>"
    content["findings"][0]["value"] = 0.987
    (other / "card.json").write_text(json.dumps(content))
    comparison = call("report", "--compare", str(card), str(other))
    assert comparison.exit_code == 0, comparison.output
    page = Path("comparison.html").read_text()
    assert "&lt;b&gt;another&lt;/b&gt;" in page
    assert "0.987" in page
    assert "do not compare" not in page
    assert not re.findall(r"<(?:link|img|iframe)[^>]+(?:src|href)=[\"']?(?!data:)[a-z]+:", page)
    content["task"]["digest"] = "0"
    (other / "card.json").write_text(json.dumps(content))
    shown = call("show", str(card), str(other))
    assert shown.exit_code == 0, shown.output
    assert "The cards differ in the tasks" in shown.output
    assert "residue" in shown.output
    table = json.loads(call("show", str(card), str(other), "--json").output)
    assert table["subjects"] == [card.name, "<b>another</b>"]
    assert all(len(row["cells"]) == 2 for row in table["rows"])


def test_runs_are_compared_by_what_they_attain(run, card, tmp_path):
    """Two sweeps of other seeds attain what the worse of the two attains, and their difference has an interval."""
    from raysweep.report.compare import runs_table

    again = RunDir(tmp_path / "again")
    again.path.mkdir()
    for name in ("manifest.json", "front.json"):
        shutil.copy(run.path / name, again.path / name)
    config = yaml.safe_load(run.config.read_text())
    config["search"]["seed"] += 1
    again.config.write_text(yaml.safe_dump(config))
    points = read_table(run.front_table, FRONT).to_pylist()
    write_table(
        again.front_table, [p | {"residue": p["residue"] + 0.1, "damage": p["damage"] + 0.1} for p in points], FRONT
    )
    table = runs_table([run, again])
    assert table.differences == []
    assert {r.name for r in table.rows} == {"neggrad", "siss_no_is", "raises", "all methods"}
    mine = [p for p in points if p["kind"] == "candidate" and p["method"] == "neggrad"]
    for share, shift in ((0.5, 0.0), (0.75, 0.1)):
        assert table.bands["neggrad"][share][:, 0].min() == pytest.approx(min(p["residue"] for p in mine) + shift)
    comparison = call("report", "--compare", "small", str(again.path), "--out", str(tmp_path / "two.html"))
    assert comparison.exit_code == 0, comparison.output
    assert "Attainment by method" in (tmp_path / "two.html").read_text()
    for arguments, message in (
        (("--compare", "small"), "at least two"),
        (("small", "small"), "one run at a time"),
        (("--compare", "small", str(card)), "is not a card"),
        (("--compare", "small", "small"), "is the same run as"),
        (("--compare", str(card), str(card)), "are the same card"),
    ):
        refused = call("report", *arguments)
        assert refused.exit_code == 2
        assert message in refused.output
    manifest = again.read_manifest()
    again.update(digests=manifest["digests"] | {"task": "another"})
    refused = call("report", "--compare", "small", str(again.path))
    assert refused.exit_code == 2
    assert "another task" in refused.output


def test_a_candidate_that_cannot_be_placed_is_named_and_the_others_stay(run, tmp_path):
    from raysweep.context import Context
    from raysweep.report.page import build
    from raysweep.results.front import audited_front, write_front
    from raysweep.results.trials import trial_table
    from raysweep.tasks.task import Task

    folder = RunDir(Path(shutil.copytree(run.path, tmp_path / "small")))
    context = Context(**vars(Context.load(str(run.path))) | {"run": str(folder.path)})
    written = json.loads(run.front_json.read_text())
    names = written["candidates"]
    keys = {n: written["audits"]["audit"][n] for n in names}
    trials, task = trial_table(folder, folder.run_id), Task.load(folder.task)
    lost = {"status": "failed", "value": None, "replicates": None, "reason": "RuntimeError: no memory"}

    def front_without(subjects):
        for n in subjects:
            path = folder.rows / f"{keys[n]}.parquet"
            rows = read_table(path, ROWS).to_pylist()
            write_table(path, [r | lost if r["check"] == "fidelity" else r for r in rows], ROWS)
        return audited_front(folder, context, task, [keys], trials)

    front = front_without(names[:1])
    assert front.candidates == names[1:]
    why = "fidelity.frechet was not measured (failed: RuntimeError: no memory)"
    assert front.unplaced == [f"{names[0]}: audit 1: {why}"]
    front = front_without(names)
    assert (front.candidates, front.choice.recommended, len(front.unplaced)) == ([], None, len(names))
    write_front(folder, front, folder.sweep())
    build(folder)
    assert "No candidate is recommended, because none was audited" in folder.report.read_text()


@pytest.mark.slow
def test_shadow_models_attack_a_trial(home, cache, run):
    name = audited(run)
    process = start(
        home,
        cache,
        "shadows",
        "small",
        name,
        "--models",
        "3",
        PYTHONPATH=str(home / "faulty") + os.pathsep + str(ROOT),
    )
    assert process.wait(timeout=600) == 0, log(home)
    content = json.loads((run.path / "shadows" / f"{name}.json").read_text())
    assert len(content["ratios"]["unlearned"]) == content["summary"]["shadows"] == 3
    assert len(set(content["models"].values())) == 7
    assert run.read_manifest()["state"] == "done"
    assert call("shadows", "small", "002-raises").exit_code == 2
    assert call("shadows", "small", name, "--models", "2").exit_code == 2
