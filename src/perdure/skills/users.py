"""Code that users bring: graders and environments of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from perdure.types import Example, InputError


@contextmanager
def users_code(example: Example, what: str) -> Iterator[None]:
    """Whatever happens inside, in code that is not ours, becomes an InputError that names the row and ``what``."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{example.origin}: {what}: {error!r}") from error
