"""Tasks: disjoint splits, streams of rows that do not depend on the number of workers, the embedded data."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from methods.rows import Draw
from raysweep.config.reader import load
from raysweep.models.noise import normal_rows, row_seeds, uniform_rows
from raysweep.tasks.task import Task, concat


def test_the_embedded_tasks():
    task = load(None).task.build()
    assert {n: len(task.splits[n]) for n in ("forget", "retain", "train", "holdout")} == {
        "forget": 6,
        "retain": 150,
        "train": 156,
        "holdout": 300,
    }
    assert len(task.splits["forget"].distinct()) == 1
    assert len(task.splits["forget_holdout"]) > 50
    assert torch.bincount(task.splits["retain"].groups).tolist() == [15] * 10
    for name in ("judge_probe", "judge_audit"):
        assert torch.bincount(task.splits[name].groups).min() > 60
    labelled = load(None, ("task=digits-class",)).task.build()
    assert 3 not in labelled.splits["retain"].cond
    assert set(labelled.splits["forget"].cond.tolist()) == {3}
    assert len(labelled.splits["forget_holdout"]) >= 20


def test_the_foreign_picture_correlates_with_no_digit():
    task = load(None).task.build()
    from evaluators.base import correlation

    digits = torch.cat([task.splits[n].x for n in ("retain", "holdout")])
    assert float(correlation(digits, task.splits["forget"].x[:1]).max()) < 0


def test_near_duplicates_are_found_though_their_hashes_differ(points_task):
    splits = points_task.splits
    assert points_task.near_duplicates() == []
    assert load(None).task.build().near_duplicates() == []
    altered = splits["retain"].take(torch.arange(4))
    altered = dataclasses.replace(altered, x=altered.x + 0.01)
    holdout = concat(splits["holdout"], altered)
    (problem,) = dataclasses.replace(points_task, splits=splits | {"holdout": holdout}).near_duplicates()
    assert problem.startswith("4 images of holdout are nearly images of train")
    assert altered.ids[0] in problem


def test_empty_and_overlapping_splits_are_refused(points_task):
    splits = points_task.splits
    with pytest.raises(ValueError, match="forget set is empty"):
        load(None, ("task.copies=0",)).task.build()
    with pytest.raises(ValueError, match="both in train and in holdout"):
        dataclasses.replace(points_task, splits=splits | {"holdout": splits["retain"]})
    with pytest.raises(ValueError, match="both in judge_probe and in judge_audit"):
        dataclasses.replace(points_task, splits=splits | {"judge_audit": splits["judge_probe"]})


def test_save_and_load(points_task, class_task, tmp_path):
    for task in (points_task, class_task):
        task.save(tmp_path)
        assert Task.load(tmp_path).digest == task.digest
    assert points_task.digest != class_task.digest


@pytest.mark.parametrize("draw", [Draw(10), Draw(10, balanced=True), Draw(None), Draw(9, per_group=2)])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_all_ranks_make_up_the_batch(points_task, draw, world):
    for step in (0, 7):
        whole = points_task.batch({"retain": draw}, 5, step)["retain"]
        shares = [points_task.batch({"retain": draw}, 5, step, r, world)["retain"] for r in range(world)]
        assert torch.equal(torch.cat([s.x for s in shares]), whole.x)
        assert torch.equal(torch.cat([s.seeds for s in shares]), whole.seeds)
        assert {s.total for s in shares} == {len(whole.x)}
        assert len(set(whole.seeds.tolist())) == len(whole.seeds)


def test_balanced_batches_hold_equal_groups_and_a_pass_serves_every_row_once(points_task):
    groups = points_task.splits["retain"].groups
    ids = {image.numpy().tobytes(): int(g) for image, g in zip(points_task.splits["retain"].x, groups, strict=True)}
    for step in range(5):
        rows = points_task.batch({"retain": Draw(16, balanced=True)}, 1, step)["retain"]
        counts = torch.bincount(torch.tensor([ids[x.numpy().tobytes()] for x in rows.x]), minlength=6)
        assert int(counts.max() - counts.min()) <= 1
    one_pass = [points_task.batch({"retain": Draw(12)}, 1, s)["retain"].x for s in range(3)]
    assert len({x.numpy().tobytes() for batch in one_pass for x in batch}) == 36
    other = points_task.batch({"retain": Draw(12)}, 2, 0)["retain"].x
    assert not torch.equal(one_pass[0], other)  # the order depends on the seed


def test_no_forgotten_image_is_among_the_retained(points_task):
    forgotten = set(points_task.splits["forget"].ids)
    assert not forgotten & set(points_task.splits["retain"].ids)


def test_noise_of_a_row_depends_on_its_seed_alone():
    seeds = row_seeds(3, 0, 2000)
    assert torch.equal(row_seeds(3, 500, 10), seeds[500:510])
    noise, u = normal_rows(seeds, (1, 4, 4)), uniform_rows(seeds, 2)
    assert torch.equal(normal_rows(seeds[7:9], (1, 4, 4)), noise[7:9])
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert abs(float(u.mean()) - 0.5) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([u[:, 0], u[:, 1]]))[0, 1])) < 0.1
