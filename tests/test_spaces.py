"""Search spaces and the searcher: conditions, enqueued points, trial states, equal shares, resumption, determinism."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

import search_spaces
from raysweep.registry import method_names
from raysweep.results.trials import trial_table
from raysweep.search import spaces
from raysweep.search.outcome import FINAL
from raysweep.search.searcher import ParetoSearch
from raysweep.search.spaces import Parameter, Point, Space, SpaceError
from raysweep.search.study import open_study, standings

CONDITIONAL = Space(
    "siss",
    {"batch_size": 8},
    (
        Parameter("scaling", "choice", ("renormalise", "fixed"), {}),
        Parameter("rho", "log", (0.01, 1.0), {"scaling": "renormalise"}),
        Parameter("superfactor", "log", (1.0, 10.0), {"scaling": "fixed"}),
        Parameter("steps", "logint", (2, 30), {}),
    ),
    (Point("paper", {"scaling": "renormalise", "rho": 0.1, "lam": 0.5}), Point("other", {"scaling": "fixed"})),
)
PLAIN = Space("finetune", {}, (Parameter("lr", "log", (1e-4, 1e-2), {}),), (Point("paper", {"lr": 1e-3}),))


def searcher(tmp_path, trials=8, window=4, seed=0, sampler="tpe", parts=(CONDITIONAL, PLAIN)):
    return ParetoSearch(tmp_path / "study.journal", "s", list(parts), trials, window, seed, sampler)


def result(a: float, b: float, **more):
    return {"residue": a, "damage": b, FINAL: True} | more


def value(config):
    hp = config["hyperparameters"]
    return result(hp.get("rho", hp.get("lr", 0.5)), 1 - hp.get("rho", hp.get("lr", 0.5)))


def drain(search, order=lambda batch: batch):
    """Runs a whole sweep; `order` says in which order the trials end that are under way together."""
    configs = []
    while True:
        batch = []
        while isinstance(config := search.suggest(f"t{len(configs) + len(batch)}"), dict):
            batch.append((f"t{len(configs) + len(batch)}", config))
        if config == Searcher.FINISHED and not batch:
            return configs
        for tune_id, c in order(batch):
            search.on_trial_complete(tune_id, value(c))
        configs += [c for _, c in batch]


def test_shipped_spaces_are_valid_and_cover_all_methods():
    assert set(method_names()) | {"retrain"} == set(search_spaces.names())
    for name in search_spaces.names():
        space = spaces.load(name)
        assert space.method == name
        assert space.parameters
        assert all(point.source for point in space.points)
        assert space.points


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lamda": {"log": [1, 2]}}, "'lam'"),
        ({"lam": {"log": [2, 1]}}, "inverted"),
        ({"lam": {"log": [0, 1]}}, "above 0"),
        ({"lam": {"normal": [0, 1]}}, "must be one of"),
        ({"lam": {"log": [1]}}, "two numbers"),
        ({"steps": {"int": [1.5, 2]}}, "whole numbers"),
        ({"lr": {"log": [1e-3, -1]}}, "inverted"),
        ({"lr": -1.0}, "greater than 0"),
        ({"granularity": {"choice": ["global", "nonsense"]}}, "granularity"),
    ],
)
def test_wrong_spaces_are_refused(overrides, message):
    with pytest.raises(SpaceError, match=message):
        spaces.load("rgd", overrides)


def test_a_plain_value_fixes_a_parameter():
    space = spaces.load("rgd", {"lam": 3.0})
    assert space.fixed["lam"] == 3.0
    assert "lam" not in {p.name for p in space.parameters}
    assert all("lam" not in point.values for point in space.points)


def test_enqueued_first_equal_shares_and_conditions(tmp_path):
    configs = drain(searcher(tmp_path, trials=12))
    assert [c["method"] for c in configs] == ["siss", "finetune"] * 6
    assert configs[0]["hyperparameters"]["rho"] == 0.1
    assert configs[0]["hyperparameters"]["lam"] == 0.5
    assert configs[0]["source"] == "paper"
    assert configs[1]["hyperparameters"] == {"lr": 1e-3}
    assert configs[2]["source"] == "other"
    assert configs[4]["source"] == ""
    for c in configs[::2]:
        hp = c["hyperparameters"]
        assert ("rho" in hp) == (hp["scaling"] == "renormalise")
        assert ("superfactor" in hp) == (hp["scaling"] == "fixed")
        assert hp["batch_size"] == 8
    assert len({c["seed"] for c in configs}) == 12


def test_suggestions_do_not_depend_on_the_order_of_results(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = drain(searcher(tmp_path / "a", trials=16))
    other = drain(searcher(tmp_path / "b", trials=16), order=lambda batch: batch[::-1])
    assert [c["hyperparameters"] for c in one] == [c["hyperparameters"] for c in other]
    (tmp_path / "c").mkdir()
    assert [c["hyperparameters"] for c in drain(searcher(tmp_path / "c", trials=16, seed=1))] != [
        c["hyperparameters"] for c in one
    ]


@pytest.mark.parametrize(
    ("final", "error", "state", "reason"),
    [
        (result(0.1, 0.2), False, TrialState.COMPLETE, None),
        (result(math.nan, 0.2, reason="loss is NaN"), False, TrialState.FAIL, "loss is NaN"),
        (result(math.inf, 0.2), False, TrialState.FAIL, "not finite"),
        ({"residue": 0.1, FINAL: True}, False, TrialState.FAIL, "not finite"),
        ({"residue": 0.1, "damage": 0.2}, False, TrialState.PRUNED, "stopped early"),
        (None, True, TrialState.FAIL, "ended with an error"),
    ],
)
def test_results_and_errors_become_states(tmp_path, final, error, state, reason):
    search = searcher(tmp_path)
    config = search.suggest("a")
    search.on_trial_complete("a", final, error)
    trial = search.study.planned[config["place"]]
    assert trial.state == state
    assert reason is None or reason in trial.user_attrs["reason"]
    assert trial.user_attrs["tune_id"] == "a"


def test_restore_suggests_the_unfinished_again_and_nothing_twice(tmp_path):
    search = searcher(tmp_path, window=8)
    configs = [search.suggest(k) for k in "abc"]
    search.on_trial_complete("b", value(configs[1]))
    again = searcher(tmp_path, window=8)
    again.restore("unused")
    assert again.left() == 7
    assert [c["trial"] for c in (again.suggest(k) for k in "xy")] == ["000-siss", "002-siss"]
    assert [again.suggest(k)["place"] for k in "zqrst"] == [3, 4, 5, 6, 7]
    assert again.suggest("w") == Searcher.FINISHED
    assert len(open_study(tmp_path / "study.journal", "s").trials) == 8


def test_only_trials_ended_by_a_limit_are_retried_under_a_wider_one(tmp_path):
    def limited(seconds):
        return ParetoSearch(
            tmp_path / "study.journal", "s", [CONDITIONAL, PLAIN], 4, 4, 0, limits={"train.budget_s": seconds}
        )

    search = limited(10)
    configs = [search.suggest(k) for k in "abcd"]
    search.on_trial_complete("a", result(math.nan, math.nan, reason="exceeded its budget", limit="train.budget_s"))
    search.on_trial_complete("b", result(math.nan, math.nan, reason="the gradient is not finite", limit=""))
    for k, config in zip("cd", configs[2:], strict=True):
        search.on_trial_complete(k, value(config))
    assert limited(10).retry() == limited(5).retry() == []
    wider = limited(20)
    assert wider.left() == 0
    assert wider.retry() == ["000-siss"]
    assert wider.left() == 1
    killed = limited(20)  # before it ended: it is suggested again unchanged
    assert killed.retry() == []
    again = killed.suggest("e")
    assert again == configs[0]
    killed.on_trial_complete("e", value(again))
    assert killed.left() == limited(40).left() == 0
    assert limited(40).retry() == []
    states = [t.state for t in open_study(tmp_path / "study.journal", "s").trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE, TrialState.COMPLETE]
    rows = trial_table(SimpleNamespace(journal=tmp_path / "study.journal"), "s")
    assert [r.state for r in rows] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert standings(tmp_path / "study.journal") == [(r.trial, r.state, r.reason) for r in rows]


def test_how_far_trials_are_is_read_from_the_journal_as_optuna_reads_it(tmp_path):
    search = searcher(tmp_path, window=8)
    configs = {k: search.suggest(k) for k in "abcd"}
    search.on_trial_complete("a", value(configs["a"]))
    search.on_trial_complete("b", result(math.nan, math.nan, reason="the gradient is not finite"))
    search.on_trial_complete("c", {"residue": 0.5})
    rows = trial_table(SimpleNamespace(journal=tmp_path / "study.journal"), "s")
    assert [r.state for r in rows] == ["COMPLETE", "FAIL", "PRUNED", "RUNNING"]
    assert standings(tmp_path / "study.journal") == [(r.trial, r.state, r.reason) for r in rows]


def test_optuna_and_its_dashboard_open_the_journal(tmp_path):
    drain(searcher(tmp_path))
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna_dashboard import wsgi

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    study = optuna.load_study(study_name="s", storage=storage)
    assert len(study.trials) == 8
    assert study.best_trials
    assert study.metric_names == ["residue", "damage"]
    seen, environ = [], {"PATH_INFO": "/api/studies"}
    setup_testing_defaults(environ)
    body = b"".join(wsgi(storage)(environ, lambda status, headers, *_: seen.append(status)))
    assert seen[0].startswith("200")
    assert b'"s"' in body


def test_constraint_reaches_the_study(tmp_path):
    search = searcher(tmp_path, trials=2)
    search.suggest("a")
    search.on_trial_complete("a", result(0.0, 0.9, constraint=0.3))
    assert any("constraint" in key for key in search.study.planned[0].system_attrs)


def test_the_end_of_a_trial_that_an_earlier_process_asked_for_is_recorded_whole(tmp_path):
    """Read through Optuna's public interface: a journal opened elsewhere shows attributes, reason and constraint."""
    first = searcher(tmp_path, trials=4)
    configs = [first.suggest(k) for k in "abcd"]
    again = searcher(tmp_path, trials=4)
    for k in "wxyz":
        again.suggest(k)
    again.on_trial_complete("w", result(0.2, 0.9, constraint=0.3))
    again.on_trial_complete("x", {"reason": "diverged", "train_s": 2.0, "residue": math.nan, FINAL: True})
    trials = open_study(tmp_path / "study.journal", "s").trials
    ended = [trials[c["place"]] for c in configs[:2]]
    assert [t.state for t in ended] == [TrialState.COMPLETE, TrialState.FAIL]
    assert [t.user_attrs["tune_id"] for t in ended] == ["w", "x"]
    assert json.loads(ended[0].user_attrs["result"])["residue"] == 0.2
    assert ended[1].user_attrs["reason"] == "diverged"
    assert json.loads(ended[1].user_attrs["result"]) == {"train_s": 2.0}
    assert ended[0].constraints == {"validity": 0.3}


def test_a_searcher_can_be_pickled(tmp_path):
    from ray import cloudpickle

    search = searcher(tmp_path)
    search.suggest("a")
    copy = cloudpickle.loads(cloudpickle.dumps(search))
    assert copy.suggest("b")["place"] == 0  # it attaches to the journal again
