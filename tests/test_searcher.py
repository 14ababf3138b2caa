"""The order of a search: what suggestions see and wait for, kills at any moment, and what a suggestion costs after many trials."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher
from test_spaces import CONDITIONAL, PLAIN, result, searcher, value

from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.resources import Node, make_plan
from raysweep.planning.utilisation import in_words, simulated
from raysweep.results import pareto
from raysweep.rundir import RunDir
from raysweep.search import view
from raysweep.search.spaces import Parameter, Space
from raysweep.search.study import SweepStudy, config_of, open_study
from raysweep.search.utilisation import Ahead, simulate
from raysweep.search.view import History
from raysweep.search.window import resolve_window

SUM = Space("finetune", {}, (Parameter("lr", "log", (1e-4, 1e-2), {}), Parameter("steps", "int", (1, 100), {})), ())


@pytest.fixture(autouse=True)
def no_power_failures(monkeypatch):
    """Waiting for the disk would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def run(search, flight, seed=0, stop=None):
    """Drives a search with up to `flight` trials under way that end in random order; returns hyperparameters by place."""
    draws, under_way, settings = random.Random(seed), {}, {}
    for ended in range(100_000):
        while len(under_way) < flight and isinstance(config := search.suggest(name := str(draws.random())), dict):
            under_way[name] = config
            settings[config["place"]] = config["hyperparameters"]
        if not under_way or ended == stop:
            return settings
        name = draws.choice(list(under_way))
        search.on_trial_complete(name, value(under_way.pop(name)))
    raise AssertionError("the search does not end")


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_suggestion_waits_for_all_that_it_sees_and_for_nothing_else(tmp_path):
    search = searcher(tmp_path, trials=8, window=3)
    a, b, c = (search.suggest(k) for k in "abc")
    assert search.suggest("d") is None
    search.on_trial_complete("b", value(b))
    search.on_trial_complete("c", value(c))
    assert search.suggest("d") is None  # it must see the first trial
    search.on_trial_complete("a", value(a))
    assert [search.suggest(k)["place"] for k in "def"] == [3, 4, 5]
    assert search.suggest("g") is None


@pytest.mark.parametrize("parts", [(CONDITIONAL, PLAIN), (SUM,)])
def test_neither_the_order_of_results_nor_the_number_of_workers_changes_a_suggestion(tmp_path, parts):
    runs = [
        run(searcher(folder(tmp_path, f"{flight}-{seed}"), trials=16, window=6, parts=parts), flight, seed)
        for flight, seed in ((1, 0), (3, 1), (9, 2))
    ]
    assert len(runs[0]) == 16
    assert all(settings == runs[0] for settings in runs)
    other = run(searcher(folder(tmp_path, "other"), trials=16, window=7, parts=parts), 4)
    assert other != runs[0]


def test_asynchronous_suggestions_never_wait_and_see_what_has_ended(tmp_path):
    search = searcher(folder(tmp_path, "a"), trials=40, window=None, parts=(SUM,))
    configs = {k: search.suggest(k) for k in map(str, range(20))}
    assert all(isinstance(c, dict) for c in configs.values())
    for k in ("19", "7", "11"):
        search.on_trial_complete(k, value(configs[k]))
    search.suggest("next")
    known = [t.number for t in search.histories[0].visible() if t.state == TrialState.COMPLETE]
    assert known == [7, 11, 19]
    settings = [
        run(searcher(folder(tmp_path, f"b{seed}"), trials=24, window=None, parts=(SUM,)), 6, seed) for seed in (0, 1)
    ]
    assert settings[0].keys() == settings[1].keys() == set(range(24))
    assert settings[0] != settings[1]


