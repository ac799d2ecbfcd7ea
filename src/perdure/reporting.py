"""What long work says while it runs: an interface, and an implementation that says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Phase(Protocol):
    """One piece of work with a known size."""

    def update(self, done: int, total: int | None = None, tokens: int = 0, note: str = "") -> None:
        """``done`` of ``total`` units are finished; ``tokens`` went through the model since the last call."""
        ...


class Reporter(Protocol):
    """Told by the curriculum; draws bars or writes lines."""

    def stage(self, title: str) -> None:
        """A new skill's stage begins."""
        ...

    def phase(self, name: str, total: int, unit: str) -> Any:
        """A context manager that gives the Phase."""
        ...

    def note(self, text: str) -> None:
        """A finished fact, as a line of its own."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, title: str) -> None:
        pass

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Phase]:
        yield self

    def update(self, done: int, total: int | None = None, tokens: int = 0, note: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass
