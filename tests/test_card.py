"""Audit cards: written, read again, and refused where they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished import placed

from raysweep.auditing import card
from raysweep.auditing.card import Card, Code, Finding, ModelFolder, TaskFolder
from raysweep.auditing.verdict import Verdict
from raysweep.config.schema import ConfigError
from raysweep.storage.schemas import ROWS, SCORES, read_table, write_table

FINDING = Finding("audit", "loss", "auc", 0.6, 0.5, 0.7, 20, "DeLong", "target", "ok", "")


@pytest.fixture
def written(tmp_path) -> Path:
    """The folder of a card with the tables of one anchor."""
    content = Card(
        subject="mine@0",
        created_at="2026-01-01T00:00:00+0000",
        answer=("It has not forgotten.",),
        asked="Has it forgotten?",
        objectives=placed(1.0, 0.0).placement(),
        verdict=Verdict(
            **dict.fromkeys(Verdict.__dataclass_fields__, 1) | {"label": "remembers", "by": ("no attack",)}
        ),
        findings=(FINDING,),
        untested=(),
        incomplete=(),
        tiers={},
        models={"mine@0": ModelFolder("/m", "0", ("fp16-0",), ("README.md",)), "base": ModelFolder("/b", "1")},
        task=TaskFolder("tiny", "0", "/nowhere"),
        judge_digest="",
        code=Code("1", "commit", "0"),
        versions={"raysweep": "1"},
    )
    rows, scores = tmp_path / "rows.parquet", tmp_path / "scores.parquet"
    write_table(rows, [], ROWS)
    units = [{"subject": "base", "tier": "audit", "unit": 0, "values": [0.5], "shape": []}]
    write_table(scores, [unit | {"score": name} for unit in units for name in ("loss.mean", "strip.samples")], SCORES)
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "audit-rows-oracle-7.parquet").write_bytes(b"of an earlier card")
    return card.write(folder, content, {"audit-rows.parquet": rows}, None, {"base": (rows, scores)}).parent


def edit(folder: Path, change) -> None:
    """Changes the JSON of a card and gives it a digest that fits."""
    content = json.loads((folder / card.CARD).read_text())
    change(content)
    content["digest"] = card.content_digest(content)
    (folder / card.CARD).write_text(json.dumps(content))


def test_a_card_is_read_as_it_was_written(written):
    content = card.read(written)
    assert content == card.read(written / card.CARD)
    assert content.findings == (FINDING,)
    assert content.models["mine@0"] == ModelFolder("/m", "0", ("fp16-0",), ("README.md",))
    assert content.digest == content.content_digest
    page = (written / card.PAGE).read_text()
    assert page == card.page(content)
    assert "not read: README.md" in page


def test_tables_of_anchors_lie_beside_it_without_pictures_and_without_old_ones(written):
    tables = {"audit-rows.parquet", "audit-rows-base.parquet", "audit-scores-base.parquet"}
    assert set(card.read(written).files) == tables
    assert {p.name for p in written.iterdir()} == {*tables, card.CARD, card.PAGE}
    assert read_table(written / "audit-scores-base.parquet", SCORES)["score"].to_pylist() == ["loss.mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(card=7), "not a card of this version of raysweep"),
        (lambda content: content.pop("verdict"), "verdict: Field required"),
        (lambda content: content["findings"][0].update(value="high"), r"findings\.0\.value"),
    ],
)
def test_other_json_is_no_card(written, change, message):
    edit(written, change)
    with pytest.raises(ConfigError, match=message):
        card.read(written)
