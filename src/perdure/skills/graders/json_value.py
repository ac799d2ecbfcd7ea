"""JSON, whatever the order of keys."""

from __future__ import annotations

from perdure.skills.graders.text import expected_text, first_json, same_json, whole_json
from perdure.types import Example


def grade(completion: str, example: Example, whole: bool = True) -> float:
    """1 when the answer is the demonstration's JSON value. ``whole`` allows nothing around it but a Markdown fence.

    Raises ValueError when the demonstration itself is no JSON."""
    right = _parsed(expected_text(example), whole)
    try:
        given = _parsed(completion, whole)
    except ValueError:  # not JSON: a wrong answer, not an error
        return 0.0
    return float(same_json(given, right))


def _parsed(text: str, whole: bool) -> object:
    return whole_json(text) if whole else first_json(text)
