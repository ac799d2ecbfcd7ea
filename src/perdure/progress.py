"""Progress for people: a live bar in a terminal, plain lines elsewhere. Every phase ends as one line that stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

PLAIN_EVERY = 20.0
"""Seconds between two lines of the same phase where there is no terminal."""


class ConsoleReporter:
    """Writes to ``console`` (stderr, so that stdout stays for results)."""

    def __init__(self, console: Console):
        self.console = console

    def stage(self, title: str) -> None:
        self.console.print()
        self.console.print(Text(title, style="bold"))

    def note(self, text: str) -> None:
        self.console.print(Text(f"  {text}"), soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[ConsolePhase]:
        phase = ConsolePhase(self.console, name, total, unit)
        with phase.shown():
            yield phase
        self.console.print(Text(f"  {phase.summary()}", style="dim"), soft_wrap=True)


class ConsolePhase:
    """A phase's bar or lines."""

    def __init__(self, console: Console, name: str, total: int, unit: str):
        self.console = console
        self.name = name
        self.unit = unit
        self.done, self.total, self.tokens, self.note = 0, total, 0, ""
        self.started = time.perf_counter()
        self._printed = self.started
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def update(self, done: int, total: int | None = None, tokens: int = 0, note: str = "") -> None:
        self.done, self.total = done, total or self.total
        self.tokens += tokens
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total or None, status=self._status())
        elif time.perf_counter() - self._printed > PLAIN_EVERY:
            self._printed = time.perf_counter()
            line = f"  {self.name}: {self.done}/{self.total} {self.unit}, {self._status()}"
            self.console.print(Text(line), soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The live bar while the work runs; nothing where there is no terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("  {task.description}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("[dim]{task.fields[status]}"))  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as bar:
            self._bar = bar
            self._task = bar.add_task(escape(self.name), total=self.total or None, status="")
            yield
        self._bar = None

    def summary(self) -> str:
        """The line that stays."""
        parts = [self.name, *([f"{self.done:,} {self.unit}"] if self.done else [])]
        if self.tokens and self.unit != "tokens":
            parts.append(f"{self.tokens:,} tokens")
        if self.tokens:
            parts.append(f"{self.tokens / self._elapsed():,.0f} tokens/s")
        parts.append(duration(self._elapsed()))
        return " · ".join(parts + ([self.note] if self.note else []))

    def _elapsed(self) -> float:
        return max(1e-6, time.perf_counter() - self.started)

    def _status(self) -> str:
        parts = [f"{self.tokens / self._elapsed():,.0f} tokens/s"] if self.tokens else []
        if self.done and self.total:
            left = self._elapsed() / self.done * max(0, self.total - self.done)
            parts.append(f"{duration(left)} left")
        return escape(", ".join(parts + ([self.note] if self.note else [])))


def duration(seconds: float) -> str:
    """``9 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
