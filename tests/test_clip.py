"""Contrastive models: open_clip's own folders, their loss over several workers, zero-shot checks and attacks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from tiny import ROOT, clip_model, clip_task
from torch.nn import functional as F

from evaluators.contrast import zero_shot
from methods.losses import forget_loss, retain_loss
from methods.retrain import Retrain
from methods.rows import Rows
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.schema import Tier
from raysweep.models import families
from raysweep.registry import resolve, unserved

TIER = Tier(
    seed=1,
    judge="audit",
    groups=5,
    relearn_steps=(1, 20),
    checks=(
        "contrast",
        "relearning",
        "finetuning",
        "quantisation",
        "weight_noise",
        "interpolation",
        "classifier",
        "loss",
    ),
)


@pytest.fixture(scope="module")
def trained():
    task, model = clip_task(), clip_model()
    method = Retrain(model, Retrain.Hyperparameters(steps=120, batch_size=24, lr=3e-3, ema=0.0), {}, task.goal)
    method.hp = method.hp.model_copy(update={"split": "train"})
    losses = [float(method.step(task.batch(method.draws(), 0, k))["loss"]) for k in range(120)]
    method.finish()
    assert losses[-1] < losses[0]
    return task, model


def test_open_clip_reads_a_saved_model(tmp_path, trained):
    task, model = trained
    model.save(tmp_path / "m")
    plain, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'm'}")
    x, tokens = task.splits["holdout"].x[:5], task.splits["holdout"].cond[:5]
    model.net.eval()
    plain.eval()
    with torch.no_grad():
        assert torch.equal(plain.encode_image((x + 1) / 2 * 2 - 1), model.encode_image(x))
        assert torch.equal(plain.encode_text(tokens), model.encode_text(tokens))
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'm'}")
    assert torch.equal(words(["a ring"]), model.tokens(["a ring"]))
    again = families.load(tmp_path / "m")
    assert again.digest == model.digest
    assert again.image_shape == model.image_shape == (3, 8, 8)
    fixed = {n for n, p in again.net.named_parameters() if not p.requires_grad}
    assert fixed == {"token_embedding.weight"}


def test_fresh_models_differ_by_seed():
    model = clip_model()
    assert model.fresh(1).digest == model.fresh(1).digest
    assert len({model.digest, model.fresh(1).digest, model.fresh(2).digest}) == 3


@pytest.mark.parametrize("harm", ["config", "weights", "cut"])
def test_incomplete_folders_are_refused_in_one_sentence(tmp_path, harm):
    clip_model().save(tmp_path / "m")
    weights, config = tmp_path / "m" / "open_clip_model.safetensors", tmp_path / "m" / "open_clip_config.json"
    if harm == "config":
        config.write_text("{}")
    elif harm == "weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(ValueError, match="missing" if harm == "weights" else "cannot be read") as error:
        families.load(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_zero_shot_scores_equal_the_librarys(trained):
    task, model = trained
    subject = subject_of(model, task, None, TIER)
    split = task.splits["judge_audit"]
    ours = zero_shot(subject, split)
    with torch.no_grad():
        texts = F.normalize(model.net.encode_text(task.splits["prompts_audit"].cond, normalize=True), dim=-1)
        images = model.net.encode_image(split.x, normalize=True)
        expected = model.net.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(torch.from_numpy(ours), expected.double(), atol=1e-4, rtol=1e-4)
    values = measure(subject, TIER.model_copy(update={"checks": ("contrast",)})).values
    right = expected.argmax(1) == split.groups
    assert values["contrast.recognised"] == pytest.approx(float(right[split.groups == 2].double().mean()))
    assert values["contrast.retain_accuracy"] == pytest.approx(float(right[split.groups != 2].double().mean()))


def test_checks_that_apply_run_and_the_others_say_why_not(trained):
    task, model = trained
    base = subject_of(model, task, None, TIER)
    base.peers = {"base": base, "oracle-0": subject_of(model.fresh(5), task, None, TIER)}
    result = measure(base, TIER)
    status = {r.check: (r.status, r.reason) for r in result.rows}
    for name in TIER.checks:
        applies = not unserved(resolve("evaluator", name), "clip")
        assert status[name][0] == ("ok" if applies else "skipped")
        assert applies or status[name][1] == "does not apply to a clip model"
    assert result.values["relearning.presence@none"] == result.values["contrast.recognised"]


def test_relearning_brings_a_class_back(trained):
    task, model = trained
    tier = TIER.model_copy(update={"judge": "probe", "checks": ("relearning",), "relearn_steps": (100,)})
    values = measure(subject_of(model.fresh(5), task, None, tier), tier).values
    assert values["relearning.presence@none"] < 0.9 <= values["relearning.presence"]


def test_the_forget_loss_counts_rows_of_the_global_batch(trained):
    task, model = trained
    rows = task.all_rows("forget", 0)
    whole = forget_loss(model, rows)
    parts = [
        forget_loss(model, Rows(rows.x[i : i + 2], rows.cond[i : i + 2], rows.seeds[i : i + 2], rows.total))
        for i in range(0, len(rows.x), 2)
    ]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), abs=1e-6)


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
from tiny import clip_model, clip_task
from methods import gradients
from methods.losses import retain_loss
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
task, model = clip_task(), clip_model()
model.net.double()
from methods.rows import Draw
rows = task.batch({{"retain": Draw(12)}}, 0, 0, rank, 2)["retain"].to(torch.device("cpu"), torch.float64)
params = [p for p in model.net.parameters() if p.requires_grad]
loss = retain_loss(model, rows)
g = gradients.flat(loss, params)
torch.save((g, gradients.scalars(loss=loss)["loss"]), "{out}/" + str(rank))
dist.destroy_process_group()
"""


def test_two_workers_compare_all_rows(tmp_path):
    """The gradient and the value of InfoNCE over two ranks are those of one: each row meets every other."""
    from methods import gradients
    from methods.rows import Draw

    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), store=tmp_path / "store", out=tmp_path)
    workers = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [w.wait(120) for w in workers] == [0, 0]
    task, model = clip_task(), clip_model()
    model.net.double()
    rows = task.batch({"retain": Draw(12)}, 0, 0)["retain"].to(torch.device("cpu"), torch.float64)
    loss = retain_loss(model, rows)
    g = gradients.flat(loss, [p for p in model.net.parameters() if p.requires_grad])
    for rank in range(2):
        theirs, value = torch.load(tmp_path / str(rank), weights_only=True)
        torch.testing.assert_close(theirs, g, atol=1e-10, rtol=1e-8)
        assert float(value) == pytest.approx(float(loss.detach()), abs=1e-10)


def test_saved_tasks_keep_their_texts(tmp_path: Path):
    task = clip_task()
    task.save(tmp_path)
    again = type(task).load(tmp_path)
    assert again.texts == task.texts
    assert again.digest == task.digest
    assert json.loads((tmp_path / "task.json").read_text())["validity"] == "contrast.validity"
    assert replace(task, validity="other").digest != task.digest
