"""`verify` names every change to a card, to the files beside it and to the models, also if hashes and page are made to fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from carded import write_card

from raysweep.auditing import card
from raysweep.results.verify import SHOWN, STATED, verify

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_card(tmp_path_factory.mktemp("audit"))


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def forge(folder: Path, change: Change = lambda _: None) -> None:
    """Changes the JSON of a card and makes everything else fit: the hashes of its files, its own hash, and its page."""
    content = json.loads((folder / card.CARD).read_text())
    content["files"] = {name: card.sha256(folder / name) for name in content["files"] if (folder / name).is_file()}
    change(content)
    content["digest"] = card.content_digest(content)
    (folder / card.CARD).write_text(json.dumps(content))
    (folder / card.PAGE).write_bytes(card.page(card.read(folder)).encode())


def named(folder: Path) -> list[str]:
    """What a verification does not confirm."""
    return [line.what for line in verify(folder) if line.holds is not True]


def first_ok(content: dict[str, Any]) -> dict[str, Any]:
    return next(f for f in content["findings"] if f["status"] == "ok" and f["lo"] is not None and f["to"].get("oracle"))


def move(content: dict[str, Any]) -> None:
    content["models"]["mine2"] = content["models"].pop(content["subject"])


def drop_finding(content: dict[str, Any]) -> None:
    content["findings"] = [f for f in content["findings"] if f["check"] != "loss"]


def drop_check(content: dict[str, Any]) -> None:
    """Removes a check from the tier and from the findings."""
    drop_finding(content)
    content["tiers"]["audit"]["checks"].remove("loss")


FORGERIES: list[tuple[str, Change, str]] = [  # what is changed; how; what must be named
    ("subject", lambda c: c.update(subject="oracle-0"), "audit: loss"),
    ("answer", lambda c: c.update(answer=["It has forgotten everything.", *c["answer"][1:]]), "card: answer"),
    ("asked", lambda c: c.update(asked=c["asked"].replace("oracles", "good oracles")), "card: asked"),
    ("residue", lambda c: c["objectives"].update(residue=c["objectives"]["residue"] / 2 + 0.01), "card: objectives"),
    ("damage_se", lambda c: c["objectives"].update(damage_se=c["objectives"]["damage_se"] + 0.1), "card: objectives"),
    ("validity", lambda c: c["objectives"].update(validity=0.123), "card: objectives"),
    ("views", lambda c: c["objectives"]["views"].popitem(), "card: objectives"),
    ("verdict", lambda c: c["verdict"].update(label="like the oracle, and more"), "card: verdict"),
    ("tested", lambda c: c["verdict"].update(tested=c["verdict"]["tested"] + 10), "card: verdict"),
    ("untested", lambda c: c["untested"].pop(), "card: untested"),
    ("incomplete", lambda c: c["incomplete"].append("audit: loss"), "card: incomplete"),
    ("a check", drop_check, "audit: scores"),
    ("a seed", lambda c: c["tiers"]["audit"].update(seed=12), "audit: loss"),
    ("the membership margin", lambda c: c["thresholds"].update(membership="anything"), "card: thresholds"),
    ("the hash of a model", lambda c: c["models"]["base"].update(digest="0" * 16), "model base"),
    ("the networks of a model", lambda c: c["models"]["oracle-0"].update(networks=["fp16-0"]), "model oracle-0"),
    ("what is not read", lambda c: c["models"]["base"].update(not_read=["x"]), "model base"),
    (
        "the folder of a model",
        lambda c: c["models"]["base"].update(folder=c["models"]["oracle-0"]["folder"]),
        "model base",
    ),
    ("an oracle", lambda c: c["models"].pop("oracle-1"), "files of the card"),
    ("the name of a model", move, "card"),
    ("the name of the task", lambda c: c["task"].update(name="other"), "card: task"),
    ("the hash of the task", lambda c: c["task"].update(digest="0" * 16), "task"),
    ("the folder of the task", lambda c: c["task"].update(folder="/nowhere"), "task"),
    ("the hash of the judge", lambda c: c.update(judge_digest="0" * 16), "judge"),
    ("no judge", lambda c: c.update(judge_digest=""), "files of the card"),
    ("the code of the checks", lambda c: c["code"].update(audit="0" * 16), "code of the checks"),
    ("a file", lambda c: c["files"].pop("audit-scores-base.parquet"), "files of the card"),
    ("the hash of a file", lambda c: c["files"].update({"audit-rows.parquet": "0" * 64}), "audit-rows.parquet"),
    ("a further field", lambda c: c.update(certified_by="somebody"), "fields of the card"),
    ("all findings of a check", drop_finding, "card: findings"),
]
OF_FINDINGS = {
    "tier": "durability",
    "check": "fidelity",
    "metric": "other",
    "value": 0.987,
    "lo": -9.0,
    "hi": 9.0,
    "n": 100_000,
    "interval": "exact",
    "direction": "max",
    "status": "skipped",
    "reason": "none",
    "to": {},
}


def test_an_unchanged_card_verifies(original):
    lines = verify(original)
    assert [line for line in lines if line.holds is not True] == []
    whats = {line.what for line in lines}
    assert {
        card.PAGE,
        "judge",
        "task",
        "audit: loss",
        "anchor destroyed",
        "card: answer",
        "durability: weight_noise",
    } <= whats


@pytest.mark.parametrize(("change", "expected"), [f[1:] for f in FORGERIES], ids=[f[0] for f in FORGERIES])
def test_each_field_is_computed_again(folder, change, expected):
    forge(folder, change)
    assert expected in named(folder)


def test_every_field_of_a_card_is_forged_above_or_stated_alone(original):
    content = json.loads((original / card.CARD).read_text())
    forged = set()
    for _, change, _ in FORGERIES:
        changed = json.loads(json.dumps(content))
        change(changed)
        forged |= {key for key in content if changed.get(key) != content[key]}
    alone = {key.split(".")[0] for key in STATED}
    assert set(content) == forged | alone | {"card", "digest"}
    assert set(OF_FINDINGS) == set(content["findings"][0])


@pytest.mark.parametrize("start", range(0, len(OF_FINDINGS), SHOWN))
def test_each_field_of_a_finding_is_computed_again(folder, start):
    keys = list(OF_FINDINGS)[start : start + SHOWN]
    forge(folder, lambda content: first_ok(content).update({key: OF_FINDINGS[key] for key in keys}))
    (line,) = [line for line in verify(folder) if line.what == "card: findings"]
    assert line.holds is False
    assert all(f".{key}" in line.detail for key in keys), line.detail


def test_paired_differences_are_computed_again(folder):
    forge(folder, lambda content: first_ok(content)["to"]["oracle"].update(value=0.5, lo=0.25, hi=0.75))
    (line,) = [line for line in verify(folder) if line.holds is not True]
    assert line.what == "card: findings"
    assert all(f".to.oracle.{key}: " in line.detail for key in ("value", "lo", "hi")), line.detail


def test_what_is_stated_alone_is_said_to_be(folder):
    forge(folder, lambda c: c.update(created_at="2020-01-01T00:00:00+0000", versions={"raysweep": "9"}))
    assert named(folder) == []
    assert verify(folder)[-1].what == "stated alone"


def test_a_changed_card_without_its_page_is_named(folder):
    page = (folder / card.PAGE).read_bytes()
    forge(folder, lambda content: content.update(created_at="2020-01-01T00:00:00+0000"))
    (folder / card.PAGE).write_bytes(page)
    assert named(folder) == [card.PAGE]
    (folder / card.PAGE).unlink()
    assert named(folder) == [card.PAGE]


def test_each_file_beside_a_card_is_compared(folder):
    for path in sorted(folder.iterdir()):
        if path.suffix in (".parquet", ".safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    wrong = named(folder)
    assert set(card.read(folder).files) <= set(wrong)
    (folder / "audit-rows.parquet").unlink()
    assert "audit-rows.parquet" in named(folder)


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def shift(rows: list[dict[str, Any]]) -> None:
    """Changes a score of each check."""
    for score in {row["score"] for row in rows if not row["score"].startswith("strip.")}:
        row = next(r for r in rows if r["score"] == score)
        row["values"] = [value * 0.5 + 0.01 for value in row["values"]]


def half(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["value"] = None if row["value"] is None else row["value"] * 0.5 + 0.01


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("audit-scores.parquet", shift, "audit: denoising"),
        ("audit-rows.parquet", half, "audit: denoising"),
        ("audit-rows.parquet", lambda rows: rows.pop(), "audit: per_class"),
        ("durability-scores.parquet", shift, "durability: weight_noise"),
        ("durability-rows.parquet", half, "durability: weight_noise"),
        ("audit-scores-oracle-1.parquet", shift, "anchor oracle-1: denoising"),
        ("audit-rows-base.parquet", half, "anchor base: denoising"),
        ("audit-rows-destroyed.parquet", half, "anchor destroyed: denoising"),
    ],
)
def test_rows_are_computed_again_from_scores(folder, file, change, expected):
    rewrite(folder / file, change)
    forge(folder)
    assert expected in named(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading"}),
        ("unet/config.json", {"norm_eps": 1e-3}),
        ("raysweep_sampler.json", {"kind": "one_step", "t": 900}),
    ],
)
def test_a_changed_model_folder_is_named(original, folder, file, change):
    models = json.loads((original / card.CARD).read_text())["models"]
    for name, model in models.items():
        path = Path(model["folder"]) / file
        before = path.read_bytes() if path.is_file() else None
        path.write_text(json.dumps(json.loads(before or "{}") | change))
        try:
            assert named(folder) == [f"model {name}"]
        finally:
            path.unlink() if before is None else path.write_bytes(before)
    assert named(folder) == []


def test_missing_parts_are_unknown_and_not_wrong(original, folder, tmp_path):
    stated = card.read(folder)
    moved = tmp_path / "data"
    Path(stated.task.folder).rename(moved)
    base = Path(stated.models["base"].folder)
    base.rename(tmp_path / "moved")
    try:
        by_name = {line.what: line.holds for line in verify(folder)}
        assert (by_name["model base"], by_name["task"]) == (None, None)
        assert "audit: loss" not in by_name
        by_name = {line.what: line.holds for line in verify(folder, moved)}
        assert by_name["audit: loss"]
        assert by_name["card: answer"]
    finally:
        moved.rename(stated.task.folder)
        (tmp_path / "moved").rename(base)
