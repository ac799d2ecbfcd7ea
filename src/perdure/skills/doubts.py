"""What is possible in a skill's rows and seldom meant: said when they are imported, refused by nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from perdure.skills.base import Skill, prompt_key
from perdure.types import Example

LONG = 15
"""Words of an answer that nobody writes twice in the same way."""


def doubts(skill: Skill) -> list[str]:
    """Sentences for people; none where all is as usual."""
    return [said for said in (_prose(skill), _conflicts(skill)) if said]


def _prose(skill: Skill) -> str:
    answers = [text for row in (*skill.train, *skill.test) if (text := _answer(row))]
    if skill.settings.grader != "exact" or not answers or len(set(answers)) < len(answers) / 2:
        return ""
    words = statistics.median(len(text.split()) for text in answers)
    if words <= LONG:
        return ""
    return (f"The grader is exact, and half of the answers have {words:.0f} words or more: a right answer would repeat "
            "them word for word. For prose give --grader contains, token_f1, or a function of yours "
            "(python:module:function).")  # fmt: skip


def _conflicts(skill: Skill) -> str:
    """A greedy model says one thing to a prompt: of several demonstrations of it only the most frequent can be met."""
    answers = _answers((*skill.train, *skill.test))
    several = sum(len(found) > 1 for found in answers.values())
    if not several:
        return ""
    most, rows = sum(max(found.values()) for found in _answers(skill.test).values()), len(skill.test)
    bound = f", and at most {most / rows:.0%} of the test rows can be right" if most < rows else ""
    return f"Of {len(answers)} prompts {several} have several different answers{bound}."


def _answers(rows: Sequence[Example]) -> dict[str, Counter[str]]:
    """Prompt -> how often each answer is demonstrated."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(prompt_key(row), Counter())[_answer(row)] += 1
    return found


def _answer(row: Example) -> str:
    """What is learned last; as text, also where it is calls."""
    demonstration = row.demonstration or {}
    return str(demonstration.get("content") or demonstration.get("tool_calls") or "").strip()
