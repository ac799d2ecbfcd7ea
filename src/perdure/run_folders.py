"""The folders of a workspace's stages: ``runs/s01-NAME``, each with what its training wrote on the way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_STAGE = re.compile(r"s([0-9]{2,})-")


class RunFolders:
    """Those below ``folder``, the workspace's ``runs``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def folder_of(self, stage: str) -> Path:
        return self.folder / stage

    def names(self) -> list[str]:
        """Of all stages that have a folder, in the order they were begun."""
        names = (path.name for path in self.folder.glob("s*") if _STAGE.match(path.name))
        return sorted(names, key=_number)

    def begun(self) -> list[str]:
        """A folder without its stage.json was left by a kill before the stage began."""
        return [stage for stage in self.names() if (self.folder_of(stage) / "stage.json").is_file()]

    def remove(self, stage: str) -> None:
        """One rename hides the folder first: a half-removed run could be taken for a whole one."""
        folder = self.folder_of(stage)
        hidden = folder.with_name(f".{stage}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def next_name(skill: str, taken: Iterable[str]) -> str:
    """The name of a skill's stage, numbered after all those that are taken."""
    return f"s{max(map(_number, taken), default=0) + 1:02d}-{skill}"


def _number(stage: str) -> int:
    match = _STAGE.match(stage)
    assert match, stage
    return int(match[1])
