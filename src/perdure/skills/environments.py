"""Environments: the user's own Python that carries out tool calls, so that a student sees the results of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from perdure.skills.users import users_code
from perdure.types import Example, InputError


class Environment(Protocol):
    """The world of one conversation. It may also have ``score() -> 0..1``, which then judges the conversation in the
    place of the skill's grader, by what became of the world. Same calls, same results: runs are repeated."""

    def step(self, calls: Sequence[dict[str, Any]]) -> Sequence[str]:
        """Carry out the calls of one assistant turn, ``{"name", "arguments"}`` each, in order; the result of each as
        the tool's turn will say it. A call that is wrong gets a result that says so, not an exception."""
        ...


@dataclass(frozen=True)
class Acting:
    """How a skill's conversations are played."""

    name: str
    """``python:module:factory``."""
    factory: Callable[..., Any]
    options: dict[str, Any]
    max_turns: int
    """Most assistant turns of one conversation."""

    def _users_code(self, example: Example, what: str) -> AbstractContextManager[None]:
        return users_code(example, f"the environment {self.name!r} {what}")

    def begin(self, example: Example) -> Environment:
        """A fresh world for a row. Raises InputError when the user's factory does."""
        with self._users_code(example, "cannot begin"):
            return self.factory(example, **self.options)

    def results(self, world: Environment, calls: Sequence[dict[str, Any]], example: Example) -> list[str]:
        """The results of the calls. Raises InputError when the environment raises, or returns something else."""
        with self._users_code(example, "failed"):
            found = list(world.step(calls))
        if len(found) != len(calls) or not all(isinstance(text, str) for text in found):
            raise InputError(
                f"{example.origin}: the environment {self.name!r} must return one text a call ({len(calls)} here), not "
                f"{found!r}"
            )
        return found

    def score(self, world: Environment, example: Example) -> float | None:
        """What the world says of the conversation; None where it has no say."""
        judge = getattr(world, "score", None)
        if judge is None:
            return None
        with self._users_code(example, "failed"):
            score = float(judge())
        if not 0 <= score <= 1:
            raise InputError(f"{example.origin}: the environment {self.name!r} gave {score}, expected 0 to 1")
        return score
