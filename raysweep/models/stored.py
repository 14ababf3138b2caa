"""The folders of a run's candidates: what differs from the run's base, in `delta.safetensors`, and the candidate's card.

What is frozen lies once, in the base. `families.load` reads such a folder like any other model. A candidate whose weights were
dropped has its card alone, which says how to make it again. Light to import: PyTorch is imported where weights are read or written.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysweep.models.folders import CARD, read_json
from raysweep.storage.files import write_json

FILE = "delta.safetensors"
PLACE = "base.json"  # beside the candidates of a run: where their base is


class Missing(ValueError):
    """A candidate's weights were dropped, or its base is gone; the message says how to get them back."""


def save(folder: Path, base: Any, base_digest: str, model: Any, digest: str, place: str) -> None:
    """Writes a model into a new folder as what differs from its base or, if a delta cannot hold that, whole.

    base_digest, digest: hashes of base and model; place: the base's folder.
    """
    from safetensors.torch import save_file

    from raysweep.models import delta

    try:
        header, tensors = delta.between(base, model, base_digest, digest)
    except ValueError:  # a method may change a model in any way
        model.save(folder)
        return
    save_file(tensors, folder / FILE, header | {"place": place})


def say_place(candidates: Path, base: str) -> None:
    """Records where the base of all candidates in a folder is, which may have moved since they were written."""
    write_json(candidates / PLACE, {"base": base})


def is_kept(folder: Path) -> bool:
    """Whether a candidate's folder has its weights."""
    return folder.is_dir() and any(_weights(folder))


def drop(folder: Path) -> None:
    """Removes a candidate's weights; its card stays."""
    for path in _weights(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _weights(folder: Path) -> list[Path]:
    """What is in a candidate's folder besides its card; without hidden files, which a network file system may leave for a while."""
    return [path for path in folder.iterdir() if path.name != CARD and not path.name.startswith(".")]


def base_of(folder: Path) -> Path | None:
    """The folder of the base of a candidate that is stored as a delta; None for any other folder.

    Raises Missing if the weights were dropped, or if the base is gone; ValueError if the file is damaged.
    """
    if not (folder / FILE).is_file():
        if (folder / CARD).is_file() and not is_kept(folder):
            raise Missing(f"{folder}: this candidate's weights were dropped to save disk; {_make_again(folder)}")
        return None
    from raysweep.models import delta

    try:
        header = delta.header_of(folder / FILE)
    except ValueError as error:
        raise ValueError(f"{error}; {_make_again(folder)}") from error
    recorded = folder.parent / PLACE
    places = [header["place"], *([read_json(recorded)["base"]] if recorded.is_file() else [])]
    found = next((place for place in map(Path, places) if place.is_dir()), None)
    if found is None:
        raise Missing(
            f"{folder}: is stored as what differs from its base, the model with the hash {header['base']}, which is no longer in "
            f"{places[-1]}: put it back there"
        )
    return found


def compose(folder: Path, place: Path, load: Callable[[Path], Any]) -> Any:
    """The candidate in a folder over its base, which `load` reads from `place`.

    Raises ValueError unless that has exactly the hash that it had when it was stored.
    """
    from raysweep.models import delta, weights

    file = folder / FILE
    header, tensors = delta.read(file)
    model = load(place)
    try:
        digest = delta.apply(model, header, tensors, str(file))
        problem = f"{file}: gives a model with the hash {digest} instead of {header['candidate']}: it is damaged"
    except ValueError as error:
        digest, problem = "", str(error)
    if digest == header["candidate"]:
        weights.check_finite(folder, model.net)
        return model
    found = load(place).digest
    if found != header["base"]:
        raise ValueError(
            f"{folder}: is stored as what differs from its base, the model with the hash {header['base']}, but {place} has the hash "
            f"{found}: put the base back there"
        )
    raise ValueError(f"{problem}; {_make_again(folder)}")


def _make_again(folder: Path) -> str:
    run, trial = folder.absolute().parent.parent, folder.absolute().name
    return f"make it again: {shlex.join(['raysweep', 'remake', str(run), trial])}"
