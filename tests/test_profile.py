"""Where a run's time went: what is counted as useful, how attempts add up, and the trace that viewers read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from finished import front, row, run

from raysweep.dispatch.leases import Leases, Span
from raysweep.engine import profiling
from raysweep.engine.resources import Node, Plan
from raysweep.report.page import build
from raysweep.results.profile import (
    Line,
    Share,
    add_phase,
    check_table,
    measure_phase,
    phase_table,
    read_profile,
    whole,
)
from raysweep.results.run import Run
from raysweep.rundir import RunDir


def span(began: float, ended: float, key: str = "job", worker: str = "slot-1") -> Span:
    return Span(key, worker, began, ended)


def test_only_what_lies_inside_a_phase_counts_and_no_core_is_busy_twice():
    trained = [span(0, 14), span(12, 30)]  # 4 s and 8 s of them between 10 and 20
    audited = [span(13, 16), span(18, 25), span(40, 50)]  # 3 s and 2 s
    line = measure_phase("search", 10, 20, trained, audited, Share(1.0, 1.0, 2.0))
    assert (line.seconds, line.train_s, line.audit_s, line.available_s) == (10, 12, 5, 20)
    # one process until 12, two until 13, three until 14 on two cores, two until 16, one until 18, two until 20
    assert line.busy_s == 2 * 1 + 1 * 2 + 1 * 2 + 2 * 2 + 2 * 1 + 2 * 2
    assert line.busy == pytest.approx(0.8)
    roomy = measure_phase("search", 10, 20, trained, audited, Share(1.0, 1.0, 64.0))
    assert roomy.busy_s == 12 + 5


def test_shares_of_gpus_and_workers_that_train_together_are_weighted():
    line = measure_phase("search", 0, 10, [span(0, 10)], [span(0, 4)], Share(2.0, 0.5, 8.0))
    assert (line.busy_s, line.available_s) == (22, 80)
    assert measure_phase("prepare", 0, 10, [], [], Share(1.0, 1.0, 2.0)).busy == 0


def test_the_share_of_a_plan_is_of_gpus_if_it_has_some_and_of_the_nodes_that_work():
    gpus = Plan(3, 2, 8.0, 1.0, 2, 8.0, 1.0, 6, True)
    nodes = [Node(16, role="control"), Node(192, 8.0)]
    assert profiling.share_of(gpus, nodes, warm=True) == Share(2.0, 1.0, 8.0)
    cores = Plan(2, 1, 0.4, 0.0, 2, 0.4, 0.0, 0, True)
    assert profiling.share_of(cores, [Node(16, role="control"), Node(4)], warm=True) == Share(1.0, 1.0, 4.0)
    assert profiling.share_of(cores, [Node(4)], warm=False).slot is None


def logged(folder: RunDir, *outcomes: dict) -> None:
    with open(folder.path / "audits.jsonl", "a") as log:
        log.writelines("\n" + json.dumps({"status": "ok", "failed": []} | outcome) for outcome in outcomes)


def test_attempts_add_up_and_checks_come_from_the_log(tmp_path):
    folder = run(tmp_path / "a", None)
    assert read_profile(folder) == []
    logged(folder, {"key": "a", "checks": {"loss": 1.0, "fidelity": 4.0}}, {"key": "b", "seconds": 3.0})
    share = Share(1.0, 1.0, 2.0)
    add_phase(folder, measure_phase("search", 0, 10, [span(0, 6)], [span(0, 1)], share))
    add_phase(folder, measure_phase("prepare", 50, 54, [], [span(50, 52)], share))
    logged(folder, {"key": "c", "checks": {"loss": 5.0}, "failed": ["loss"]}, {"key": "d", "status": "failed"})
    add_phase(folder, measure_phase("search", 100, 130, [span(110, 120)], [], share))
    assert read_profile(folder) == [
        Line("phase", "prepare", 4.0, None, 0.0, 2.0, 2.0, 8.0),
        Line("phase", "search", 40.0, None, 16.0, 1.0, 17.0, 80.0),
        Line("check", "loss", 6.0, 2),
        Line("check", "fidelity", 4.0, 1),
    ]
    assert Run(folder.path).profile.column("name").to_pylist() == ["prepare", "search", "loss", "fidelity"]
    total = whole(read_profile(folder))
    assert (total.seconds, total.busy) == (44.0, 19 / 88)
    assert [r["phase"] for r in phase_table(read_profile(folder))] == ["prepare", "search", "all"]
    assert check_table(read_profile(folder))[0] == {"check": "loss", "audits": "2", "seconds of auditors": "6.0"}


def test_what_one_attempt_cannot_know_is_unknown_of_all(tmp_path):
    """Isolated workers tell no desk what they do; the share of another attempt alone would not be the run's."""
    folder = run(tmp_path / "a", None)
    add_phase(folder, measure_phase("search", 0, 10, [], [span(2, 3)], Share(None, 1.0, 2.0)))
    add_phase(folder, measure_phase("search", 0, 10, [span(0, 9)], [], Share(1.0, 1.0, 2.0)))
    (line,) = read_profile(folder)
    assert (line.seconds, line.audit_s, line.train_s, line.busy) == (20.0, 1.0, None, None)
    assert phase_table([line])[-1]["CPUs or GPUs busy"] == "-"
    assert "is not known, because its workers were isolated" in build(folder).read_text()


