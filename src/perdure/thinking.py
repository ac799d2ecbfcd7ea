"""Models that think before they answer: which part of a completion is thinking, and which is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perdure.config import ThinkingConfig

Part = Literal["all", "thinking", "answer"]
Region = tuple[int, int]
"""First and one past the last of a completion's tokens that carry loss."""


@dataclass(frozen=True)
class Marks:
    """How one model's thinking is marked off."""

    open: str
    close: str
    opened: bool
    """The generation prompt has opened the thinking already: a completion begins inside it."""

    def split(self, text: str) -> tuple[str, str]:
        """Thinking and answer of a completion. Thinking that is not closed has no answer; where nothing was opened,
        all of it is the answer."""
        before, closed, after = text.partition(self.close)
        if closed:
            return before.removeprefix(self.open).strip(), after.strip()
        if self.opened or text.lstrip().startswith(self.open):
            return text.lstrip().removeprefix(self.open).strip(), ""
        return "", text.strip()

    def region(self, tokenizer: Any, ids: Sequence[int], part: Part) -> Region:
        """The tokens of one part; the closing mark belongs to the thinking. Empty where there is no such part."""
        if part == "all":
            return 0, len(ids)
        closed = self._closed(tokenizer, ids)
        if closed is None:
            thinks = self.opened or tokenizer.decode(list(ids)).lstrip().startswith(self.open)
            closed = len(ids) if thinks else 0
        return (0, closed) if part == "thinking" else (closed, len(ids))

    def _closed(self, tokenizer: Any, ids: Sequence[int]) -> int | None:
        """How many of the tokens it takes until the closing mark stands there; None when it never does."""

        def stands(count: int) -> bool:
            return self.close in tokenizer.decode(list(ids[:count]), clean_up_tokenization_spaces=False)

        low, high = 0, len(ids)
        if not stands(high):
            return None
        while high - low > 1:  # the mark may be one token or several
            middle = (low + high) // 2
            low, high = (low, middle) if stands(middle) else (middle, high)
        return high


def marks_of(config: ThinkingConfig, start: str) -> Marks | None:
    """The marks of a model whose generation prompt, the text with which its turn begins, is ``start``; None where
    ``config`` does not say that it thinks."""
    if not config.enabled:
        return None
    return Marks(config.open, config.close, opened=start.rfind(config.open) > start.rfind(config.close))


def hesitations(text: str, words: Sequence[str]) -> int:
    """How often one of ``words`` stands in the text, whole and in any case."""
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return len(re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)) if words else 0
