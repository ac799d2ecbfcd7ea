"""The answer contains what it must."""

from __future__ import annotations

import re

from perdure.skills.graders.text import expected_text
from perdure.types import Example


def grade(completion: str, example: Example, ignore_case: bool = True, whole_words: bool = False) -> float:
    """1 when every part of the row's ``metadata.contains`` (default: the demonstration) occurs in the answer; a part is
    a text, or a list of texts one of which must occur. ``whole_words``: not inside a longer word. Never inside a longer
    number.

    Raises ValueError when ``metadata.contains`` is of another form."""
    wanted = example.metadata["contains"] if "contains" in example.metadata else [expected_text(example)]
    if not (isinstance(wanted, list) and wanted and all(map(_is_part, wanted))):
        raise ValueError("'metadata.contains' must be a list of texts (or of lists of texts), none of them empty")
    parts = ([part] if isinstance(part, str) else part for part in wanted)
    return float(all(any(occurs(text, completion, ignore_case, whole_words) for text in part) for part in parts))


def occurs(text: str, answer: str, ignore_case: bool = True, whole_words: bool = False) -> bool:
    """Whether the text stands in the answer, not inside a longer number; ``whole_words``: nor inside a longer word."""
    if ignore_case:
        text, answer = text.casefold(), answer.casefold()
    if text not in answer:
        return False
    before = (r"(?<!\w)" if whole_words else "") + (r"(?<!\d)(?<!\d[.,])" if whole_words or text[0].isdigit() else "")
    after = (r"(?!\w)" if whole_words else "") + (r"(?!\d)(?![.,]\d)" if whole_words or text[-1].isdigit() else "")
    return re.search(f"{before}{re.escape(text)}{after}", answer) is not None


def _is_part(part: object) -> bool:
    texts = part if isinstance(part, list) else [part]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
