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
    fold = str.casefold if ignore_case else str
    found = fold(completion)

    def occurs(text: str) -> bool:
        if not whole_words:
            return fold(text) in found
        return re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(fold(text))}(?!\w)(?![.,]\d)", found) is not None

    return float(all(any(map(occurs, [part] if isinstance(part, str) else part)) for part in wanted))


def _is_part(part: object) -> bool:
    texts = part if isinstance(part, list) else [part]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
