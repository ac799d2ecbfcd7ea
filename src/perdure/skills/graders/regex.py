"""A pattern that the answer must match."""

from __future__ import annotations

import re

from perdure.types import Example


def grade(completion: str, example: Example, pattern: str = "", full: bool = True) -> float:
    """1 when ``pattern`` (or the row's ``metadata.pattern``) matches the whole answer, or with ``full`` off any part.

    Raises ValueError for a pattern that is missing or not valid."""
    expression = compiled(example.metadata.get("pattern", pattern))
    text = completion.strip()
    return float((expression.fullmatch(text) if full else expression.search(text)) is not None)


def compiled(pattern: object) -> re.Pattern[str]:
    """Raises ValueError for a pattern that is missing or not valid."""
    if not (isinstance(pattern, str) and pattern):
        raise ValueError("the grader regex needs a pattern as text: the option 'pattern' or the row's metadata.pattern")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern!r} is not valid: {error}") from error
