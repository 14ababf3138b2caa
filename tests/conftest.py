"""Shared tasks, and the settings that keep test processes from fighting over cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest
import torch
from tiny import tiny_task

from raysweep.tasks.task import Task

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def points_task() -> Task:
    return tiny_task("points")


@pytest.fixture(scope="session")
def class_task() -> Task:
    return tiny_task("class")
