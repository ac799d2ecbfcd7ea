"""The answer contains what it must."""

from __future__ import annotations

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, ignore_case: bool = True) -> float:
    """1 when every text of the row's ``metadata.contains`` (default: the demonstration) occurs in the answer."""
    wanted = example.metadata.get("contains") or [expected_text(example)]
    fold = str.casefold if ignore_case else str
    return float(all(fold(text) in fold(completion) for text in wanted))
