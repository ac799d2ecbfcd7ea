"""Multiple choice: the letter at the start of the answer."""

from __future__ import annotations

import re

from perdure.skills.graders.text import expected_text
from perdure.types import Example

# After the letter comes the end, a new line or a mark: "A dog" and "I think" name no choice.
_LETTER = re.compile(
    r"\W*(?:the\s+)?(?:(?:correct\s+|right\s+|best\s+)?(?:answer|choice|option)\b(?:\s+is\b)?\W*)?"
    r"(?:(?:option|choice)\s+)?([A-Z])(?=[^\S\n]*(?:$|\n|[^\w\s'’]))(?!\s*[,/&]\s*[A-Z](?:\s*[,/&]|\s+(?:and|or)\b))",
    re.IGNORECASE,
)


def grade(completion: str, example: Example) -> float:
    """1 when the answer names the demonstration's letter first ("B", "(B) ...", "B: ...", "The answer is B")."""
    given, right = _letter(completion), _letter(expected_text(example))
    return float(given is not None and given == right)


def _letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match[1].upper() if match else None
