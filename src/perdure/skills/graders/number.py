"""The last number in the answer."""

from __future__ import annotations

import re
from decimal import Context, Decimal, localcontext

from perdure.skills.graders.text import expected_text
from perdure.types import Example

# A sign counts only where no word or number stands before it ("2024-01-15" and "5-3" hold no negative number).
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:[eE][+-]?\d+)?")
_DIGITS = 60
"""Of the difference. Decimals, because as floats long integers that differ would be equal."""


def grade(completion: str, example: Example, tolerance: float = 1e-9) -> float:
    """1 when the last numbers of answer and demonstration differ by at most ``tolerance``."""
    given, right = _last(completion), _last(expected_text(example))
    if given is None or right is None:
        return 0.0
    # Without traps: exponents beyond all limits become infinity or NaN, which compare as a wrong answer.
    with localcontext(Context(prec=_DIGITS, traps=[])):
        return float(abs(Decimal(given) - Decimal(right)) <= Decimal(tolerance))


def _last(text: str) -> str | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found else None
