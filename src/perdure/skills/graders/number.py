"""The last number in the answer."""

from __future__ import annotations

import re

from perdure.skills.graders.text import expected_text
from perdure.types import Example

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?")


def grade(completion: str, example: Example, tolerance: float = 1e-9) -> float:
    """1 when the last numbers of answer and demonstration differ by at most ``tolerance``."""
    given, right = _last(completion), _last(expected_text(example))
    return float(given is not None and right is not None and abs(given - right) <= tolerance)


def _last(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