def test_the_report_states_the_share_of_useful_work(tmp_path):
    folder = run(tmp_path / "a", front([row("000-rgd", 0.05, 0.2)]))
    assert "Until this report" not in build(folder).read_text()
    logged(folder, {"key": "a", "checks": {"relearning": 7.25}})
    add_phase(folder, measure_phase("search", 0, 100, [span(0, 80)], [span(0, 40)], Share(1.0, 1.0, 2.0)))
    page = build(folder).read_text()
    assert "the run took 100 s, and 60% of the time of its CPUs, or of its GPUs if it had any, went to" in page
    assert "<td>relearning</td><td>1</td><td>7.2</td>" in page


def test_a_lease_leaves_a_span_that_ends_with_the_last_sign_of_life():
    leases = Leases(attempts=3, lease_s=10)
    leases.add("a")
    first = leases.take("w1", now=5)
    assert leases.spans == [Span("a", "w1", 5, 5)]
    leases.renew("w1", "a", first.token, now=9)
    leases.put_back("a", counts=True)  # long after its worker fell silent
    second = leases.take("w2", now=40)
    leases.renew("w2", "a", second.token, now=47)
    assert leases.spans == [Span("a", "w1", 5, 9), Span("a", "w2", 40, 47)]
    leases.end("a")
    leases.end("a")
    assert leases.spans == [Span("a", "w1", 5, 9), Span("a", "w2", 40, 47)]


def test_processes_and_threads_of_a_trace_have_numbers_and_names():
    own = profiling.own_events([span(1, 3), span(2, 5, "probe", "auditor-1"), span(4, 6, "next")], 100)
    assert [(e["name"], e["ts"], e["dur"], e["pid"], e["tid"]) for e in own if e["ph"] == "X"] == [
        ("job", 101e6, 2e6, 1, 1),
        ("probe", 102e6, 3e6, 1, 2),
        ("next", 104e6, 2e6, 1, 1),
    ]
    of_ray = [{"name": n, "ph": "X", "ts": t, "dur": d, "pid": p, "tid": "worker:a"} for n, t, d, p in CALLS]
    renamed = profiling.numbered(of_ray)
    assert {(e["pid"], e["args"]["name"]) for e in renamed if e["name"] == "process_name"} == {(2, "h1"), (3, "h2")}
    assert [e["args"]["name"] for e in renamed if e["name"] == "thread_name"] == ["worker:a"] * 3
    # x and y are on different nodes, z begins while x is under way, and v when x has ended
    rows = {e["name"]: (e["pid"], e["tid"]) for e in renamed if e["ph"] == "X"}
    assert rows == {"x": (2, 1), "y": (3, 2), "z": (2, 3), "v": (2, 1)}
    assert {e["name"] for e in profiling.longest(of_ray, 2)} == {"y", "z"}
    assert profiling.longest(of_ray, 4) == of_ray


CALLS = [
    ("v", 3.0, 0.5, "h1"),
    ("x", 1.0, 2.0, "h1"),
    ("y", 1.5, 5.0, "h2"),
    ("z", 2.5, 4.0, "h1"),
]  # name, start, duration, node


def test_a_cluster_that_is_gone_costs_the_time_line_and_not_the_run(tmp_path, monkeypatch):
    folder, said = run(tmp_path / "a", None), []
    events = SimpleNamespace(say=lambda kind, text: said.append((kind, text)))
    engine = SimpleNamespace(phases=[], folder=folder, events=events, actors=None)
    with pytest.raises(KeyError), profiling.phase(engine, "search"):
        raise KeyError
    profiling.write_timeline(engine)
    assert [kind for kind, _ in said] == ["warning", "warning"]
    assert "time of the phase search was not recorded" in said[0][1]
    assert not folder.timeline.exists()
    monkeypatch.setattr(profiling, "_spans", lambda _: ([span(1, 2)], []))
    profiling.write_timeline(engine)  # this process is not connected to Ray
    assert [kind for kind, _ in said[2:]] == ["warning", "profile"]
    assert "Ray gave no time line of its tasks: RuntimeError" in said[2][1]
    assert {e["name"] for e in json.loads(folder.timeline.read_text()) if e["ph"] == "X"} == {"job"}
