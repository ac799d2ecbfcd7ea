"""A few answers of each skill before and after, for reading: those that changed first, failures never left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perdure.report.record import Item, Record
from perdure.workspace import BASE

MAX_CHARACTERS = 700
"""Of one text on the page."""
SHARES = (("gained", 2), ("lost", 2), ("wrong", 1), ("right", 1))
"""At most so many of each kind are shown."""
CHANGES = {(False, True): "gained", (True, False): "lost", (False, False): "wrong", (True, True): "right"}
"""Right before?, right after? -> kind."""
AT_LEAST = 4
"""Samples of a skill; what the kinds above lack is filled up in their order."""


@dataclass(frozen=True)
class Sample:
    """One item under two versions. ``change`` is a key of SHARES."""

    change: str
    prompt: str
    expected: str
    before: str
    after: str
    before_right: bool
    after_right: bool


@dataclass(frozen=True)
class SkillSamples:
    """``counts`` says over all shared items how many changed in which way; ``shown`` is a choice of them."""

    skill: str
    before: str
    """Name of the version."""
    after: str
    in_champion: bool
    """False: the skill is not part of the champion, and ``after`` is the candidate that tried it."""
    n: int
    counts: dict[str, int]
    shown: tuple[Sample, ...]


def samples(record: Record, numbers: dict[str, Any]) -> list[SkillSamples]:
    """Samples of every skill that was tried and whose items were kept before and after."""
    found = []
    for skill, taught_by in zip(numbers["skills"], numbers["taught_by"], strict=True):
        tried = [stage["version"] for stage in numbers["stages"] if stage["skill"] == skill]
        if tried and (made := _of_skill(record, skill, taught_by, tried[-1])):
            found.append(made)
    return found


def _of_skill(record: Record, skill: str, taught_by: str | None, tried: str) -> SkillSamples | None:
    after = record.champion if taught_by else tried
    parent = record.versions[taught_by or tried].parent or BASE
    before = BASE if record.items(BASE, skill) else parent
    old, new = record.items(before, skill), record.items(after, skill)
    # Another content of the skill may use the same ids.
    pairs = [_sample(old[key], new[key]) for key in new if key in old and old[key].prompt == new[key].prompt]
    if not pairs:
        return None
    counts = {kind: sum(pair.change == kind for pair in pairs) for kind, _ in SHARES}
    return SkillSamples(skill, before, after, taught_by is not None, len(pairs), counts, choose(pairs))


def choose(pairs: Sequence[Sample]) -> tuple[Sample, ...]:
    """A few pairs, by kind in the order of SHARES."""
    kinds = {kind: [pair for pair in pairs if pair.change == kind] for kind, _ in SHARES}
    taken = {kind: min(number, len(kinds[kind])) for kind, number in SHARES}
    for kind, _ in SHARES:
        spare = max(0, AT_LEAST - sum(taken.values()))
        taken[kind] += min(spare, len(kinds[kind]) - taken[kind])
    return tuple(pair for kind, _ in SHARES for pair in spread(kinds[kind], taken[kind]))


def spread(pairs: Sequence[Sample], number: int) -> list[Sample]:
    """``number`` of the pairs at even distances: neighbours in a file are often alike."""
    return [pairs[place * len(pairs) // number] for place in range(number)]


def _sample(old: Item, new: Item) -> Sample:
    change = CHANGES[old.right, new.right]
    prompt, expected = clipped(new.prompt), clipped(new.expected)
    return Sample(change, prompt, expected, clipped(old.completion), clipped(new.completion), old.right, new.right)


def clipped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The start of a long text, saying how much is left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
