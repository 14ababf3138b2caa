"""An auditor without Ray: what it keeps between audits is bounded, and does not change what it measures."""

from __future__ import annotations

import gc
import weakref

import pytest
from tiny import tiny_model, tiny_task

from evaluators.judge import train_judge
from raysweep.audit.auditor import Auditor
from raysweep.audit.request import AuditRequest
from raysweep.config.schema import Tier
from raysweep.models import families
from raysweep.storage.cache import save_tensors
from raysweep.storage.recent import Recent
from raysweep.storage.schemas import ROWS, read_table

TIER = Tier(seed=1, judge="probe", checks=("loss", "fidelity"), groups=5, samples=20, loss_noises=6, loss_images=4,
            timesteps=3, membership_images=8, membership_noises=1, membership_t=(50,))  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auditor")
    task = tiny_task()
    (folder / "task").mkdir()
    task.save(folder / "task")
    for seed, name in enumerate(("base", "oracle-0", "oracle-1", "candidate")):
        tiny_model(task, seed).save(folder / name)
    split = task.splits["judge_probe"]
    save_tensors(folder / "judge.safetensors", train_judge(split.x, split.groups, 0, 20).state_dict())
    return folder


def request(place, run, seed: int, subject: str) -> AuditRequest:
    anchors = tuple((name, str(place / name), name) for name in ("base", "oracle-0", "oracle-1"))
    return AuditRequest(
        subject=subject, method="finetune", model=str(place / subject), digest=subject, tier_name=f"t{seed}",
        tier=TIER.model_copy(update={"seed": seed}), judge=str(place / "judge.safetensors"), judge_digest="j",
        task=str(place / "task"), task_digest="t", run=str(run), anchors=anchors,
        references=str(run / "references"),
    )  # fmt: skip


def auditor():
    return Auditor.__ray_metadata__.modified_class()


def test_anchors_of_past_tiers_are_let_go_and_their_models_are_there_once(place, tmp_path, monkeypatch):
    models, subjects, arrays = [], [], []
    load = families.load

    def loaded(folder):
        models.append(weakref.ref(model := load(folder)))
        return model

    def alive(references) -> int:
        gc.collect()
        return len({id(r()) for r in references if r() is not None})

    monkeypatch.setattr(families, "load", loaded)
    worker = auditor()
    for seed in range(6):
        for subject in ("candidate", "base"):
            asked = worker.subject(request(place, tmp_path, seed, subject))
            subjects += [weakref.ref(peer) for peer in asked.peers.values()]
            arrays.append(weakref.ref(asked.reference_features()))
            del asked
    assert alive(models) <= 3
    assert alive(subjects) <= 2 * 3
    assert alive(arrays) <= 2
    assert len(models) == 3 + 6  # the anchors once, and a candidate for each tier


def test_what_is_kept_does_not_change_what_is_measured(place, tmp_path):
    """Tiers that take turns, on one auditor, against an auditor for each."""

    def rows(folder, worker, seed: int, subject: str) -> list[dict]:
        asked = request(place, folder, seed, subject)
        answer = worker.measure(asked)
        assert answer["failed"] == []
        return read_table(asked.rows_path, ROWS).to_pylist()

    order = [(1, "base"), (2, "candidate"), (1, "candidate"), (3, "candidate"), (1, "oracle-0"), (2, "base")]
    one, turns, alone = auditor(), tmp_path / "turns", tmp_path / "alone"
    together = [rows(turns, one, *which) for which in order]
    assert together == [rows(alone / str(k), auditor(), *which) for k, which in enumerate(order)]
    assert any(r["status"] == "ok" and r["metric"] == "gap" for r in together[1])


def test_recent_keeps_what_was_asked_for_last():
    made = []

    def make(key):
        made.append(key)
        return key

    kept: Recent[str] = Recent(2)
    for key in "abacab":
        assert kept.get(key, lambda key=key: make(key)) == key
    assert "".join(made) == "abcb"
    assert list(kept.entries) == ["a", "b"]


def test_a_check_that_failed_is_tried_again(place, tmp_path, monkeypatch):
    """Whoever runs a sweep again may have mended the cause; what went well is not done twice."""
    from evaluators.fidelity import Fidelity

    asked = request(place, tmp_path, 1, "candidate")
    with monkeypatch.context() as broken:
        broken.setattr(Fidelity, "scores", lambda *_: 1 / 0)
        assert auditor().measure(asked)["failed"] == ["fidelity"]
    again = auditor().measure(asked)
    assert again["failed"] == []
    assert again["images"] > 0
    assert auditor().measure(asked)["images"] == 0
