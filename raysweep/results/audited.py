"""The audits behind a run's answer, and their rows and scores. No Ray.

A run that is resumed after its code or its models changed repeats the affected measurements under other keys, and the earlier
ones stay in its folder. A subject's name and a tier are therefore not enough to identify a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raysweep.auditing.request import rows_path, scores_path
from raysweep.config.schema import ConfigError
from raysweep.results.trials import Trial
from raysweep.rundir import RunDir
from raysweep.storage.schemas import ROWS, SCORES, read_table

Keys = dict[str, dict[str, str]]  # tier -> subject -> key of its audit


def keys_of(folder: RunDir, trials: Sequence[Trial]) -> Keys:
    """The audits behind the run's front or, without one, those of its anchors; and the probes of `trials` and of the anchors.

    Raises ConfigError for the front of an earlier raysweep, which does not name its audits.
    """
    keys: Keys = {}
    for tier in ("probe", "audit"):
        if folder.anchors(tier).is_file():
            keys[tier] = json.loads(folder.anchors(tier).read_text())["keys"]
    if folder.front_json.is_file():
        front = json.loads(folder.front_json.read_text())
        if "audits" not in front:
            raise ConfigError(
                f"{folder.front_json}: was written by an earlier raysweep, whose runs this version cannot resume: run the sweep again under "
                f"another name, for example name={folder.path.name}-2"
            )
        keys |= front["audits"]
    keys.setdefault("probe", {}).update({t.trial: t.probe for t in trials if t.probe})
    return keys


def rows_of(
    folder: RunDir, keys: Keys, subjects: Iterable[str], columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of `subjects` in all tiers (see `storage.schemas.ROWS`), each audit's followed by its differences to base and oracles.

    columns: those to read; None for all.
    """
    rows = []
    for key in _wanted(keys, subjects):
        rows += read_table(rows_path(folder.path, key), ROWS, columns).to_pylist()
        paired = folder.rows / f"paired-{key}.parquet"
        if paired.is_file():
            rows += read_table(paired, ROWS, columns).to_pylist()
    return rows


def scores_of(
    folder: RunDir, keys: Mapping[str, str], subjects: Iterable[str], prefixes: Sequence[str] = ("",)
) -> dict[tuple[str, str], np.ndarray]:
    """(subject, score) -> its values in one tier, a row per independent unit in order: (units, values of a unit).

    keys: subject -> key of its audit. prefixes: begins of the scores' names that are wanted.
    """
    arrays = {}
    for subject in subjects:
        if subject in keys:
            table = read_table(scores_path(folder.path, keys[subject]), SCORES, ("score", "unit", "values"))
            for score in pc.unique(table["score"]).to_pylist():
                if score.startswith(tuple(prefixes)):
                    units = table.filter(pc.equal(table["score"], score)).sort_by("unit")
                    arrays[subject, score] = pc.list_flatten(units["values"]).to_numpy().reshape(len(units), -1)
    return arrays


def _wanted(keys: Keys, subjects: Iterable[str]) -> Iterator[str]:
    among = set(subjects)
    for tier in keys.values():
        yield from (key for subject, key in tier.items() if subject in among)