def test_a_search_killed_at_any_moment_continues_like_an_uninterrupted_one(tmp_path):
    """The journal is cut after every line, and within it, as a kill or a full disk would leave it."""
    whole = folder(tmp_path, "whole")
    expected = run(searcher(whole, trials=8, window=4), 3)
    lines = (whole / "study.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + 4 * 8  # two for the study; each trial is planned in one write and ends in three
    for count in range(2, len(lines) + 1, 3):
        cut = folder(tmp_path, str(count))
        rest = lines[count][:25] if count < len(lines) else b""
        (cut / "study.journal").write_bytes(b"".join(lines[:count]) + rest)
        search = searcher(cut, trials=8, window=4)
        settings = run(search, 4, seed=count)
        planned = {c["place"]: c["hyperparameters"] for c in map(config_of, search.study.planned.values())}
        assert planned == expected
        assert settings.items() <= expected.items()
        trials = open_study(cut / "study.journal", "s").trials
        assert Counter(t.state for t in trials) == {TrialState.COMPLETE: 8}


def test_opening_a_study_again_writes_nothing(tmp_path):
    run(searcher(tmp_path, trials=4), 2)
    before = (tmp_path / "study.journal").read_bytes()
    open_study(tmp_path / "study.journal", "s")
    SweepStudy(tmp_path / "study.journal", "s")
    assert (tmp_path / "study.journal").read_bytes() == before


def test_each_method_is_searched_by_its_own_trials(tmp_path):
    search = searcher(tmp_path, trials=20, window=2)
    run(search, 2)
    for history, method in zip(search.histories, ("siss", "finetune"), strict=True):
        assert {next(iter(t.params)).partition(".")[0] for t in history.visible()} == {method}


def ended(number, values, constraint=-1.0, state=TrialState.COMPLETE):
    trial = create_trial(
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        params={"x": 0.5},
        distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
        system_attrs={"constraints:validity": constraint},
    )
    trial.number = number
    return trial


def test_a_sampler_sees_the_best_and_the_latest(monkeypatch):
    monkeypatch.setattr(view, "LEARNED", 30)
    monkeypatch.setattr(view, "BEST", 10)
    monkeypatch.setattr(view, "RUNNING", 5)
    history, points = History(), np.random.default_rng(0).random((200, 2))
    points[17] = (-1, -1)  # better than all, but not valid
    for n, point in enumerate(points):
        history.start(n, ended(n, list(point)))
        if n < 180:
            state = TrialState.FAIL if n % 50 == 3 else TrialState.PRUNED if n == 100 else TrialState.COMPLETE
            history.learn(n, ended(n, list(point), 0.5 if n == 17 else -0.5, state))
    seen = history.visible()
    running = [t.number for t in seen if t.state == TrialState.RUNNING]
    known = [t.number for t in seen if t.state != TrialState.RUNNING]
    assert running == [195, 196, 197, 198, 199]
    assert len(known) == 30
    valid = [n for n in range(180) if n not in (17, 100) and n % 50 != 3]
    first_layer = {valid[i] for i in pareto.front(points[valid], ("min", "min"))}
    assert len(first_layer) <= 10
    assert first_layer <= set(known)
    best = [n for n in known if n < 150]
    assert 17 not in best
    assert set(known) >= set(range(165, 180))
    assert all(t.values is None and not t.constraints for t in seen if t.state == TrialState.RUNNING)


def test_a_suggestion_after_many_trials_reads_no_more_of_them(tmp_path, monkeypatch):
    """Counts what the sampler is shown and what is written, which do not depend on the machine."""
    monkeypatch.setattr(view, "LEARNED", 20)
    monkeypatch.setattr(view, "BEST", 5)
    monkeypatch.setattr(view, "RUNNING", 5)
    search, shown, copied = searcher(tmp_path, trials=100, window=20, parts=(SUM,)), [], []
    visible = History.visible
    monkeypatch.setattr(History, "visible", lambda self: shown.append(visible(self)) or shown[-1])
    deepcopy = copy.deepcopy
    monkeypatch.setattr("copy.deepcopy", lambda x, *memo: copied.append(x) or deepcopy(x, *memo))
    monkeypatch.setattr(search.study.storage, "get_all_trials", None)
    run(search, 8)
    assert len(shown) == 100  # once per suggestion
    assert max(map(len, shown)) == 25
    assert not [x for x in copied if isinstance(x, FrozenTrial | list)]
    assert len((tmp_path / "study.journal").read_bytes().splitlines()) == 2 + 4 * 100


def test_a_sampler_that_does_not_learn_is_shown_nothing(tmp_path, monkeypatch):
    search = searcher(tmp_path, trials=30, window=None, sampler="random", parts=(SUM,))
    monkeypatch.setattr(History, "visible", None)
    assert len(run(search, 5)) == 30


def test_a_sampler_may_leave_notes_on_trials(tmp_path, monkeypatch):
    class Notes(RandomSampler):
        def sample_relative(self, study, trial, search_space):
            earlier = [t.system_attrs["note"] for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            study._storage.set_trial_system_attr(trial._trial_id, "note", len(earlier))
            return {}

    monkeypatch.setattr("raysweep.search.searcher.resolve", lambda kind, name: lambda seed, space: Notes(seed))
    run(searcher(tmp_path, trials=6, window=2, parts=(SUM,)), 2, stop=3)
    run(searcher(tmp_path, trials=6, window=2, parts=(SUM,)), 2)
    assert [t.system_attrs["note"] for t in open_study(tmp_path / "study.journal", "s").trials] == [0, 1, 2, 3, 4, 5]


def test_learning_finds_more_than_random_draws(tmp_path):
    """The front of two objectives of one parameter and a nuisance lies in a tenth of the space."""

    def found(sampler, seed):
        search = searcher(
            folder(tmp_path, f"{sampler}{seed}"), trials=40, window=6, seed=seed, sampler=sampler, parts=(SUM,)
        )
        points, under_way = [], {}
        while len(points) < 40:
            while isinstance(config := search.suggest(f"{len(points)}-{len(under_way)}"), dict):
                under_way[f"{len(points)}-{len(under_way)}"] = config
            name = next(iter(under_way))
            hp = under_way.pop(name)["hyperparameters"]
            a, b = abs(np.log10(hp["lr"]) + 3), abs(hp["steps"] - 20) / 100
            points.append((a + b, b + 0.5 * abs(np.log10(hp["lr"]) + 2.9)))
            search.on_trial_complete(name, result(*points[-1]))
        return pareto.hypervolume(np.array(points))

    pairs = [(found("tpe", seed), found("random", seed)) for seed in range(3)]
    assert all(tpe > drawn for tpe, drawn in pairs), pairs


@pytest.mark.parametrize(
    ("settings", "concurrent", "window"),
    [
        ((), 5, 7),  # two slots
        ((), 33, 18),  # at least half of 36 trials are suggested from results
        (("search.trials=996",), 33, 100),
        (("search.trials=99996",), 1001, 5986),
        (("search.window=6",), 33, 6),
        (("search.asynchronous=true",), 33, None),
        (("search.sampler=random",), 33, None),
        (("search.trials=2", "methods=[rgd]"), 2, 1),
    ],
)
def test_the_window_follows_the_cluster(settings, concurrent, window):
    assert resolve_window(load(None, settings).search, concurrent) == window


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("search.window=0",), r"search\.window: must be a whole number from 1, or auto, not 0"),
        (("search.window=wide",), r"search\.window: must be a whole number from 1, or auto"),
        (("search.window=3", "search.asynchronous=true"), "leave search.window out"),
    ],
)
def test_wrong_windows_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(None, settings)


