"""Concept tasks on latent text-to-image models: prompts, training of modules and adapters, checks, and oracles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_latent import plain
from tiny import ROOT, flow_model, flow_task, latent_task
from transformers import CLIPTextModel

from evaluators.judge import Judge
from methods.retrain import Retrain, RetrainSettings
from raysweep.auditing.measure import measure, subject_of
from raysweep.config.reader import load
from raysweep.config.schema import ConfigError, Sweep, Tier
from raysweep.engine.audit_model import audit_model
from raysweep.engine.checks import resolve_sweep
from raysweep.engine.events import Silent
from raysweep.engine.model_checks import check_oracles
from raysweep.models import families
from raysweep.models.latent import ATTENTION
from raysweep.registry import EVALUATORS, checks_by_weights, resolve, unserved
from raysweep.tasks.task import Split, encoded
from raysweep.train.jobs import Job
from raysweep.train.loop import Resident, run


def new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("modules", "calls"), [(("unet",), 1), ((), 3)])
def test_frozen_text_encoders_run_once_for_all_trials(tmp_path, monkeypatch, modules, calls):
    """One forward pass covers up to 32 prompts; encoders that train run at every step."""
    task, base = latent_task(), plain()
    task.save(new_folder(tmp_path / "task"))
    base.save(tmp_path / "base")
    ran, resident, digests = [], Resident(), []
    forward = CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    for name in ("first", "second"):
        job = Job(
            id=name,
            kind="train",
            method="finetune",
            hyperparameters={"lr": 1e-2, "steps": 3, "batch_size": 8},
            seed=1,
            task=str(tmp_path / "task"),
            base=str(tmp_path / "base"),
            out=str(tmp_path / name),
            modules=modules,
        )
        digests.append(run(job, resident).digest)
        assert len(ran) == (calls if name == "first" or modules else 2 * calls)
    assert digests[0] == digests[1]
    fresh = replace(job, out=str(tmp_path / "third"))
    assert run(fresh, Resident()).digest == digests[0]


def test_models_that_are_compared_share_their_autoencoder(tmp_path):
    example = ROOT / "examples" / "text-to-image.yaml"
    model = families.build(load(example).task.build(), 0)
    model.save(tmp_path / "base")
    model = model.fresh(1)
    for weights in model.frozen.vae.parameters():
        weights.data = weights.data.half().float()
    model.save(tmp_path / "rounded")
    next(iter(model.frozen.vae.parameters())).data.add_(0.1)
    model.save(tmp_path / "other")
    model.fresh(2).save(tmp_path / "third")

    def sweep_with(oracle: str) -> Sweep:
        return load(example, (f"task.base={tmp_path / 'base'}", f"oracle_models=[{tmp_path / oracle}]"))

    sweep = sweep_with("rounded")
    assert set(check_oracles(sweep, sweep.task.build())) == {"oracle-0"}
    refused = "other has another autoencoder than the base"
    with pytest.raises(ConfigError, match=f"^oracle_models: .*{refused}"):
        check_oracles(sweep_with("other"), sweep.task.build())
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'third'} has another autoencoder"):
        audit_model(tmp_path / "third", sweep, Silent())


def test_latents_are_kept_by_content(tmp_path):
    model = plain()
    task = latent_task()
    first = encoded(task, model, tmp_path)
    assert first.splits["retain"].x.shape == (18, 2, 4, 4)
    torch.testing.assert_close(first.splits["retain"].x, model.encode(task.splits["retain"].x), atol=1e-5, rtol=1e-5)
    files = set(tmp_path.iterdir())
    assert torch.equal(encoded(task, model, tmp_path).splits["retain"].x, first.splits["retain"].x)
    assert set(tmp_path.iterdir()) == files
    next(iter(files)).write_bytes(b"cut")
    assert torch.equal(encoded(task, model, tmp_path).splits["train"].x, first.splits["train"].x)
    with torch.no_grad():
        next(iter(model.frozen.vae.encoder.parameters())).add_(0.1)
    assert not torch.equal(encoded(task, model, tmp_path).splits["retain"].x, first.splits["retain"].x)


def test_prompts_of_search_and_audit_must_differ():
    task = latent_task()
    probe = task.splits["prompts_probe"]
    same, said = task.splits | {"prompts_audit": probe}, task.texts["prompts_probe"]
    with pytest.raises(ValueError, match="4 prompts are used both by the search and by the audit"):
        replace(task, splits=same, texts={"prompts_probe": said, "prompts_audit": said})
    longer = tuple(f"{text} that is cut off" for text in said)
    message = r"4 prompts of .* are the same to the text encoder, which reads 6 tokens .*: 'a (\w+)' and 'a \1 that is cut off'"
    with pytest.raises(ValueError, match=message):
        replace(task, splits=same, texts=task.texts | {"prompts_audit": longer})
    mixed = Split(probe.x, probe.cond[[0, 0, 2, 3]], probe.groups)
    with pytest.raises(ValueError, match=r"prompts_probe asks for different classes by .* 'a dot' and 'a bar'"):
        replace(task, splits=task.splits | {"prompts_probe": mixed})
    few = Split(probe.x[:2], probe.cond[:2], probe.groups[:2])
    with pytest.raises(ValueError, match="prompts_probe has no prompt for the classes"):
        replace(task, splits=task.splits | {"prompts_probe": few})


def test_a_task_survives_saving(tmp_path):
    task = latent_task()
    task.save(tmp_path)
    again = type(task).load(tmp_path)
    assert again.digest == task.digest
    assert again.goal == task.goal
    assert again.goal.concept == tuple(plain().tokens(["a ring"])[0].tolist())
    assert again.thing == "the concept 'ring'"


@pytest.mark.parametrize("family", ["text-ddpm", pytest.param("flow", marks=pytest.mark.slow)])
def test_every_check_on_a_concept(family):
    """All checks run on prompts and latents; the audit asks with other prompts than the search."""
    task, model = (flow_task(), flow_model()) if family == "flow" else (latent_task(), plain())
    torch.manual_seed(0)
    judge = Judge(3, 4)
    left_out = ("quantile", "secmi", "nudenet", *checks_by_weights())
    tier = Tier(
        seed=1,
        judge="audit",
        checks=tuple(n for n in EVALUATORS if n not in left_out),
        groups=5,
        samples=20,
        class_samples=10,
        noises=5,
        loss_noises=5,
        loss_images=4,
        timesteps=3,
        membership_images=12,
        membership_t=(50, 150),
        membership_stride=10,
        membership_noises=2,
        relearn_steps=(1,),
        inversion_steps=2,
        prompt_tokens=1,
        prompt_steps=1,
        prompt_candidates=4,
        prompt_generations=1,
        injection_steps=3,
        recall_noises=5,
        likelihood_steps=3,
        likelihood_probes=1,
        strips=2,
    )
    subject = subject_of(model, task, judge, tier)
    subject.peers = {"base": subject} | {f"oracle-{k}": subject_of(model.fresh(k), task, judge, tier) for k in range(2)}
    prompts = {tuple(p) for p in subject.forgotten(6).tolist()}
    assert prompts == {tuple(model.tokens(["the small ring"])[0].tolist())}
    result = measure(subject, tier)
    statuses = {(r.check, r.status) for r in result.rows}
    # the base's own sampler is not another one; the prompts have no seeds; prompts are searched for in one vocabulary, and T5 has its own
    impossible = {"sampler_removal", "published"} | ({"unlearndiffatk", "ring_a_bell"} if family == "flow" else set())
    for name in tier.checks:
        check = resolve("evaluator", name)
        applies = "concept" in check.kinds and not unserved(check, family) and name not in impossible
        assert (name, "ok" if applies else "skipped") in statuses
    assert result.scores["strip.forgotten"].shape == (2, 3, 8, 8)


def test_training_lowers_the_loss_of_latents_and_keeps_the_autoencoder():
    task, model = latent_task(), plain()
    before = model.encoder_digest
    latents = encoded(task, model)
    method = Retrain(model, RetrainSettings(steps=60, batch_size=24, split="train", label_drop=0.2), {}, latents.goal)
    losses = [float(method.step(latents.batch(method.draws(), 0, k))["loss"]) for k in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert model.encoder_digest == before


def test_adapters_learn_and_are_merged(tmp_path):
    """The candidate has the base's tensors and no adapter; its U-Net's attention has changed, and nothing else."""
    task, base = latent_task(), plain()
    task.save(new_folder(tmp_path / "task"))
    base.save(tmp_path / "base")
    job = Job(
        id="t",
        kind="train",
        method="finetune",
        hyperparameters={"lr": 1e-2, "steps": 3, "batch_size": 8},
        seed=1,
        task=str(tmp_path / "task"),
        base=str(tmp_path / "base"),
        out=str(tmp_path / "out"),
        lora={"rank": 2, "alpha": 2},
    )
    outcome = run(job, Resident())
    assert outcome.status == "ok", outcome.reason
    candidate = families.load(tmp_path / "out")
    assert candidate.digest == outcome.digest
    before, after = base.net.state_dict(), candidate.net.state_dict()
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(any(f".{part}." in n for part in ATTENTION) for n in changed)
    assert (
        run(replace(job, out=str(tmp_path / "again"), lora={"rank": 3, "alpha": 2}), Resident()).digest
        != outcome.digest
    )


def test_only_a_module_is_trained(tmp_path):
    task, base = latent_task(), plain()
    task.save(new_folder(tmp_path / "task"))
    base.save(tmp_path / "base")
    job = Job(
        id="t",
        kind="train",
        method="finetune",
        hyperparameters={"lr": 1e-2, "steps": 2, "batch_size": 8},
        seed=1,
        task=str(tmp_path / "task"),
        base=str(tmp_path / "base"),
        out=str(tmp_path / "out"),
        modules=("text_encoder",),
    )
    assert run(job, Resident()).status == "ok"
    before, after = base.net.state_dict(), families.load(tmp_path / "out").net.state_dict()
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"text_encoder"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.lora={rank: 2}", "task=digits-class", "methods=[graddiff]"),
            "train.lora: is for text-to-image models",
        ),
        (
            ("train.modules=[vae]", "task=digits-text", "methods=[graddiff]"),
            "train.modules: the model has no vae; valid: unet",
        ),
        (
            ("train.lora={rank: 2}", "task=digits-text", "methods=[slug]"),
            "train.lora: slug works on the tensors of the base",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve_sweep(load(None, (*settings, "search.trials=2")))
