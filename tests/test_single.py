"""The audit of a folder: the name on its card, for any name of the folder."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest
from finished import placed
from tiny import tiny_task

from raysweep.auditing import card
from raysweep.auditing.anchors import View
from raysweep.auditing.card import ModelFolder
from raysweep.auditing.request import AuditRequest
from raysweep.auditing.untested import untested
from raysweep.auditing.verdict import Verdict
from raysweep.config.reader import load
from raysweep.config.schema import Tier
from raysweep.context import Context
from raysweep.engine import audit_model as single
from raysweep.engine.audit_model import audit_model, subject_name
from raysweep.engine.cluster import RunFailed
from raysweep.engine.events import Silent
from raysweep.models.identity import Identity
from raysweep.results import cards
from raysweep.results.cards import write_card
from raysweep.rundir import RunDir

TIER = Tier(seed=1, judge="audit")
UNUSED = View("loss.auc", 0.5, 0.5, 0.1, False, "base and oracle are both 0.5")
ANCHORS = {"base": ("/models/base", "b" * 16), "oracle-0": ("/models/o0", "0" * 16)}


@pytest.mark.parametrize("folder_name", ["base", "oracle-0", "destroyed", "mine"])
def test_a_folder_may_be_called_as_an_anchor_is(tmp_path, monkeypatch, folder_name):
    monkeypatch.setattr(cards, "verdict_of", lambda *_: Verdict(label="not tested"))
    monkeypatch.setattr(card, "findings_of", lambda *_: [])
    folder = RunDir(tmp_path / "run")
    context = Context(
        run=str(folder.path),
        run_id="r",
        task_digest="t",
        quality="fidelity.frechet",
        validity="classifier.validity",
        base=ANCHORS["base"][0],
        base_digest=ANCHORS["base"][1],
        oracles={"oracle-0": ANCHORS["oracle-0"]},
        judges={},
        prepared={},
        cache=str(tmp_path),
    )
    result = placed(0.1, 0.2)
    context.save_anchors("audit", {}, [])
    written = {}
    for digest in ("1" * 16, "2" * 16):  # two folders of one name
        model = tmp_path / digest / folder_name
        name = subject_name(model, digest)
        requests = {t: context.request(t, TIER, name, "", str(model), digest) for t in ("audit", "durability")}
        for request in requests.values():
            for kind in ("rows", "scores"):
                (table := folder.path / kind / f"{request.key}.parquet").parent.mkdir(parents=True, exist_ok=True)
                table.write_bytes(b"")
        models = {n: ModelFolder(*pair) for n, pair in ({name: (str(model), digest)} | ANCHORS).items()}
        path = write_card(
            False, tiny_task(), context, requests, result, [result], [UNUSED], models, ["loss on oracle-0"]
        )
        content, page = json.loads(path.read_text()), unescape(path.with_name("card.html").read_text())
        models = content["models"]
        expected = untested(tiny_task(), dict.fromkeys(requests, TIER), [], [UNUSED], oracles=1)
        assert content["untested"] == ["Incomplete: loss on oracle-0.", *expected]
        assert "The view loss.auc is not part of the residue: base and oracle are both 0.5." in expected
        assert all(line in page for line in content["untested"])
        assert {n: (m["folder"], m["digest"]) for n, m in models.items()} == ANCHORS | {name: (str(model), digest)}
        written[digest] = (name, path, *(r.key for r in requests.values()))
    one, other = written.values()
    assert not set(one) & set(other)


def test_audits_of_an_anchor_and_of_a_folder_of_its_name_are_two():
    anchor = AuditRequest("base", "", "/models/base", "b" * 16, "audit", TIER, "", "", "", "", "")
    folder = AuditRequest(**vars(anchor) | {"subject": subject_name(Path("/mine/base"), "b" * 16)})
    assert folder.key != anchor.key


def test_a_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    for path in ("..", "../", "../../mine", str(tmp_path / "mine")):
        assert subject_name(Path(path), "0123456789abcdef") == "mine@01234567"


def test_an_audit_does_not_inherit_the_reason_of_the_one_before(tmp_path, monkeypatch):
    def ends(error):
        raise error

    sweep = load(None, (f"storage={tmp_path}", f"cache={tmp_path / 'cache'}", "name=x"))
    monkeypatch.setattr(single, "resolve_sweep", lambda _: (tiny_task(), []))
    monkeypatch.setattr(single, "check_model", lambda *_: Identity("model", "1" * 16, ()))
    for error, state, reason in ((RunFailed("no Ray"), "failed", "no Ray"), (KeyboardInterrupt(), "interrupted", "")):
        monkeypatch.setattr("raysweep.engine.engine.connected", lambda _, error=error: ends(error))
        with pytest.raises(type(error)):
            audit_model(tmp_path / "model", sweep, Silent())
        manifest = RunDir(tmp_path / "x-audits").read_manifest()
        assert (manifest["state"], manifest["reason"]) == (state, reason)
