"""Multiple choice: the letter at the start of the answer."""

from __future__ import annotations

import re

from perdure.skills.graders.text import expected_text
from perdure.types import Example

_LETTER = re.compile(r"^\W*(?:the\s+)?(?:(?:correct\s+)?answer(?:\s+is)?\W*)?([A-Z])(?![A-Za-z])", re.IGNORECASE)


def grade(completion: str, example: Example) -> float:
    """1 when the answer names the demonstration's letter first ("B", "(B) ...", "The answer is B")."""
    given, right = _letter(completion), _letter(expected_text(example))
    return float(given is not None and given == right)


def _letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match[1].upper() if match else None
