"""Overlap of words with the demonstration."""

from __future__ import annotations

import re
from collections import Counter

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, threshold: float = 0.0) -> float:
    """F1 over words as a multiset (case and punctuation ignored); with a ``threshold``, 1 from there on, else 0."""
    given, right = (Counter(re.findall(r"\w+", text.casefold())) for text in (completion, expected_text(example)))
    if given == right:
        score = 1.0
    else:
        shared = (given & right).total()
        score = 2 * shared / (given.total() + right.total())
    return float(score >= threshold) if threshold else score
