"""Answers written ahead: the student samples those of the next step while this one trains on its own.

They come from weights one step behind. What that changes is corrected by importance weights (``update.importance``),
truncated, as in truncated importance sampling for asynchronous rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from perdure.processes import GROUP
from perdure.types import Completion, InputError


class Ahead:
    """The next step's answers, under way or done. One decode at a time, in a thread of its own."""

    def __init__(self, wanted: bool):
        if wanted and GROUP.count > 1:
            raise InputError("train.overlap is for one process: several share each step's rollouts already")
        self._step = -1
        self._answers: Future[list[Completion]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead") if wanted else None

    def begin(self, step: int, write: Callable[[], list[Completion]]) -> None:
        """Let ``write`` make the answers of ``step``."""
        if self._thread and self._step != step:
            self._step, self._answers = step, self._thread.submit(write)

    def take(self, step: int) -> list[Completion] | None:
        """The answers of ``step``; None where they were not begun. What went wrong in writing them is raised here."""
        if self._step != step or self._answers is None:
            return None
        answers, self._answers = self._answers.result(), None
        return answers

    def wait(self) -> None:
        """Before the weights that decode are changed: until what is under way is done."""
        if self._answers:
            self._answers.result()

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, JSON: the weights that wrote these answers will be gone."""
        if self._answers is None:
            return None
        return {"step": self._step, "answers": [asdict(answer) for answer in self._answers.result()]}

    def load_state(self, state: dict[str, Any] | None) -> None:
        if state:
            self._step, self._answers = state["step"], Future()
            self._answers.set_result(_answers(state["answers"]))

    def close(self) -> None:
        """Ends the thread, after what is under way."""
        if self._thread:
            self._thread.shutdown()


def _answers(rows: Sequence[dict[str, Any]]) -> list[Completion]:
    return [Completion(tuple(row["token_ids"]), tuple(row["sampler_logprobs"]), row["finished"]) for row in rows]
