"""What any rollout engine gives: completions for prompts, with the log-probabilities they were sampled with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from perdure.types import Completion, Prompt

Progress = Callable[[int, int], None]
"""Called with (tokens generated since the last call, rows finished so far)."""


TotalProgress = Callable[[int, int, int], None]
"""Called with (tokens since the last call, rows done, rows in all) over several calls of ``generate``."""


def part_of(progress: TotalProgress | None, before: int, total: int) -> Progress | None:
    """The progress of one call as a part of several: ``before`` rows of ``total`` were done in earlier ones."""
    if progress is None:
        return None
    return lambda tokens, done: progress(tokens, before + done, total)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. ``temperature`` 0 is greedy."""

    max_new_tokens: int
    """The closing token counts."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 = all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together have this probability; 1 = all."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in (0, 1], not {self.top_k} and {self.top_p}")


def references_of(
    prompts: Sequence[Prompt], seeds: Sequence[int], references: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """The references, an empty one for each prompt where there are none. Raises ValueError when prompts, seeds and
    references differ in number."""
    references = [()] * len(prompts) if references is None else references
    if not len(prompts) == len(seeds) == len(references):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds and {len(references)} references")
    return references


class Lagging(Protocol):
    """An engine that need not follow every change of the weights."""

    lags: bool
    """Answer with the weights that were sent last, though they have changed since."""


class RolloutEngine(Protocol):
    """Generates with weights that its owner keeps current."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """One completion a prompt, in the prompts' order. A row's tokens depend on its own seed only, never on its
        neighbours' seeds. ``sampler_logprobs`` are those of the distribution sampled from, after temperature, top_k and
        top_p. ``references``: tokens that each completion may resemble (empty: none known); an engine may use them to
        be faster, never to answer otherwise."""
        ...
