"""The answer is the demonstration, character by character up to white space."""

from __future__ import annotations

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, ignore_case: bool = False, ignore_space: bool = True) -> float:
    """1 when equal. ``ignore_space`` folds runs of white space and drops those at the ends."""
    return float(
        _fold(completion, ignore_case, ignore_space) == _fold(expected_text(example), ignore_case, ignore_space)
    )


def _fold(text: str, ignore_case: bool, ignore_space: bool) -> str:
    text = " ".join(text.split()) if ignore_space else text
    return text.casefold() if ignore_case else text
