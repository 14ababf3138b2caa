"""Candidates as they lie in a run: what differs from the base alone, read bit for bit like a whole model, dropped, and published once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import clip_task, flow_task, latent_task, tiny_task

from raysweep.models import contents, delta, families, stored
from raysweep.models.folders import CARD
from raysweep.models.identity import Identity
from raysweep.models.latent import LatentText
from raysweep.planning import disk
from raysweep.results.run import StoredModel
from raysweep.storage.files import write_folder
from raysweep.tasks.task import Task
from raysweep.train import loop
from raysweep.train.jobs import Job, finished, trained

TASKS = {
    "pixel": lambda: tiny_task("class"),
    "edm": lambda: dataclasses.replace(tiny_task("class"), family="edm"),
    "text": latent_task,
    "flow": flow_task,
    "clip": clip_task,
}
KINDS = {  # family, method, hyperparameters, settings of the job, and what the names of the stored tensors have in common
    "all weights": ("pixel", "finetune", {}, {}, ""),
    "an average": ("pixel", "erasediff", {"inner_steps": 2, "ema": 0.5}, {}, ""),
    "a sampler alone": ("text", "sld", {}, {}, None),
    "weights and a sampler": ("pixel", "sfd", {"lr_fake": 1e-3, "forget": 0.5, "fake_forget": 0.5}, {}, ""),
    "edm": ("edm", "neggrad", {}, {}, ""),
    "both modules": ("text", "finetune", {}, {}, ""),
    "one module": ("text", "finetune", {}, {"modules": ("text_encoder",)}, "text_encoder."),
    "adapters": ("text", "finetune", {}, {"lora": {"rank": 2, "alpha": 2}}, ".attn"),
    "adapters of a transformer": ("flow", "finetune", {}, {"lora": {"rank": 2, "alpha": 2}}, ".attn"),
    "T5": ("flow", "finetune", {}, {"modules": ("text_encoder_3",)}, "text_encoder_3."),
    "some layers": ("text", "esd", {"sampler_steps": 4, "layers": "x"}, {}, "attn2"),
    "projections": ("text", "rece", {}, {}, ".attn2.to_"),
    "one layer": ("clip", "slug", {"bisection": 3, "passes": 1}, {}, ""),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, originals) -> Path:
    """A run-like folder with the tasks of `TASKS`."""
    folder = tmp_path_factory.mktemp("stored")
    for family, make in TASKS.items():
        (folder / family).mkdir()
        make().save(folder / family)
    return folder


def job(home: Path, name: str, base: Path, family: str = "pixel", method: str = "finetune", **settings) -> Job:
    return Job(
        **{
            "id": name,
            "kind": "train",
            "method": method,
            "hyperparameters": {},
            "seed": 1,
            "task": str(home / family),
            "base": str(base),
            "out": str(home / "candidates" / name),
            "as_delta": True,
        }
        | settings
    )


def usual(method: str, **more) -> dict:
    from raysweep.registry import resolve

    fields = resolve("method", method).Hyperparameters.model_fields
    return {k: v for k, v in {"lr": 1e-2, "steps": 2, "batch_size": 8}.items() if k in fields} | more


def train(home: Path, kind: str, base: Path) -> tuple[Job, Job]:
    """The jobs of a candidate that is stored as a delta and of the same one stored whole, done."""
    family, method, hyperparameters, settings, _ = KINDS[kind]
    resident = loop.Resident()
    both = {"hyperparameters": usual(method, **hyperparameters), **settings}
    if method in ("slug", "rece"):
        prepared = home / f"{kind}.safetensors"
        few = {"passes": 1} if method == "slug" else {}
        preparation = job(home, "p", base, family, method, kind="prepare", out=str(prepared), hyperparameters=few)
        assert loop.run(preparation, resident).status == "ok"
        both["prepared"] = str(prepared)
    done = []
    for name, as_delta in ((kind, True), (f"{kind} whole", False)):
        done.append(job(home, name, base, family, method, as_delta=as_delta, **both))
        outcome = loop.run(done[-1], resident)
        assert outcome.status == "ok", outcome.reason
    return done[0], done[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_candidate_is_the_same_model_as_a_whole_one(kind, home, originals):
    base, part = originals / KINDS[kind][0], KINDS[kind][4]
    short, whole = (Path(j.out) for j in train(home, kind, base))
    assert sorted(p.name for p in short.iterdir()) == [stored.FILE, CARD]
    card = json.loads((short / CARD).read_text())
    one, other, start = families.load(short), families.load(whole), families.load(base)
    assert one.digest == other.digest == card["outcome"]["digest"] != start.digest
    assert one.settings == other.settings
    assert Identity.of(one, "").same_network(Identity.of(other, ""))
    header, tensors = delta.read(short / stored.FILE)
    assert (header["base"], header["candidate"]) == (start.digest, one.digest)
    names = {name.removeprefix(delta.AFTER) for name in tensors}
    before, after = start.net.state_dict(), other.net.state_dict()
    tied = {"text_encoder_3.encoder.embed_tokens.weight"}  # stored as text_encoder_3.shared.weight
    assert names == {n for n, t in before.items() if not torch.equal(t, after[n])} - tied
    assert (not names) if part is None else all(part in name for name in names)
    assert kind != "one layer" or len(names) == 1
    job_settings = SimpleNamespace(train=SimpleNamespace(**{"modules": (), "lora": None} | KINDS[kind][3]))
    planned, planned_whole = disk.sizes(job_settings, start)
    size = sum(t.nbytes for t in tensors.values())
    assert size <= planned <= planned_whole
    # the last block of a transformer of flows gives no text tokens, so its queries of text stay as they are
    partly = ("some layers", "projections", "one layer", "a sampler alone", "both modules", "adapters of a transformer")
    assert size == planned or kind in partly


def test_a_vision_language_model_is_stored_as_its_edited_tensors(home, originals, tmp_path):
    base, model = families.load(originals / "vlm"), families.load(originals / "vlm")
    name, weight = next((n, p) for n, p in model.net.named_parameters() if p.requires_grad and p.dim() > 1)
    with torch.no_grad():
        weight.mul_(1.5)
    (tmp_path / "c").mkdir()
    stored.save(tmp_path / "c", base, base.digest, model, model.digest, str(originals / "vlm"))
    assert set(delta.read(tmp_path / "c" / stored.FILE)[1]) == {delta.AFTER + name}
    again = families.load(tmp_path / "c")
    again.save(tmp_path / "whole")
    model.save(tmp_path / "expected")
    digests = {families.load(folder).digest for folder in (tmp_path / "whole", tmp_path / "expected")}
    assert digests == {again.digest, model.digest} == {model.digest}


def test_bytes_count_and_not_numbers(originals, tmp_path):
    """0 and -0 are equal numbers and other bytes, which the hash covers."""
    base, model = families.load(originals / "pixel"), families.load(originals / "pixel")
    with torch.no_grad():
        for net in (base.net, model.net):
            net.conv_in.bias.zero_()
        model.net.conv_in.bias.neg_()
    assert delta.changed(base, model) == ["conv_in.bias"]
    assert delta.changed(base, base) == []


def test_what_a_delta_cannot_hold_is_stored_whole(originals, tmp_path):
    base, model = families.load(originals / "edm"), families.load(originals / "edm")
    model.edm = model.edm | {"sigma_max": 70.0}
    (tmp_path / "c").mkdir()
    stored.save(tmp_path / "c", base, base.digest, model, model.digest, str(originals / "edm"))
    assert not (tmp_path / "c" / stored.FILE).exists()
    assert families.load(tmp_path / "c").digest == model.digest


def test_a_base_that_moved_changed_or_is_gone(home, copy, tmp_path):
    base = copy("pixel")
    candidates = tmp_path / "run" / "candidates"
    done = job(home, "moving", base, out=str(candidates / "000-finetune"), hyperparameters=usual("finetune"))
    digest = loop.run(done, loop.Resident()).digest
    folder = candidates / "000-finetune"
    shutil.copytree(folder, tmp_path / "copied")
    assert families.load(tmp_path / "copied").digest == digest
    moved = base.rename(tmp_path / "elsewhere")
    for place in (folder, tmp_path / "copied"):
        with pytest.raises(
            ValueError, match=rf"its base, the model with the hash {families.load(moved).digest}, which is no"
        ):
            families.load(place)
    stored.say_place(candidates, str(moved))
    assert families.load(folder).digest == digest
    assert families.family_of(folder) == "pixel-ddpm"
    assert contents.not_read(folder)[0] == CARD
    assert contents.not_read(folder)[1:] == tuple(f"{moved}/{entry}" for entry in contents.not_read(moved))
    weights = folder / stored.FILE
    weights.rename(tmp_path / "kept")
    weights.write_bytes((tmp_path / "kept").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"not a readable safetensors file .* make it again"):
        families.load(folder)
    data = bytearray((tmp_path / "kept").read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        ValueError, match=f"instead of {digest}: it is damaged; make it again: raysweep remake .* 000-finetune"
    ):
        families.load(folder)
    shutil.copy(tmp_path / "kept", weights)
    other = families.load(moved)
    with torch.no_grad():
        other.net.conv_out.bias.add_(1)  # replaced by the delta, so the candidate is whole all the same
    other.save(moved)
    assert families.load(folder).digest == digest
    families.load(moved).fresh(3).save(moved)
    if len(delta.read(weights)[1]) == len(other.net.state_dict()):
        assert families.load(folder).digest == digest
    shutil.rmtree(moved)
    LatentText.build(latent_task().model, 0).save(moved)
    with pytest.raises(ValueError, match="put the base back there"):
        families.load(folder)
    again = loop.run(
        dataclasses.replace(done, out=str(tmp_path / "x"), base=str(moved), inputs={"base": "0"}), loop.Resident()
    )
    assert (again.status, "it has changed; put it back" in again.reason) == ("failed", True)


def test_dropped_weights_leave_the_card_and_the_command_that_makes_them_again(home, originals):
    done, _ = train(home, "one module", originals / "text")
    folder = Path(done.out)
    model = StoredModel("t", folder, "")
    assert model.is_kept
    assert model.pipeline().unet.config.sample_size == 4
    before = (folder / CARD).read_bytes()
    stored.drop(folder)
    assert not model.is_kept
    assert [p.name for p in folder.iterdir()] == [CARD]
    assert (folder / CARD).read_bytes() == before
    assert finished(done) is not None  # a resumed run does not train it again
    command = rf"dropped to save disk; make it again: raysweep remake {home} 'one module'"
    for read in (families.load, families.family_of, contents.not_read):
        with pytest.raises(ValueError, match=command):
            read(folder)


# Publishing


def test_of_two_workers_with_one_job_the_first_to_finish_wins(home, originals):
    """As after a lease that ran out: the job ran on, and both return what lies in the folder."""
    shared = job(home, "raced", originals / "pixel", hyperparameters=usual("finetune"))
    first = []

    class Meanwhile:
        word = "held"

        def owns(self):
            if not first:
                first.append(loop.run(shared, loop.Resident()))
            return True

    second = loop.run(shared, loop.Resident(), Meanwhile())
    assert first == [second]
    assert second.digest == families.load(shared.out).digest
    assert not list((home / "candidates").glob(".raced*"))


@pytest.mark.parametrize("stale", [False, True])
def test_the_first_of_many_writers_wins(tmp_path, stale):
    """Thirty-two at once, where nothing lies or the result of another job, which is replaced."""
    path = tmp_path / "c"
    wanted = SimpleNamespace(digest="this job's")
    if stale:
        path.mkdir()
        (path / CARD).write_text(json.dumps({"job_digest": "another's", "outcome": {"status": "ok"}}))

    def write(number: int) -> str:
        def fill(folder: Path) -> None:
            (folder / CARD).write_text(
                json.dumps({"job_digest": wanted.digest, "outcome": {"status": "ok", "digest": str(number)}})
            )

        write_folder(path, fill, lambda folder: trained(wanted, folder) is not None)
        for _ in range(100):  # a writer that found the stale folder may just be putting the new one back
            outcome = trained(wanted, path)
            if outcome is not None:
                return outcome.digest
        raise AssertionError("nothing was published")

    with ThreadPoolExecutor(32) as threads:
        seen = list(threads.map(write, range(96)))
    assert len(set(seen)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_task_of_a_stored_run_is_untouched(home):
    """Jobs read the task's folder and change nothing there."""
    assert Task.load(home / "pixel").digest == tiny_task("class").digest
