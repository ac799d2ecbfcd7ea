"""A pattern that the answer must match."""

from __future__ import annotations

import re

from perdure.types import Example, InputError


def grade(completion: str, example: Example, pattern: str = "", full: bool = True) -> float:
    """1 when ``pattern`` (or the row's ``metadata.pattern``) matches the whole answer, or any part with ``full`` off."""
    expression = compiled(example.metadata.get("pattern") or pattern, example.origin)
    text = completion.strip()
    return float((expression.fullmatch(text) if full else expression.search(text)) is not None)


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Raises InputError naming the place of a pattern that is missing or not valid."""
    if not pattern:
        raise InputError(f"{where}: the grader regex needs a pattern (option 'pattern' or the row's metadata.pattern)")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{where}: the pattern {pattern!r} is not valid: {error}") from error
