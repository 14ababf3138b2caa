"""Audit cards without Ray: written, read again, and verified against files and scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished import placed
from tiny import tiny_model, tiny_task

from evaluators.judge import train_judge
from raysweep.auditing import card
from raysweep.auditing.auditor import Auditor
from raysweep.auditing.card import Card, Code, ModelFolder, TaskFolder
from raysweep.auditing.request import AuditRequest
from raysweep.auditing.verdict import Verdict
from raysweep.auditing.verify import verify
from raysweep.config.schema import ConfigError, Tier
from raysweep.models import families
from raysweep.plugins import audit_code
from raysweep.storage.cache import save_tensors
from raysweep.storage.files import digest_state

TIER = Tier(
    seed=1,
    judge="probe",
    checks=("loss", "denoising"),
    groups=5,
    samples=20,
    class_samples=20,
    noises=5,
    loss_noises=6,
    loss_images=4,
    timesteps=3,
    membership_images=8,
    membership_noises=1,
    membership_t=(50,),
)


@pytest.fixture
def written(tmp_path) -> Path:
    """The folder of the card of a tiny model that an auditor has measured."""
    task, base, judge_file = tiny_task(), tmp_path / "base", tmp_path / "judge.safetensors"
    (tmp_path / "task").mkdir()
    task.save(tmp_path / "task")
    tiny_model(task).save(base)
    split = task.splits["judge_probe"]
    judge = train_judge(split.x, split.groups, 0, 20).state_dict()
    save_tensors(judge_file, judge)
    digest = families.load(base).digest
    request = AuditRequest(
        subject="base",
        method="",
        model=str(base),
        digest=digest,
        tier_name="audit",
        tier=TIER,
        judge=str(judge_file),
        judge_digest=digest_state(judge),
        task=str(tmp_path / "task"),
        task_digest=task.digest,
        run=str(tmp_path / "run"),
        anchors=(("base", str(base), digest),),
    )
    assert Auditor.__ray_metadata__.modified_class().measure(request)["failed"] == []
    content = Card(
        subject="base",
        created_at="2026-01-01T00:00:00+0000",
        answer=("It has not forgotten.",),
        asked="Has it forgotten?",
        objectives=placed(1.0, 0.0).placement(),
        verdict=Verdict(label="remembers", by=("no attack (+1.00)",), tested=1),
        findings=tuple(card.findings_of(request.rows_path, None, "audit")),
        untested=(),
        incomplete=(),
        tiers={"audit": TIER.model_dump(mode="json")},
        models={"base": ModelFolder(str(base), digest)},
        task=TaskFolder("tiny", task.digest, str(tmp_path / "task")),
        judge_digest=request.judge_digest,
        code=Code("1", "commit", audit_code(TIER.checks)),
        versions={},
    )
    tables = {"audit-rows.parquet": request.rows_path, "audit-scores.parquet": request.scores_path}
    return card.write(tmp_path / "card", content, tables, judge_file).parent


def edit(folder: Path, change) -> None:
    """Changes the JSON of a card and gives it a digest that fits."""
    content = json.loads((folder / card.CARD).read_text())
    change(content)
    content["digest"] = card.content_digest(content)
    (folder / card.CARD).write_text(json.dumps(content))


def test_a_card_verifies_and_each_change_is_detected(written):
    lines = verify(written)
    assert all(line.holds for line in lines), lines
    assert {"model base", "judge", "task", "audit: loss", "audit: denoising"} <= {line.what for line in lines}
    assert card.read(written).content_digest == card.read(written).digest
    stated = card.read(written).findings[0]

    def forge(content):
        content["findings"][0]["value"] = stated.value + 0.1

    edit(written, forge)
    wrong = [line for line in verify(written) if line.holds is False]
    assert [line.what for line in wrong] == [f"audit: {stated.check}"]
    assert repr(stated.value + 0.1) in wrong[0].detail
    (written / "audit-scores.parquet").write_bytes(b"")
    assert "audit-scores.parquet" in [line.what for line in verify(written) if line.holds is False]


def test_missing_parts_are_unknown_and_not_wrong(written, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "task").rename(tmp_path / "data")
    by_name = {line.what: line.holds for line in verify(written)}
    assert (by_name["model base"], by_name["task"]) == (None, None)
    assert "audit: loss" not in by_name
    assert {line.what: line.holds for line in verify(written, tmp_path / "data")}["audit: loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(card=2), "not a card of this version of raysweep"),
        (lambda content: content.pop("verdict"), "verdict: Field required"),
        (lambda content: content["findings"][0].update(value="high"), r"findings\.0\.value"),
    ],
)
def test_other_json_is_no_card(written, change, message):
    edit(written, change)
    with pytest.raises(ConfigError, match=message):
        card.read(written)
