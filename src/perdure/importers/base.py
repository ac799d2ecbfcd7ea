"""What importers share: finding a data package, and writing a skill folder whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from perdure.files import new_folder
from perdure.skills.base import load_skill
from perdure.skills.reading import in_short
from perdure.types import InputError

Row = dict[str, Any]
"""One line of train.jsonl or test.jsonl."""


def skill_name(target: Path) -> str:
    """The name of a skill after its folder, in the letters that a name may have."""
    return re.sub(r"[^a-z0-9_-]+", "-", target.name.lower()).strip("-")


def refuse_or_skip(problems: Sequence[str], skipped: list[str] | None, message: str = "") -> None:
    """Raises InputError where there are problems, or adds them to ``skipped``: None where nothing may be left out."""
    if skipped is not None:
        skipped += problems
    elif problems:
        raise InputError(message or in_short(problems))


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


def tokens_at_most(text: str) -> int:
    """Room for a text and the token that ends the turn, whatever the tokenizer: letters of plain English come several
    to a token, a sign or digit may be one by itself, any other character one for each of its bytes. Room is cheap:
    decoding ends with the turn."""
    plain = sum(char.isascii() and (char.isalpha() or char.isspace()) for char in text)
    return (plain + 1) // 2 + len(text.encode("utf-8", "surrogatepass")) - plain + 1
