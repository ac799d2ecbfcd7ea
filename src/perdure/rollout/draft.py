"""A draft of what a row is about to say: its demonstration, followed as long as the model agrees.

The engine feeds a block of draft tokens together with the row's last token, draws every position's token as always,
and keeps them up to the first that differs from the draft. A draft token d is so accepted with probability p(d), and
otherwise replaced by a draw from p without d: exactly what plain decoding draws, token by token, from the same seed.
The draft decides how many forward passes that takes, never which tokens come out.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_BLOCK = 8
"""Draft tokens beside the prompt: little next to the prompt itself, if the model knows nothing yet."""
LONGEST_SUFFIX = 8
"""Tokens that are compared to find the place in the draft again."""
SURE = 2
"""A match of at least this many tokens is followed at once; after a miss a shorter one is not."""


class Draft:
    """Where a row is in its reference, and how far to trust it."""

    def __init__(self, reference: Sequence[int], first_block: int = FIRST_BLOCK):
        self.reference = tuple(reference)
        self._at = 0
        self._block = first_block
        self._follow = True

    def propose(self, most: int) -> tuple[int, ...]:
        """The next block, at most ``most`` tokens; empty where the place in the reference is not known."""
        count = min(self._block, most) if self._follow else 0
        return self.reference[self._at : self._at + count]

    def saw(self, tokens: Sequence[int], proposed: int, accepted: int) -> None:
        """``tokens`` is all that the row has said by now; of the ``proposed`` draft tokens ``accepted`` were right."""
        if accepted == proposed:
            self._block = max(FIRST_BLOCK, 2 * self._block) if proposed else self._block
        else:
            self._block = max(1, accepted)
        expected = self._at + accepted
        if self.reference[expected : expected + 1] == (tokens[-1],):  # the one token beyond the block agrees too
            self._at, self._follow = expected + 1, True
            return
        length, place = self._find(tokens, expected + 1)
        # Without any match one token was replaced, perhaps: the reference may go on after it.
        self._at = place if length else expected + 1
        self._follow = length >= SURE or accepted > 0

    def _find(self, tokens: Sequence[int], expected: int) -> tuple[int, int]:
        """(length, place after it) of the longest suffix of ``tokens`` in the reference; of several, the nearest one
        to where the reference was expected to go on."""
        best = (0, 0, 0)
        for end in range(1, len(self.reference) + 1):
            length = 0
            while length < min(LONGEST_SUFFIX, end, len(tokens)) and (
                self.reference[end - 1 - length] == tokens[-1 - length]
            ):
                length += 1
            if length:
                best = max(best, (length, -abs(end - expected), end))
        return best[0], best[2]
