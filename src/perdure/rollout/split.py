"""An engine's prompts divided over the processes of a run; each decodes its part with its own copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.processes import GROUP, dealt, drop_with, gather, together
from perdure.rollout.base import Progress, RolloutEngine, SamplingParams, references_of
from perdure.types import Completion, Prompt


class SplitEngine:
    """``engine`` of this process, known to all processes as ``key``. A row's tokens do not depend on who decodes it.

    ``alone``: the lead answers everything, the others get what it got."""

    def __init__(self, engine: RolloutEngine, key: int, alone: bool = False):
        self.engine = engine
        self.key = key
        self.alone = alone
        if GROUP.lead:
            drop_with(self, key)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        """See RolloutEngine. Outside of a call that all processes are in, the lead calls the others."""
        references = references_of(prompts, seeds, references)
        with together("generate", self.key, prompts, params, seeds, references):
            parts = dealt([len(prompt.token_ids) for prompt in prompts])
            if self.alone:
                parts = [list(range(len(prompts))), *([] for _ in range(GROUP.count - 1))]
            mine = parts[GROUP.rank]
            found = self.engine.generate([prompts[i] for i in mine], params, [seeds[i] for i in mine],
                                         _of_all(progress, len(prompts)), [references[i] for i in mine])  # fmt: skip
            completions: dict[int, Completion] = {}
            for part, answers in zip(parts, gather(found), strict=True):
                completions |= zip(part, answers, strict=True)
        return [completions[place] for place in range(len(prompts))]


def _of_all(progress: Progress | None, rows: int) -> Progress | None:
    """The lead's own progress, scaled up: the others are about as far."""
    if progress is None:
        return None
    return lambda tokens, done: progress(tokens * GROUP.count, min(rows, done * GROUP.count))
