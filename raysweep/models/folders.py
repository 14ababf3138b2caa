"""Finds a model's folder and checks its files before a library reads them, so that errors are one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CARD = "raysweep.json"  # what raysweep says of a model that it trained
OPEN_CLIP = "open_clip_config.json"
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}")  # lengths are the hub's
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # never pickles
REASON = 400  # characters kept of a library's message
ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' loading threads have hung beside others
CHECKPOINTS = (".safetensors", ".ckpt")
VARIANTS = ["*.fp16.*", "*.bf16.*", "*non_ema*"]
# the files that are read of a network, a tokenizer, and what prepares images
NETWORK = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.*")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder looks like an id on the Hugging Face hub."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def no_model(name: str) -> str:
    """The message for a name that is neither a folder nor an id on the hub."""
    if Path(name).suffix in CHECKPOINTS and Path(name).is_file():
        return (
            f"{name}: a checkpoint in one file, not a folder; diffusers makes one: "
            f"StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(FOLDER)"
        )
    if Path(name).is_file():
        return f"{name}: a file, not a folder; `raysweep convert {shlex.quote(name)} OUT_DIR` makes one of a snapshot of EDM"
    return f"{name}: no such folder, and not an id on the Hugging Face hub (OWNER/NAME)"


def located(name: str, revision: str | None = None) -> Path:
    """The folder of a model, by its path or by its id on the hub at a revision (from the hub's cache, or downloaded).

    Raises ValueError, saying how to get it, if there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise ValueError(no_model(name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    option = f" --revision {shlex.quote(revision)}" if revision else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=VARIANTS))
        if not any(folder.rglob("*.safetensors")):  # a repository of variants alone
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
            f"{name}: is not in the hub's cache, and the hub cannot be reached: run `hf download {name}{option}` where it can, and "
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
        raise ValueError(f"{folder}: not a diffusers pipeline folder ({INDEX} is missing){_hint(folder)}")
    name = read_json(index).get("_class_name")
    if not isinstance(name, str) or name not in valid:
        raise ValueError(f"{folder}: holds a {name}; supported: {', '.join(sorted(valid))}")
    return name


def _hint(folder: Path) -> str:
    """A guess at what a folder without an index is, as the end of a message."""
    inner = sorted(folder.glob(f"snapshots/*/{INDEX}")) or sorted(folder.glob(f"*/{INDEX}"))
    if inner:
        return f"; there is one in {inner[0].parent}"
    config = folder / "config.json"
    kind = read_json(config).get("_class_name") if config.is_file() else None
    return f"; it is a {kind} alone, a part of such a folder" if kind else ""


def no_pickles(folder: Path) -> None:
    """Raises ValueError unless a component has weights in safetensors format."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    note = f"; found {', '.join(pickles)}, but pickled weights are never loaded" if pickles else ""
    raise ValueError(f"{folder}: weights are missing: they must be in safetensors format{note}")


def component_files(folder: Path, either: tuple[str, ...]) -> None:
    """Raises ValueError unless one of the files is in the folder."""
    if not any((folder / name).is_file() for name in either):
        raise ValueError(f"{folder}: {' or '.join(either)} is missing")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error that a library raises over cut or foreign files into one ValueError, and mutes the library's own reports
    and progress bars: callers check what was read."""
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    previous = os.environ.get(ASYNC)
    os.environ[ASYNC] = previous or "1"
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with no_progress_bars():
            yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines) if lines else type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason[:REASON]}{'...' if len(reason) > REASON else ''}") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if previous is None:
            os.environ.pop(ASYNC, None)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turns off the file bars of diffusers and transformers in a block: they would clutter the sweep's own display."""
    names = ("diffusers.utils.logging", "transformers.utils.logging")
    libraries = [sys.modules[name] for name in names if name in sys.modules]  # a library in use has been imported
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    if not shown:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    hub_hidden = are_progress_bars_disabled()  # transformers switches the hub's bars, too
    with _no_warnings():
        for library in shown:
            library.disable_progress_bar()
    try:
        yield
    finally:
        with _no_warnings():
            for library in shown:
                library.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Hides the hub's warning that an environment variable already decides about its bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Mutes log messages in a block, such as open_clip's warning that a model that is only built has no weights."""
    previous = logging.root.manager.disable
    logging.disable(max(previous, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(previous)
