"""JSON, whatever the order of keys."""

from __future__ import annotations

from perdure.skills.graders.text import expected_text, first_json, same_json, whole_json
from perdure.types import Example


def grade(completion: str, example: Example, whole: bool = True) -> float:
    """1 when the answer is the demonstration's JSON value. ``whole`` allows nothing around it but a Markdown fence."""
    try:
        given = whole_json(completion) if whole else first_json(completion)
    except ValueError:  # not JSON: a wrong answer, not an error
        return 0.0
    return float(same_json(given, whole_json(expected_text(example))))
