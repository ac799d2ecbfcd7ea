"""How the tests are run; and fixtures of the tests of the workspace: made-up versions, no model."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from perdure.skills.base import Skill, load_skill
from perdure.workspace import Workspace
from toy_versions import grown_workspace, new_workspace, write_skill

settings.register_profile("perdure", deadline=None)  # the machine may be busy, and first calls load libraries
settings.load_profile("perdure")

HEAVIEST = (
    "test_cli",
    "test_processes",
    "test_footprint",
    "test_embedded",
    "test_end_to_end",
    "test_bench",
    "test_kills",
)
"""Files that take longest, so that none of them begins when the other workers are through."""


def pytest_configure(config: pytest.Config) -> None:
    """One of several workers of pytest-xdist takes its part of the cores, and so do the programs that it starts."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The heaviest files first, the rest in its order; --no-loadscope-reorder has pytest-xdist keep to it."""
    places = {name: place for place, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return new_workspace(tmp_path / "bot")


@pytest.fixture
def grown(tmp_path: Path) -> Workspace:
    return grown_workspace(tmp_path / "grown")


@pytest.fixture
def skill(tmp_path: Path) -> Skill:
    return load_skill(write_skill(tmp_path / "source"))
