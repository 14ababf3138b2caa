"""The answer of a sweep: no output recommends a candidate that remembers, is destroyed, or misses a requirement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from finished import CONCEALED, DESTROYED, LIKE, REMEMBERS, UNDECIDED, front, row, run, trial

from raysweep.cli import main
from raysweep.engine.run import Result
from raysweep.results.front import Front

GOOD, OTHER = row("000-rgd", 0.05, 0.2), row("001-siss", 0.02, 0.6)


def answer(of: Front) -> list[str]:
    return of.choice.answer(of.candidate_rows, of.verdicts)


def test_of_the_candidates_without_objections_the_one_with_the_smallest_larger_objective_is_recommended():
    of = front([GOOD, OTHER], {"000-rgd": LIKE})
    assert of.choice.recommended == "000-rgd"
    assert of.choice.reservations == of.choice.steps == ()
    assert answer(of)[0].startswith("Recommended: 000-rgd, residue 0.050 (95 % interval 0.030 to 0.070)")
    assert of.choice.standing("001-siss").startswith("not recommended: it was not attacked")


@pytest.mark.parametrize(("candidate", "verdict", "more", "reason"), [
    (row("000-rgd", 0.05, 0.2), REMEMBERS, {}, "without any attack, presence exceeds that of the oracles (+0.53)"),
    (row("000-rgd", 0.4, 0.2), LIKE, {}, "has not forgotten: residue 0.400 (95 % interval 0.380 to 0.420) lies above 0.1"),
    (row("000-rgd", 0.6, 0.2, 0.5), LIKE, {}, "as near to the base as to the oracles"),
    (row("000-rgd", 0.05, 0.2, 0.96), LIKE, {}, "it may have forgotten nothing, its audit cannot tell: residue 0.050 (95 % interval 0.000 to 1.010)"),
    (row("000-rgd", 0.0, 1.2), LIKE, {}, "as damaged as a destroyed model"),
    (row("000-rgd", 0.05, 0.2), DESTROYED, {}, "destroyed"),
    (row("000-rgd", 0.05, 0.2), None, {"valid": {"000-rgd": (0.1, 0.9)}}, "10% of its samples are valid, 90% of the oracles'"),
    (row("000-rgd", 0.05, 0.2), LIKE, {"unmet": {"000-rgd": ["generation.rate <= 0.01"]}}, "what was required: generation.rate <= 0.01"),
])  # fmt: skip
def test_a_candidate_with_an_objection_is_not_recommended(candidate, verdict, more, reason):
    of = front([candidate], {} if verdict is None else {"000-rgd": verdict}, **more)
    assert of.choice.recommended is None
    first, *rest = answer(of)
    assert first.startswith("No candidate is recommended. Best so far is 000-rgd: ")
    assert reason in first
    assert any(line.startswith("Try next: ") for line in rest)
    assert not any(line.startswith("Recommended") for line in (first, *rest))
    assert of.choice.standing("000-rgd").startswith("best so far, but not recommended")


def test_no_certainty_at_the_edge():
    """A residue that is cut at 0 has an upper limit, and never an interval of width 0."""
    of = front([row("000-rgd", 0.0, 0.2, residue_hi=0.04)], {"000-rgd": LIKE})
    assert "residue at most 0.040 (95 %), damage 0.200 (95 % interval" in answer(of)[0]
    beyond = row("000-rgd", 0.0, 0.2, residue_hi=0.0)
    assert beyond.in_words("residue") == "residue 0 (every view lies beyond the oracles)"
    assert beyond.in_brief("residue") == "0 (beyond)"


def test_a_residue_within_that_of_an_oracle_is_no_objection():
    of = front([row("000-rgd", 0.2, 0.1)], {"000-rgd": LIKE})
    assert of.choice.recommended is None
    of.rows.append(row("oracle-2", 0.25, 0.0))
    assert of.choice.recommended == "000-rgd"
    assert of.choice.reservations == ()


def test_a_candidate_that_holds_under_attack_is_preferred_to_one_that_remembers():
    of = front([GOOD, OTHER], {"000-rgd": REMEMBERS, "001-siss": LIKE})
    assert of.choice.recommended == "001-siss"
    assert "has not forgotten" in of.choice.standing("000-rgd")


def test_an_unattacked_candidate_is_not_recommended_if_others_were_attacked():
    of = front([GOOD, OTHER], {"000-rgd": REMEMBERS})
    assert of.choice.recommended is None
    assert of.choice.trial == "001-siss"
    assert any("attack 001-siss" in step for step in of.choice.steps)


def test_the_best_so_far_is_none_that_was_not_attacked_and_that_another_dominates():
    worse = row("001-siss", 0.06, 0.3, on_front=False)
    of = front([GOOD, worse], {"000-rgd": REMEMBERS})
    assert of.choice.trial == "000-rgd"
    assert answer(of)[0].startswith("No candidate is recommended. Best so far is 000-rgd: it has not forgotten")
    assert any("attack 001-siss" in step for step in of.choice.steps)
    concealed = row("002-rgd", 0.6, 0.7, on_front=False)
    assert front([GOOD, worse, concealed], {"000-rgd": REMEMBERS, "002-rgd": CONCEALED}).choice.trial == "002-rgd"


def test_advice_names_a_few_of_many_candidates():
    rows = [GOOD, *(row(f"{k:03}-siss", 0.05, 0.9 - k / 1000) for k in range(1, 101))]
    (step,) = [s for s in front(rows, {"000-rgd": REMEMBERS}).choice.steps if s.startswith("attack")]
    assert step.startswith("attack 100-siss, 099-siss, 098-siss, 097-siss, 096-siss and 95 more, to which there is no")


@pytest.mark.parametrize(("candidates", "verdicts", "reservation"), [
    ([row("000-rgd", 0.088, 0.05, 0.214)], {"000-rgd": LIKE}, "does not show a residue under 0.1: residue 0.088 (95 % interval 0.000 to 0.302)"),
    ([row("000-rgd", 0.02, 0.3, damage_hi=0.7)], {"000-rgd": LIKE}, "its damage is uncertain"),
    ([row("000-rgd", 0.05, 0.2, 0.09), row("001-siss", 0.05, 0.21, 0.09)], dict.fromkeys(("000-rgd", "001-siss"), LIKE), "another candidate is the better one in"),
    ([GOOD], {"000-rgd": CONCEALED}, "come back (concealed: relearning 5 steps (+0.30))"),
    ([GOOD], {"000-rgd": UNDECIDED}, "whether attacks bring the forgotten data back is undecided"),
    ([GOOD], {}, "it was not attacked"),
])  # fmt: skip
def test_uncertainty_about_a_recommended_candidate_is_a_reservation(candidates, verdicts, reservation):
    of = front(candidates, verdicts)
    assert of.choice.recommended == "000-rgd"
    first, *rest = answer(of)
    assert first.startswith("Recommended with reservations: 000-rgd")
    assert any(line.startswith("Reservation: ") and reservation in line for line in rest)
    assert of.choice.standing("000-rgd").startswith("recommended with reservations: ")


def test_failed_attacks_are_distinguished_from_attacks_not_made():
    of = front([GOOD], {}, gaps={"000-rgd": "the attacks on it failed"})
    assert "the attacks on it failed, so whether" in of.choice.reservations[0]
    other = front([GOOD, OTHER], {"001-siss": LIKE}, gaps={"000-rgd": "the attacks on it failed"})
    assert other.choice.recommended == "001-siss"
    assert other.choice.against["000-rgd"] == ("the attacks on it failed, so it may remember",)


def test_a_terminal_without_a_front_says_so(monkeypatch, tmp_path):
    from raysweep.rundir import RunDir

    result = Result(RunDir(tmp_path), front([]), [trial("000-rgd")], ["000-rgd: no answer within 600 s"])
    monkeypatch.setattr("raysweep.engine.run.run_sweep", lambda *_: result)
    printed = CliRunner().invoke(main, ["run"])
    assert printed.exit_code == 3
    assert "no front: no candidate was audited; 0 of 1 trials failed" in printed.output
    assert "hypervolume" not in printed.output
    assert "No candidate is recommended, because none was audited." in printed.output


def test_the_next_steps_name_the_setting_that_decides_an_uncertain_objective():
    steps = " ".join(front([row("000-rgd", 0.088, 0.3, 0.214)], {"000-rgd": LIKE}).choice.steps)
    assert "audit.audit.noises" in steps
    assert "audit.audit.samples" in steps


def test_an_undecided_verdict_is_said_once_with_the_setting_that_decides_it():
    lines = answer(front([GOOD], {"000-rgd": UNDECIDED}))
    assert sum(UNDECIDED.sentence() in line for line in lines) == 1
    assert "Try next: decide the verdict: audit.attack_draws=3 or more." in lines
    by_oracles = replace(UNDECIDED, draws=None, oracles=10)
    assert "Try next: decide the verdict: oracles=10 or more." in answer(front([GOOD], {"000-rgd": by_oracles}))


def test_candidates_that_could_be_recommended_are_attacked_first():
    rows = [row("000-rgd", 0.9, 0.0), row("001-siss", 0.05, 0.95), row("002-rgd", 0.0, 1.5, on_front=False)]
    assert front(rows).finalists(2) == ["001-siss", "000-rgd"]
    assert front([]).finalists(3) == []


@pytest.fixture
def remembering(tmp_path) -> Path:
    """A run whose best candidate remembers."""
    return run(tmp_path / "remembering", front([GOOD], {"000-rgd": REMEMBERS})).path


def call(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_every_output_of_a_run_says_the_same(remembering):
    """front.json, report, status, show, export's warning and the model card; the terminal below."""
    from raysweep.export.modelcard import page
    from raysweep.rundir import RunDir

    written = json.loads((remembering / "front.json").read_text())
    assert written["recommended"]["trial"] is None
    assert written["best"]["trial"] == "000-rgd"
    assert call("report", str(remembering)).exit_code == 0
    html = (remembering / "report.html").read_text()
    screen = html[html.index('<section class="answer"') : html.index("</section>")]
    assert "No candidate is recommended. Best so far is 000-rgd: it has not forgotten" in screen
    assert "Try next" in screen
    assert "Recommended" not in html
    assert "No candidate is recommended" in call("status", str(remembering)).output
    assert "of the previous attempt" not in call("status", str(remembering)).output
    RunDir(remembering).update(state="interrupted")
    assert "answer of the previous attempt:\nNo candidate is recommended" in call("status", str(remembering)).output
    assert "best so far, but not recommended: it has not forgotten" in call("show", str(remembering), "000-rgd").output
    digests = {"base_digest": "b", "task_digest": "t", "outcome": {"digest": "d"}}
    card = {"trial": "000-rgd", "method": "rgd", "seed": 0, "hyperparameters": {}, **digests}
    text = page(RunDir(remembering), card, remembering / "candidates" / "000-rgd")
    assert "this candidate is best so far, but not recommended: it has not forgotten" in text
    assert "±" not in text + html


def test_the_terminal_says_it_and_offers_no_export(remembering, monkeypatch):
    from raysweep.rundir import RunDir

    for verdict, recommended in ((REMEMBERS, False), (LIKE, True)):
        of = front([GOOD], {"000-rgd": verdict})
        result = Result(RunDir(remembering), of, [], [])
        monkeypatch.setattr("raysweep.engine.run.run_sweep", lambda *_, result=result: result)
        printed = call("run")
        assert printed.exit_code == 0
        assert ("raysweep export" in printed.output) == recommended
        assert ("No candidate is recommended. Best so far is 000-rgd" in printed.output) == (not recommended)
        assert "+-" not in printed.output


def test_the_comparison_shows_each_runs_answer(remembering, tmp_path):
    from raysweep.report.compare import runs_table
    from raysweep.rundir import RunDir

    other = run(tmp_path / "other", front([OTHER], {"001-siss": LIKE}), "search.seed=5")
    answers = [s.answer for s in runs_table([RunDir(remembering), other]).sweeps]
    assert answers[0].startswith("No candidate is recommended")
    assert answers[1].startswith("Recommended: 001-siss")
