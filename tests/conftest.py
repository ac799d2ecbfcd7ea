"""Fixtures of the tests of the workspace: made-up versions, no model."""

from pathlib import Path

import pytest

from perdure.skills.base import Skill, load_skill
from perdure.workspace import Workspace
from toy_versions import grown_workspace, new_workspace, write_skill


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return new_workspace(tmp_path / "bot")


@pytest.fixture
def grown(tmp_path: Path) -> Workspace:
    return grown_workspace(tmp_path / "grown")


@pytest.fixture
def skill(tmp_path: Path) -> Skill:
    return load_skill(write_skill(tmp_path / "source"))
