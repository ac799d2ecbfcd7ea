"""The cores of each test worker; fixtures of the tests of the workspace: made-up versions, no model."""

import os
from pathlib import Path

import pytest
import torch

from perdure.skills.base import Skill, load_skill
from perdure.workspace import Workspace
from toy_versions import grown_workspace, new_workspace, write_skill


def pytest_configure(config: pytest.Config) -> None:
    """One of several workers of pytest-xdist takes its part of the cores, and so do the programs that it starts."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return new_workspace(tmp_path / "bot")


@pytest.fixture
def grown(tmp_path: Path) -> Workspace:
    return grown_workspace(tmp_path / "grown")


@pytest.fixture
def skill(tmp_path: Path) -> Skill:
    return load_skill(write_skill(tmp_path / "source"))
