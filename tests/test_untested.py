"""What an audit did not test: every gap is named, with what closes it, and nothing that was tested is called a gap."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tiny import clip_task, latent_task, tiny_model, tiny_task

from evaluators.judge import Judge
from evaluators.tampering import IMAGES
from raysweep.auditing.anchors import View
from raysweep.auditing.informative import LEAST, measured
from raysweep.auditing.measure import measure, subject_of
from raysweep.auditing.untested import (
    MISSING,
    Result,
    StoredFacts,
    applies,
    few_oracles,
    left_out,
    not_implemented,
    untested,
)
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError
from raysweep.engine.checks import check_tiers
from raysweep.registry import attacks, checks_by_weights, names
from raysweep.tasks.base import OBJECTIVES

TASKS = {
    "points": StoredFacts("points", "pixel-ddpm", ("generation.rate",), "fidelity.frechet", "classifier.validity"),
    "class": StoredFacts("class", "pixel-ddpm", ("classifier.recognised",), "fidelity.frechet", "classifier.validity"),
    "concept": StoredFacts("concept", "text-ddpm", ("classifier.leak",), "fidelity.frechet", "classifier.validity"),
    "points with captions": StoredFacts(
        "points", "text-ddpm", ("generation.rate",), "fidelity.frechet", "classifier.validity"
    ),
    "contrastive": StoredFacts(
        "concept", "clip", ("contrast.recognised",), "contrast.retain_loss", "contrast.validity"
    ),
}


def tiers(**changes):
    audit = load(None, ()).audit
    return {name: getattr(audit, name).model_copy(update=changes.get(name, {})) for name in ("audit", "durability")}


def named(lines, name):
    """The sentences that name a check, not as a part of another name or setting."""
    return [line for line in lines if re.search(rf"(?<![\w.]){name}(?!\w)(?!\.\w)", line)]


@pytest.mark.parametrize("kind", TASKS)
def test_each_check_that_fits_is_either_measured_or_named_with_what_adds_it(kind, tmp_path):
    task, given = TASKS[kind], tiers()
    lines, used = left_out(task, given), {n for t in given.values() for n in t.checks_for(task)}
    for name in names("evaluator"):
        assert bool(named(lines, name)) == (applies(name, task) and name not in used), name
    missing = [n for n in names("evaluator") if named(lines, n)]
    by_weights = checks_by_weights()
    for n in missing:
        (line,) = named(lines, n)
        adds = "audit.durability.checks" if n in attacks() else "audit.audit.checks"
        assert (f"audit.audit.weights.{by_weights[n]}" if n in by_weights else adds) in line
    more = (*given["audit"].checks, *(n for n in missing if n not in by_weights and n not in attacks()))
    weights = {by_weights[n]: tmp_path for n in missing if n in by_weights}
    complete = tiers(audit={"checks": more, "weights": weights}, durability={"checks": attacks()})
    assert left_out(task, complete) == []


def test_an_attack_that_is_switched_off_is_named():
    kept = tuple(n for n in tiers()["durability"].checks if n not in ("inversion", "quantisation"))
    (line,) = [x for x in left_out(TASKS["class"], tiers(durability={"checks": kept})) if "attacks" in x]
    assert "quantisation, inversion, inpainting. Name them in audit.durability.checks" in line
    (line,) = [x for x in left_out(TASKS["points"], tiers(durability={"checks": kept})) if "attacks" in x]
    assert "inversion" not in line  # it does not apply to images
    without = {"audit": tiers()["audit"]}
    assert any("audit.finalists" in x for x in left_out(TASKS["class"], without))


def test_failures_and_skips_are_stated_with_their_reasons(monkeypatch):
    def broken(self, scores, subject):
        raise RuntimeError("no memory")

    monkeypatch.setattr("evaluators.denoising.Denoising.values", broken)
    task, audit = tiny_task(), load(None, ("audit.audit.seed=2",)).audit.audit.in_force(1000, 4)
    tier = audit.model_copy(
        update={"checks": ("denoising", "lira", "loss", "per_class"), "membership_t": (50,), "membership_noises": 1}
    )
    measurement = measure(subject_of(tiny_model(task), task, Judge(1, 6).eval(), tier), tier)
    results = [Result("mine", "audit", r.check, r.name, r.status, r.reason) for r in measurement.rows]
    lines = untested(task, {"audit": tier}, results)
    assert "denoising failed in the tier audit on mine: RuntimeError: no memory." in lines
    assert "lira was skipped: needs 2 oracles besides the model itself; there are 0." in lines
    assert not [x for x in lines if x.startswith(("loss ", "per_class "))]  # measured; not meant for this task


def test_a_check_that_one_model_allows_is_not_called_skipped():
    task = TASKS["class"]
    row = Result("base", "durability", "sampler_removal", "presence", "skipped", "the model is sampled as its base is")
    other = row._replace(subject="2-sld", status="ok", reason="")
    assert any("sampler_removal was skipped" in x for x in untested(task, {}, [row]))
    assert not any("sampler_removal was skipped" in x for x in untested(task, {}, [row, other]))


@pytest.mark.parametrize("kind", ["points", "class"])
def test_measured_checks_of_low_power_are_named_with_that_power(kind):
    task, powers = TASKS[kind], measured()[kind]
    results = [Result("mine", "audit", *key.split("."), "ok", "") for key in powers]
    lines = [x for x in untested(task, {}, results) if "shows little" in x]
    weak = {key: auc for key, (auc, _, _) in powers.items() if auc < LEAST}
    assert weak
    assert {x.split()[0] for x in lines} == {key.split(".")[0] for key in weak}
    for key, auc in weak.items():
        check, metric = key.split(".")
        assert f"{metric} {auc:.2f} (" in next(x for x in lines if x.startswith(f"{check} "))
    absent = [r._replace(status="skipped") for r in results]
    assert not any("shows little" in x for x in untested(task, {}, absent))
    assert any("not for concept" in x for x in untested(TASKS["concept"], {}, results))


def test_views_that_do_not_tell_base_from_oracle_are_named():
    views = [View("a.b", 1.0, 0.0, 0.1, True, ""), View("c.d", 0.1, 0.1, 0.1, False, "base and oracle are both 0.1")]
    lines = untested(TASKS["class"], {}, [], views)
    assert "The view c.d is not part of the residue: base and oracle are both 0.1." in lines
    assert not any("a.b" in x for x in lines)


def test_attacks_that_do_not_exist_are_listed_for_the_tasks_that_they_concern():
    lists = {kind: " ".join(not_implemented(task)) for kind, task in TASKS.items()}
    for kind, has_prompts in (("points", False), ("class", False), ("concept", True), ("points with captions", True)):
        assert ("adversarial prompts" in lists[kind]) == has_prompts
        assert ("new token" in lists[kind]) == has_prompts
        assert "inpainting" in lists[kind]
        assert "classifier guides" in lists[kind]
        assert "low-rank adapters" in lists[kind]
        assert ("concept arithmetic" in lists[kind]) == (kind in ("class", "concept"))
    assert "optimised against the model" in lists["points with captions"]
    assert "P4D" in lists["concept"]
    assert "adversarial pictures" in lists["contrastive"]
    assert "inpainting" not in lists["contrastive"]
    for missing in MISSING:
        assert any(missing.sentence in text for text in lists.values()), missing
        assert missing.sentence.endswith(".")
    assert f"more than {IMAGES} forgotten images" in lists["class"]
    stranger = StoredFacts("class", "not-installed", (), "fidelity.frechet", "classifier.validity")
    assert set(not_implemented(TASKS["class"])) <= set(not_implemented(stranger))


def test_tasks_serve_as_facts():
    for task in (tiny_task(), latent_task(), clip_task()):
        facts = StoredFacts(task.kind, task.family, task.views, task.quality, task.validity)
        assert untested(task, tiers(), []) == untested(facts, tiers(), [])


def test_few_oracles_are_a_gap():
    assert [len(few_oracles(n)) for n in (None, 1, 2, 3)] == [0, 1, 1, 0]


@pytest.mark.parametrize(("kind", "added"), [("points", "altered"), ("class", "denoising")])
def test_a_list_of_checks_may_leave_out_the_views_that_add_to_others_and_no_other_view(kind, added):
    task = replace(tiny_task(kind), views=OBJECTIVES[kind].views)
    needed = sorted({metric.split(".")[0] for metric in (*task.views, task.quality, task.validity)})

    def sweep(without: str):
        return load(None, (f"audit.audit.checks={json.dumps([name for name in needed if name != without])}",))

    check_tiers(sweep(added), task)
    for name in sorted(set(needed) - {added}):
        with pytest.raises(ConfigError, match=rf"audit\.audit\.checks: '{name}' is missing"):
            check_tiers(sweep(name), task)
