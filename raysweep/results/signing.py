"""Signatures of audit cards in the format of sigstore's model signing, by a key of an elliptic curve, without a network.

Hashes show that a card and its files fit each other; whoever changes them all can make them fit again. A signature shows that they are
those that the owner of the key has signed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from raysweep.auditing.card import read
from raysweep.config.schema import ConfigError
from raysweep.storage.files import temporary_path

SIGNATURE = "card.sig"
REASON = 400  # characters kept of a library's message


def sign(path: Path, key: Path) -> Path:
    """Signs every file of a card's folder and returns the file of the signature, which lies beside `card.json`.

    path: the card's folder or JSON. key: an unencrypted private key in PEM format. Raises ConfigError if one is no such thing or
    the package `model-signing` is missing.
    """
    signing = _library()
    folder = _folder(path)
    _check_key(key, private=True)
    out = folder / SIGNATURE
    temporary = temporary_path(out)
    try:
        config = signing.signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_hashing(signing, folder)).sign(folder, temporary)
        os.replace(temporary, out)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be signed: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def fault(path: Path, key: Path) -> str:
    """The reason why the signature of a card is not one of `key` over the files that are there; empty if it is.

    path: the card's folder or JSON. key: a public key in PEM format. Raises ConfigError as `sign` does.
    """
    signing = _library()
    folder = _folder(path)
    _check_key(key, private=False)
    file = folder / SIGNATURE
    if not file.is_file():
        return f"{file}: missing"
    try:
        config = signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_hashing(signing, folder)).verify(folder, file)
    except Exception as error:  # a foreign file may fail in any way
        changed = re.findall(r"Hash mismatch for \\?'([^'\\]+)", str(error))  # without the library's raw bytes
        return f"{', '.join(changed)}: changed since" if changed else f"{type(error).__name__}: {error}"[:REASON]
    return ""


def _folder(path: Path) -> Path:
    read(path)
    return (path if path.is_dir() else path.parent).absolute()


def _hashing(signing: Any, folder: Path) -> Any:
    """Every file counts but the signature itself."""
    return signing.hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ConfigError("signatures need: pip install 'raysweep[sign]'") from error
    return model_signing


def _check_key(key: Path, private: bool) -> None:
    """Raises ConfigError unless a file holds a key of an elliptic curve."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    needed = f"{'an unencrypted private' if private else 'a public'} key of an elliptic curve in PEM format"
    try:
        data = key.read_bytes()
        loaded: Any = (
            serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
        )
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: must be {needed}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        raise ConfigError(f"{key}: must be {needed}")
