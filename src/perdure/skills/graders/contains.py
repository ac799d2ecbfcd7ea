"""The answer contains what it must."""

from __future__ import annotations

import re

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, ignore_case: bool = True, whole_words: bool = False) -> float:
    """1 when every part of the row's ``metadata.contains`` (default: the demonstration) occurs in the answer; a part is
    a text, or a list of texts one of which must occur. ``whole_words``: not inside a longer word or number.

    Raises ValueError when ``metadata.contains`` is of another form."""
    wanted = example.metadata["contains"] if "contains" in example.metadata else [expected_text(example)]
    if not (isinstance(wanted, list) and wanted and all(map(_is_part, wanted))):
        raise ValueError("'metadata.contains' must be a list of texts (or of lists of texts), none of them empty")
    parts = ([part] if isinstance(part, str) else part for part in wanted)
    return float(all(any(occurs(text, completion, ignore_case, whole_words) for text in part) for part in parts))


def occurs(text: str, answer: str, ignore_case: bool = True, whole_words: bool = False) -> bool:
    """Whether the text stands in the answer; ``whole_words``: not inside a longer word or number."""
    if ignore_case:
        text, answer = text.casefold(), answer.casefold()
    if not whole_words:
        return text in answer
    return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(text)}(?!\w)(?![.,]\d)", answer) is not None


def _is_part(part: object) -> bool:
    texts = part if isinstance(part, list) else [part]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
