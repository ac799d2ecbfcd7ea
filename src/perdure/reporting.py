"""What long work says while it runs: an interface, and an implementation that says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


def out_of_memory(error: BaseException) -> bool:
    """Whether a library said that a device, or the machine, has no memory left."""
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or _NO_CPU_MEMORY in str(error)


_NO_CPU_MEMORY = "DefaultCPUAllocator"
"""In the message of torch's RuntimeError where it is a CPU's memory."""


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
