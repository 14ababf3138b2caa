"""Signatures of cards: they hold for the files that were signed and for the key that signed them, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from finished import placed

from raysweep.auditing import card
from raysweep.auditing.card import Card, Code, ModelFolder, TaskFolder
from raysweep.auditing.verdict import Verdict
from raysweep.cli import main
from raysweep.config.schema import ConfigError
from raysweep.results import signing

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public) key files."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def folder(tmp_path) -> Path:
    content = Card(
        subject="mine@0",
        created_at="2026-01-01T00:00:00+0000",
        answer=("It has forgotten.",),
        asked="Has it forgotten?",
        objectives=placed(1.0, 0.0).placement(),
        verdict=Verdict(label="remembers", by=("no attack (+1.00)",), tested=1),
        findings=(),
        untested=(),
        incomplete=(),
        tiers={},
        models={name: ModelFolder("/m", "0") for name in ("mine@0", "base")},
        task=TaskFolder("tiny", "0", "/nowhere"),
        judge_digest="",
        code=Code("1", "commit", "0"),
        versions={},
    )
    return card.write(tmp_path / "card", content, {}, None).parent


def test_a_signature_holds_for_these_files_and_this_key(folder, tmp_path):
    private, public = write_keys(tmp_path, "one")
    assert signing.fault(folder, public) == f"{folder / signing.SIGNATURE}: missing"
    assert signing.sign(folder, private) == folder / signing.SIGNATURE
    assert signing.fault(folder / card.CARD, public) == ""
    assert "Key mismatch" in signing.fault(folder, write_keys(tmp_path, "other")[1])
    moved = folder.rename(tmp_path / "moved")
    assert signing.fault(moved, public) == ""
    for name in (card.CARD, card.PAGE):
        whole = (moved / name).read_text()
        (moved / name).write_text(whole + "\n")
        assert name in signing.fault(moved, public)
        (moved / name).write_text(whole)
    (moved / "more.parquet").write_bytes(b"")
    assert "more.parquet" in signing.fault(moved, public)
    (moved / "more.parquet").unlink()
    assert signing.fault(moved, public) == ""
    (moved / signing.SIGNATURE).write_text("{}")
    assert signing.fault(moved, public)
    assert sorted(p.name for p in moved.iterdir()) == [card.PAGE, card.CARD, signing.SIGNATURE]


def test_a_forged_card_does_not_carry_the_signature(folder, tmp_path):
    """A forger who makes all hashes and the page fit again is still without the key."""
    private, public = write_keys(tmp_path, "one")
    signing.sign(folder, private)
    content = json.loads((folder / card.CARD).read_text())
    content["created_at"] = "2020-01-01T00:00:00+0000"
    content["digest"] = card.content_digest(content)
    (folder / card.CARD).write_text(json.dumps(content))
    (folder / card.PAGE).write_text(card.page(card.read(folder)))
    assert card.CARD in signing.fault(folder, public)


def test_what_is_no_key_or_no_card_is_refused(folder, tmp_path):
    private, public = write_keys(tmp_path, "one")
    with pytest.raises(ConfigError, match="must be an unencrypted private key of an elliptic curve"):
        signing.sign(folder, public)
    with pytest.raises(ConfigError, match="must be a public key of an elliptic curve"):
        signing.fault(folder, private)
    with pytest.raises(ConfigError, match="cannot be read"):
        signing.sign(folder, tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="a card is the folder"):
        signing.sign(tmp_path / "none", private)
    assert not (folder / signing.SIGNATURE).exists()


def test_the_command_line_signs_and_verifies(folder, tmp_path):
    private, public = write_keys(tmp_path, "one")
    result = CliRunner().invoke(main, ["sign", str(folder), "--key", str(private)])
    assert (result.exit_code, result.output) == (0, f"written {folder / signing.SIGNATURE}\n")
    result = CliRunner().invoke(main, ["verify", str(folder), "--signature-key", str(public)])
    assert "ok       signature" in result.output
    result = CliRunner().invoke(main, ["verify", str(folder), "--signature-key", str(write_keys(tmp_path, "two")[1])])
    assert result.exit_code == 1
    assert "DIFFERS  signature" in result.output
