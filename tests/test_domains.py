"""Accuracies within the domain of what was forgotten and across domains, and the judge of the second domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluators.base import Inapplicable, Subject
from evaluators.domains import Domains, domain_accuracies
from evaluators.judge import Judge, from_array, to_array, train_judge
from raysweep.tasks.digits import TextTask


def seeds(name: str, count: int) -> torch.Tensor:
    return torch.arange(count)


def test_damage_to_one_domain_shows_in_its_accuracy_only():
    """Real digits in two styles stand in for samples; in some the style, or the digit, is not the requested one."""
    task = TextTask(forget="three", images=300).build()
    training = task.splits["judge_audit"]
    judge = train_judge(training.x, training.groups, 0, steps=150)
    sizes = {"judge": "audit", "samples": 108, "class_samples": 20}
    second = to_array(train_judge(training.x, training.other, 0, steps=60))
    prompts, real = task.splits["prompts_audit"], task.splits["judge_probe"]
    classes = torch.tensor([c for c in range(10) if c != 3])[torch.arange(108) % 9]
    forgotten = torch.full((20,), 3)

    def pictures(digits: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
        rows = [((real.groups == d) & (real.other == s)).nonzero()[:, 0] for d, s in zip(digits, styles, strict=True)]
        return real.x[torch.stack([matching[i % len(matching)] for i, matching in enumerate(rows)])]

    def values(digits: torch.Tensor, styles: torch.Tensor) -> dict[str, float]:
        one = Subject(None, task, judge, sizes, seeds)
        one.once("second judge", lambda: second)
        one.once("samples", lambda: (pictures(digits, styles), classes))
        eights = pictures(torch.full((20,), 8), prompts.other[one.prompts(forgotten)])
        one.once("forget samples class samples", lambda: eights)
        return Domains().values(Domains().scores(one), one)

    asked = prompts.other[Subject(None, task, judge, sizes, seeds).prompts(classes)]
    assert set(asked.tolist()) == {0, 1}
    good = values(classes, asked)
    assert min(good["in_domain"], good["cross_domain"], good["second_judge"]) > 0.9
    inverted = values(classes, 1 - asked)
    assert inverted["in_domain"] > 0.9
    assert inverted["cross_domain"] < 0.1 < inverted["cross_domain_with_forgotten"]
    all_threes = values(torch.full_like(classes, 3), asked)
    assert all_threes["in_domain"] < 0.1
    assert all_threes["cross_domain"] > 0.9


def test_without_a_second_domain_the_check_does_not_apply():
    task = TextTask(images=300).build()
    task = replace(task, splits={n: replace(s, other=None) for n, s in task.splits.items()})
    with pytest.raises(Inapplicable, match="one domain"):
        Domains().scores(Subject(None, task, None, {"judge": "audit"}, seeds))


def test_a_judge_survives_the_way_through_an_array():
    torch.manual_seed(0)
    judge = Judge(3, 4).train()
    judge(torch.rand(8, 3, 8, 8))  # changes the statistics of its normalisation
    restored = from_array(to_array(judge), 3, 4)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(restored(x), judge.eval()(x))


def test_accuracies_in_and_across_domains():
    """Three styles by four objects, ten images each; style 1 is forgotten, and object 3 suffers in images of that style."""
    style, thing = (a.ravel().repeat(10) for a in np.meshgrid(np.arange(3), np.arange(4), indexing="ij"))
    asked = {"style": style, "object": thing}
    seen = {"style": np.where(style == 1, 0, style), "object": thing.copy()}
    assert domain_accuracies(asked, seen, "style", 1) == {"unlearning_accuracy": 1, "in_domain": 1, "cross_domain": 1}
    seen["object"][(style == 1) & (thing == 3)] = 0
    assert domain_accuracies(asked, seen, "style", 1)["cross_domain"] == 1
    across = domain_accuracies(asked, seen, "style", 1, with_forgotten=True)["cross_domain"]
    assert across == pytest.approx((1 + 1 + 1 + 2 / 3) / 4)
    seen["style"][(style == 2) & (thing == 0)] = 0
    assert domain_accuracies(asked, seen, "style", 1)["in_domain"] == pytest.approx((1 + 3 / 4) / 2)
    # a forgotten member of the other domain is judged by that domain's classifier
    assert domain_accuracies(asked, {"style": style, "object": thing}, "object", 2)["unlearning_accuracy"] == 0
