"""The last number in the answer."""

from __future__ import annotations

import re
from decimal import Context, Decimal, localcontext

from perdure.skills.graders.text import expected_text
from perdure.types import Example

# A sign counts only where no word or number stands before it ("2024-01-15" and "5-3" hold no negative number).
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][+-]?\d+)?")
_GAPS = " \u00a0\u202f\u2009'\u2019_"
"""What is written between groups of three digits."""
_DIGITS = 60
"""Of the difference. Decimals, because as floats long integers that differ would be equal."""


def grade(completion: str, example: Example, tolerance: float = 1e-9) -> float:
    """1 when the last numbers of answer and demonstration differ by at most ``tolerance``. An answer whose last number
    has a decimal comma, or more than one point, is none.

    Raises ValueError where the demonstration's has: what it says is not clear."""
    given, right, unclear = _last(completion), _last(expected_text(example)), _unclear(expected_text(example))
    if unclear:
        raise ValueError(f"the number {unclear!r} can be read in several ways; write it with a decimal point: 1234.5")
    if given is None or right is None:
        return 0.0
    # Without traps: exponents beyond all limits become infinity or NaN, which compare as a wrong answer.
    with localcontext(Context(prec=_DIGITS, traps=[])):
        return float(abs(Decimal(given) - Decimal(right)) <= Decimal(tolerance))


def _last(text: str) -> str | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found and not _unclear(text) else None


def _unclear(text: str) -> str | None:
    """The last number of a text, where it may be a part of a longer one: after digits with a comma or point (3,5 or
    1.234.567), a group of three after others (1 234, 1'234, 1_234), the end of a fraction or a time (1/2, 10:30)."""
    found = [*_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-"))]
    if not found:
        return None
    last = found[-1][0]
    patterns = [r"[\d.,]*\d[.,]$", r"\d+(?:[/:]\d+)*[/:]$"]
    if re.match(r"\d{3}(?!\d)", last):
        patterns.append(rf"(?<![\d.,])\d{{1,3}}(?:[{_GAPS}]\d{{3}})*[{_GAPS}]$")
    before = next(filter(None, (re.search(pattern, text[: found[-1].start()]) for pattern in patterns)), None)
    return before[0] + last if before else None
