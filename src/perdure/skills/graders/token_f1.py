"""Overlap of words with the demonstration."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import groupby

from perdure.skills.graders.text import SPACELESS, expected_text
from perdure.types import Example


def grade(completion: str, example: Example, threshold: float = 0.0) -> float:
    """F1 over words as a multiset (case and punctuation ignored); with a ``threshold``, 1 from there on, else 0."""
    given, right = (Counter(words(text)) for text in (completion, expected_text(example)))
    if given == right:
        score = 1.0
    else:
        shared = (given & right).total()
        score = 2 * shared / (given.total() + right.total())
    return float(score >= threshold) if threshold else score


def words(text: str) -> list[str]:
    """Runs of letters with their marks, digits and underscores, case ignored. Where a script writes no spaces between
    words, each character is one."""
    found: list[str] = []
    for kind, run in groupby(unicodedata.normalize("NFC", text.casefold()), _kind):
        chars = "".join(run)
        found += {"alone": [*chars], "part": [chars], "between": []}[kind]
    return found


def _kind(char: str) -> str:
    if not (unicodedata.category(char)[0] in "LMN" or char == "_"):
        return "between"
    return "alone" if _ALONE.match(char) else "part"


_ALONE = re.compile(f"[{SPACELESS}]")
