"""Shared tasks, and the settings that keep test processes from fighting over cores."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else Ray's processes starve beside a busy test process
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # see `raysweep.models.folders.reading`

import pytest
import torch
from family_folders import save_families
from tiny import tiny_task

from raysweep.tasks.task import Task

torch.set_num_threads(1)


LONG = (
    "test_run",
    "test_faults",
    "test_job",
    "test_methods",
    "test_api",
)  # begun first, so that none is left alone at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others stay in order of name."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def lighter_collection() -> Iterator[None]:
    """Excludes the libraries' millions of objects from garbage collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The cache of base, oracles and judges that sweeps of one configuration share: the first test that needs them trains them."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes its own folder below a common one
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    """A folder with a saved model of each family, by its name; see `family_folders`."""
    root = tmp_path_factory.mktemp("originals")
    save_families(root)
    return root


@pytest.fixture
def copy(originals, tmp_path) -> Callable[[str], Path]:
    """Makes a copy, which may be changed, of the saved model of a family."""
    return lambda family: Path(shutil.copytree(originals / family, tmp_path / family))


@pytest.fixture(scope="session")
def points_task() -> Task:
    return tiny_task("points")


@pytest.fixture(scope="session")
def class_task() -> Task:
    return tiny_task("class")
