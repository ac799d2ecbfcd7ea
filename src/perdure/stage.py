"""What the loop works on: the live objects of one stage, and its anchor rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from perdure.contexts import Renderer
from perdure.evaluate import Grader
from perdure.models import LoadedModel
from perdure.rollout.base import RolloutEngine
from perdure.skills.environments import Acting
from perdure.teacher import Teacher
from perdure.templates import Template
from perdure.types import Example, Rollout


def by_conversation(examples: Sequence[Example]) -> list[list[int]]:
    """The places of ``examples`` in groups, in order: turns of one conversation together, any other row by itself."""
    groups: dict[object, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.conversation or place, []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Anchors:
    """Prompts without a demonstration, each with a completion: the one that the stage's first weights gave, or, where
    an earlier skill is rehearsed or replayed, the stored one."""

    earlier: tuple[Rollout, ...] = ()
    """From the train files of earlier skills, which ``source`` names."""
    general: tuple[Rollout, ...] = ()

    @cached_property
    def skills(self) -> dict[str, tuple[Rollout, ...]]:
        """The rows of each earlier skill."""
        names = dict.fromkeys(row.source for row in self.earlier)
        return {name: tuple(row for row in self.earlier if row.source == name) for name in names}


@dataclass(frozen=True)
class Stage:
    """The live objects of one stage. The student is what is trained; ``working`` is its copy for decoding."""

    student: LoadedModel
    working: Any
    engine: RolloutEngine
    teacher: Teacher | None
    renderer: Renderer
    template: Template
    examples: tuple[Example | Rollout, ...]
    """Rows to learn; a Rollout where the completion was written beforehand."""
    validation: tuple[Example, ...]
    anchors: Anchors
    grader: Grader
    max_new_tokens: int
    dtype: torch.dtype
    seed: int
    folder: Path
    holder: Teacher | None = None
    """Scores the rows without a demonstration, with the weights that the stage started from; None where the teacher
    has those itself."""
    acting: Acting | None = None
    """Where the student plays whole conversations in an environment."""
    writer: RolloutEngine | None = None
    """Decodes with the teacher's weights before the first step; None: ``engine`` does."""

    @cached_property
    def conversations(self) -> list[list[int]]:
        """The places of ``examples`` in groups: turns of one conversation together, any other row by itself."""
        return by_conversation([row.student_prompt.example if isinstance(row, Rollout) else row
                                for row in self.examples])  # fmt: skip

    def teacher_of(self, demonstrated: bool) -> Teacher | None:
        """Who scores a row: a teacher that moves, or that is the original model, must not hold the rest in place."""
        return self.teacher if demonstrated or self.holder is None else self.holder