def test_the_window_of_a_run_is_recorded_and_reproduces_it(tmp_path):
    sweep = load(None, (f"storage={tmp_path}", "search.trials=96"))
    recorded = RunDir.of(sweep)
    with recorded.claim(sweep, {}):
        assert recorded.in_force().search.window == "auto"
        recorded.update(window=resolve_window(sweep.search, 9))
    (tmp_path / "again.yaml").write_text(recorded.in_force().recipe())
    again = load(tmp_path / "again.yaml")
    assert resolve_window(again.search, 1001) == 17
    recorded.check(again)  # the recipe resumes the run, too


def test_a_simulated_search_keeps_slots_busy():
    assert simulate(Ahead(None, 6), 2, 1, 4, lambda place: 2.0, lambda place: 0.0).seconds == 6.0
    line = simulate(Ahead(1, 4), 2, 1, 4, lambda place: 3.0, lambda place: 1.0)  # one after the other
    assert (line.seconds, line.busy) == (16.0, 12 / 32)
    lengths = np.random.default_rng(0).gamma(1 / 0.8**2, 0.8**2, 960)
    busy = {w: simulate(Ahead(w, 960), 24, 8, 33, lambda p: lengths[p], lambda p: 0.1).busy for w in (33, 100, None)}
    assert busy[33] < 0.6 < 0.8 < busy[100] < busy[None]


def test_finished_is_said_once_all_were_suggested(tmp_path):
    search = searcher(tmp_path, trials=4, window=4)
    assert [isinstance(search.suggest(k), dict) for k in "abcd"] == [True] * 4
    assert search.suggest("e") == Searcher.FINISHED


def test_the_dry_run_simulates_the_steps_that_spaces_give():
    sweep = load(None, ("methods=[finetune]", "search.trials=400"))
    plan = make_plan([Node(96, 8)] * 4, sweep)
    alike = Space("finetune", {"steps": 10}, (), ())
    apart = Space("finetune", {}, (Parameter("steps", "logint", (1, 400), {}),), ())
    busy = [simulated(sweep, [space], plan, {"finetune": 1.0}, 0.1) for space in (alike, apart)]
    assert plan.slots == 24
    assert busy[0].busy > 0.9 > busy[1].busy > 0.5
    assert busy[0].slots == 31  # an auditor is enough, as a run finds out
    assert "31 where 1 audit, as both then have as much to do, busy 9" in in_words(sweep, plan, busy[0])
    slow = simulated(sweep, [alike], plan, {"finetune": 1.0}, 20.0)
    assert slow.slots == 11
    assert slow.busy > 0.85
    groups = load(None, ("methods=[finetune]", "search.trials=400", "train.workers=8"))
    fixed = make_plan([Node(96, 8)] * 4, groups)
    assert simulated(groups, [alike], fixed, {"finetune": 1.0}, 0.1).slots == fixed.slots
    free = load(None, ("methods=[finetune]", "search.trials=400", "search.asynchronous=true"))
    assert simulated(free, [apart], plan, {"finetune": 1.0}, 0.1).busy > busy[1].busy
