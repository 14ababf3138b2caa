"""Finds a model's folder and looks at it before a library reads it, so that what is wrong with it is said in one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
OPEN_CLIP = "open_clip_config.json"
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}")  # the hub's own limit of names
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # never pickles
REASON = 400  # characters of a library's own message
CHECKPOINTS = (".safetensors", ".ckpt")
VARIANTS = ["*.fp16.*", "*.bf16.*", "*non_ema*"]


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder looks like an id on the Hugging Face hub."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def no_model(name: str) -> str:
    """What is wrong with a name that is neither a folder nor an id on the hub."""
    if Path(name).suffix in CHECKPOINTS and Path(name).is_file():
        return (
            f"{name}: a checkpoint in one file, not a folder; diffusers makes one: "
            f"StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(FOLDER)"
        )
    if Path(name).is_file():
        return f"{name}: a file, not a folder; `raysweep convert {shlex.quote(name)} OUT_DIR` makes one of a snapshot of EDM"
    return f"{name}: no such folder, and not an id on the Hugging Face hub (OWNER/NAME)"


def located(name: str, revision: str | None = None) -> Path:
    """The folder of a model given by its path, or by its id on the hub at a revision, from the hub's cache or the hub.

    Raises ValueError, saying how to get it, if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise ValueError(no_model(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    at = f" --revision {shlex.quote(revision)}" if revision else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=VARIANTS))
        if not any(folder.rglob("*.safetensors")):  # one that has nothing but variants
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
        return folder.absolute()
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: is gated: accept its conditions at https://huggingface.co/{name}, and log in with `hf auth login`"
        ) from error
    except NoRevision as error:
        raise ValueError(f"{name}: has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name}: is neither a folder nor a repository that the hub shows you") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name}: is not in the hub's cache, and the hub cannot be reached: run `hf download {name}{at}` where it can, and "
            "name the folder that it prints"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming the file, if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be an object ({{...}}), not a {type(data).__name__}")
    return data


def pipeline_class(folder: Path, valid: Iterable[str]) -> str:
    """The pipeline class that a folder declares; raises ValueError unless it is one of `valid`."""
    index = folder / INDEX
    if folder.is_file():
        raise ValueError(no_model(str(folder)))
    if not index.is_file():
        raise ValueError(f"{folder}: not a diffusers pipeline folder ({INDEX} is missing){_instead(folder)}")
    name = read_json(index).get("_class_name")
    if not isinstance(name, str) or name not in valid:
        raise ValueError(f"{folder}: holds a {name}; supported: {', '.join(sorted(valid))}")
    return name


def _instead(folder: Path) -> str:
    """What a folder without an index probably is."""
    inner = sorted(folder.glob(f"snapshots/*/{INDEX}")) or sorted(folder.glob(f"*/{INDEX}"))
    if inner:
        return f"; there is one in {inner[0].parent}"
    config = folder / "config.json"
    kind = read_json(config).get("_class_name") if config.is_file() else None
    return f"; it is a {kind} alone, a part of such a folder" if kind else ""


def no_pickles(folder: Path) -> None:
    """Raises ValueError unless a component's weights are there in safetensors format."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    found = f"; found {', '.join(pickles)}, but pickled weights are never loaded" if pickles else ""
    raise ValueError(f"{folder}: weights are missing: they must be in safetensors format{found}")


def component_files(folder: Path, either: tuple[str, ...]) -> None:
    """Raises ValueError unless one of the files is in the folder."""
    if not any((folder / name).is_file() for name in either):
        raise ValueError(f"{folder}: {' or '.join(either)} is missing")


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turns whatever a library raises about files that are cut short or foreign into one ValueError, and keeps its own reports
    of what it read quiet: they are looked at."""
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # transformers' loading threads have hung beside others
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines) if lines else type(error).__name__
        raise ValueError(
            f"{place}: cannot be read: {reason[:REASON]}{'...' if len(reason) > REASON else ''}"
        ) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Mutes log messages in a block, such as open_clip's warning that a model that is only built has no weights."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
