"""An auditor without Ray: its caches are bounded and do not change its measurements."""

from __future__ import annotations

import gc
import weakref

import pytest
from tiny import tiny_model, tiny_task

from evaluators.judge import train_judge
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.request import AuditRequest
from raysweep.config.schema import Tier
from raysweep.models import families
from raysweep.storage.cache import save_tensors
from raysweep.storage.recent import Recent
from raysweep.storage.schemas import ROWS, read_table

TIER = Tier(
    seed=1,
    judge="probe",
    checks=("loss", "fidelity"),
    groups=5,
    samples=20,
    loss_noises=6,
    loss_images=4,
    timesteps=3,
    membership_images=8,
    membership_noises=1,
    membership_t=(50,),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auditor")
    task = tiny_task()
    (folder / "task").mkdir()
    task.save(folder / "task")
    for seed, name in enumerate(("base", "oracle-0", "oracle-1", "candidate")):
        tiny_model(task, seed).save(folder / name)
    split = task.splits["judge_probe"]
    save_tensors(folder / "judge.safetensors", train_judge(split.x, split.groups, 0, 20).state_dict())
    return folder


def request(models, run, seed: int, subject: str) -> AuditRequest:
    anchors = tuple((name, str(models / name), name) for name in ("base", "oracle-0", "oracle-1"))
    return AuditRequest(
        subject=subject,
        method="finetune",
        model=str(models / subject),
        digest=subject,
        tier_name=f"t{seed}",
        tier=TIER.model_copy(update={"seed": seed}),
        judge=str(models / "judge.safetensors"),
        judge_digest="j",
        task=str(models / "task"),
        task_digest="t",
        run=str(run),
        anchors=anchors,
        references=str(run / "references"),
    )


def auditor():
    return Auditor.__ray_metadata__.modified_class()


def test_anchors_of_past_tiers_are_released_and_their_models_loaded_once(models, tmp_path, monkeypatch):
    loaded_models, subjects, arrays = [], [], []
    load = families.load

    def loaded(folder):
        loaded_models.append(weakref.ref(model := load(folder)))
        return model

    def alive(references) -> int:
        gc.collect()
        return len({id(r()) for r in references if r() is not None})

    monkeypatch.setattr(families, "load", loaded)
    worker = auditor()
    for seed in range(6):
        for subject in ("candidate", "base"):
            asked = worker.subject(request(models, tmp_path, seed, subject))
            subjects += [weakref.ref(peer) for peer in asked.peers.values()]
            arrays.append(weakref.ref(asked.reference_features()))
            del asked
    assert alive(loaded_models) <= 3
    assert alive(subjects) <= 2 * 3
    assert alive(arrays) <= 2
    assert len(loaded_models) == 3 + 6  # the anchors once, and a candidate for each tier


def test_caches_do_not_change_measurements(models, tmp_path):
    """One auditor that alternates between tiers, against a fresh auditor for each audit."""

    def rows(folder, worker, seed: int, subject: str) -> list[dict]:
        asked = request(models, folder, seed, subject)
        answer = worker.measure(asked)
        assert answer["failed"] == []
        assert list(answer["checks"]) == ["loss", "fidelity"]
        assert 0 < sum(answer["checks"].values()) <= answer["seconds"]
        return read_table(asked.rows_path, ROWS).to_pylist()

    order = [(1, "base"), (2, "candidate"), (1, "candidate"), (3, "candidate"), (1, "oracle-0"), (2, "base")]
    one, turns, alone = auditor(), tmp_path / "turns", tmp_path / "alone"
    together = [rows(turns, one, *which) for which in order]
    assert together == [rows(alone / str(k), auditor(), *which) for k, which in enumerate(order)]
    assert any(r["status"] == "ok" and r["metric"] == "gap" for r in together[1])


def test_recent_keeps_the_last_used_entries():
    created = []

    def make(key):
        created.append(key)
        return key

    kept: Recent[str] = Recent(2)
    for key in "abacab":
        assert kept.get(key, lambda key=key: make(key)) == key
    assert "".join(created) == "abcb"
    assert list(kept.entries) == ["a", "b"]


def test_a_failed_check_is_repeated(models, tmp_path, monkeypatch):
    """The cause may have been fixed before a run is resumed; a complete audit is not repeated."""
    from evaluators.fidelity import Fidelity

    asked = request(models, tmp_path, 1, "candidate")
    with monkeypatch.context() as broken:
        broken.setattr(Fidelity, "scores", lambda *_: 1 / 0)
        assert auditor().measure(asked)["failed"] == ["fidelity"]
    second = auditor().measure(asked)
    assert second["failed"] == []
    assert second["images"] > 0
    assert auditor().measure(asked)["images"] == 0
