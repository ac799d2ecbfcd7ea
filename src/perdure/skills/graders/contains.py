"""The answer contains what it must."""

from __future__ import annotations

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, ignore_case: bool = True) -> float:
    """1 when every text of the row's ``metadata.contains`` (default: the demonstration) occurs in the answer.

    Raises ValueError when ``metadata.contains`` is no list of texts."""
    wanted = example.metadata.get("contains", [expected_text(example)])
    if not (isinstance(wanted, list) and wanted and all(isinstance(text, str) and text for text in wanted)):
        raise ValueError("'metadata.contains' must be a list of texts, none of them empty")
    fold = str.casefold if ignore_case else str
    return float(all(fold(text) in fold(completion) for text in wanted))
