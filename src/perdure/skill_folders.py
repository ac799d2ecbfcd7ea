"""The folder of a workspace's kept skills: each content of a skill once, as it was taught."""

from __future__ import annotations

import re
from pathlib import Path

from perdure.files import folder_beside, put_in_place, sync_path
from perdure.skills.base import content_hash, skill_files
from perdure.types import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*@[0-9a-f]{8}")


class SkillFolders:
    """Of one workspace; ``folder`` is its ``skills``, which the first kept skill makes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def folder_of(self, name: str, content: str) -> Path:
        """Where a skill's content (its hash) is kept. Raises InputError for a name that would lead out of the
        folder."""
        folder = f"{name}@{content[:8]}"
        if not _NAME.fullmatch(folder):
            raise InputError(f"{self.folder}: {folder!r} is no name of a kept skill")
        return self.folder / folder

    def keep(self, source: Path, name: str, content: str) -> Path:
        """Copy a skill's three files here, once per content; returns the copy.

        Raises InputError when the files have changed since they were hashed."""
        final = self.folder_of(name, content)
        files = skill_files(source)
        if content_hash(files) != content:
            raise InputError(f"{source}: was changed while it was in use; start again")
        if final.is_dir():
            if content_hash(skill_files(final)) != content:
                raise InputError(f"{final}: damaged, its files are not those of the skill that was kept here")
            return final
        beside = folder_beside(final)
        for file, data in files.items():
            (beside / file).write_bytes(data)
        put_in_place(beside, final)
        sync_path(self.folder.parent)
        return final
