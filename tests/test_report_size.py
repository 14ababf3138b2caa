"""What of a report grows with the sweep, and what does not, on runs that `benchmarks/report.py` writes."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import report

from raysweep.report import data as report_data
from raysweep.report import figures
from raysweep.report.data import gather
from raysweep.report.page import build
from raysweep.results import trials as results_trials
from raysweep.results.trials import points_of, save_trials, study_size, trials_of
from raysweep.rundir import RunDir

METHODS = ("siss", "rgd")
DETAILED, PICTURED, DRAWN = 6, 2, 160


@pytest.fixture(scope="module")
def runs(tmp_path_factory, points_task) -> list[RunDir]:
    """Sweeps of 100 and of 1000 trials, of which 8 and 16 were audited, with few and small scores."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FEATURES", (20, 4))
        patch.setattr(report, "FILLERS", 4)
        sizes = ((100, 8), (1000, 16))
        return [report.make_run(folder / f"run-{n}", n, audited, METHODS, points_task) for n, audited in sizes]


@pytest.fixture
def few(monkeypatch):
    """Limits that both sweeps exceed."""
    monkeypatch.setattr(report_data, "DETAILED", DETAILED)
    monkeypatch.setattr(report_data, "PICTURED", PICTURED)
    monkeypatch.setattr(figures, "DRAWN", DRAWN)


def text_of(run: RunDir) -> str:
    """The page without scripts of its library."""
    return re.sub(r"<script>.*?</script>", "", unescape(build(run).read_text()), count=1, flags=re.DOTALL)


def test_the_page_of_a_sweep_ten_times_as_large_is_no_larger(runs, few):
    small, large = (text_of(run) for run in runs)
    assert len(large) < 1.2 * len(small)
    for run, page in zip(runs, (small, large), strict=True):
        candidates = gather(run).candidates()
        lines = page[page.index("search saw") : page.index("P(dominated): the probability")]
        assert lines.count("<tr><td>") == DETAILED + 5  # base, three oracles, destroyed
        assert f"{len(candidates) - DETAILED} more audited candidates are in" in page
        assert page.count("<details") == DETAILED + 5 + 2  # and versions and config
        for table in ("front.json", "front.parquet", "trials.parquet"):
            assert f'<a href="{table}">{table}</a>' in page
            assert (run.report.parent / table).is_file()


def test_what_is_shown_in_detail_begins_with_the_best_and_the_front(runs, few):
    data = gather(runs[1])
    shown = [p for p in data.detailed if p.is_candidate]
    assert len(shown) == DETAILED
    assert data.front["best"]["trial"] in data.subjects
    members = [p for p in data.candidates() if p.on_front]
    assert sum(bool(p.on_front) for p in shown) == min(DETAILED, len(members))
    pictured = {subject for subject, score in data.scores if score == "strip.samples"}
    assert len(pictured) == PICTURED + 5
    assert pictured < {*data.subjects}
    assert {score.partition(".")[0] for _, score in data.scores} == {"loss", "strip"}
    assert all("replicates" not in r for r in data.rows)


def test_figures_draw_each_methods_front_and_an_even_share_of_the_others(runs, few):
    data = gather(runs[1])
    for method, trials in figures.drawn(data).items():
        everything = data.completed(method)
        assert len(trials) == DRAWN // len(METHODS) < len(everything)
        names = {t.trial for t in trials}
        members = figures.pareto.front(points_of(everything), ("min", "min"))
        assert {everything[k].trial for k in members} <= names
        numbers = [t.number for t in trials]
        assert numbers == sorted(numbers)
        assert numbers[-1] - numbers[0] > 0.9 * 1000
    assert figures.drawn_in_words(data).startswith(f"{DRAWN} of {sum(t.is_complete for t in data.trials)} completed")


def test_everything_is_drawn_if_it_fits(runs):
    data = gather(runs[0])
    assert figures.drawn_in_words(data) == ""
    assert data.left_out == 0
    assert "more audited candidates" not in text_of(runs[0])


def test_failures_are_grouped_by_reason(runs):
    page = text_of(runs[1])
    gaps = page[page.index('id="gaps"') : page.index('id="glossary"')]
    failed = [t for t in gather(runs[1]).trials if t.has_failed]
    assert len(failed) > 20
    assert gaps.count("the loss is not finite after") == len({t.reason for t in failed})
    assert failed[0].trial in gaps


def test_trials_come_from_their_table_as_long_as_the_study_is_the_same(runs, monkeypatch):
    run = runs[0]
    stored = trials_of(run)
    assert len(stored) == 100
    monkeypatch.setattr(results_trials, "trial_table", lambda *_: [])
    assert trials_of(run) == stored
    run.journal.write_text("{}\n")  # the study went on
    try:
        assert trials_of(run) == []
        save_trials(run, stored, study_size(run))
        assert trials_of(run) == stored
    finally:
        run.journal.unlink()
        save_trials(run, stored, study_size(run))
